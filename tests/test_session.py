"""Sessions: streaming equals training, objects come and go, nothing grows, and mistakes are named."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIG
from PIL import Image
from transformers import AutoModel, AutoProcessor

from hf_deformvos import DeformVosConfig, DeformVosModel, inference_session_deformvos
from hf_deformvos.inference_session_deformvos import ObjectTable


SIZE = (96, 160)


def open_session(processor, frames, ids=None, **options):
    """A session on a video with the id map of its first frame."""
    session = processor.init_video_session(video=frames, **options)
    if ids is not None:
        processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=ids)
    return session


def stream(model, processor, session, frames, start=0):
    """Hand frames over one by one; returns the outputs."""
    outputs = []
    for frame in frames[start:]:
        inputs = processor(images=frame)
        outputs.append(model(inference_session=session, frame=inputs.pixel_values[0]))
    return outputs


def test_session_gives_the_logits_of_the_clip(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, frames, ids[0])
    outputs = list(tiny_model.propagate_in_video_iterator(session))
    pixel_values = tiny_processor(images=list(frames)).pixel_values
    first = F.interpolate(torch.from_numpy(ids[:1])[None].float(), size=pixel_values.shape[-2:], mode="nearest-exact")
    with torch.no_grad():
        logits = tiny_model(pixel_values[None], first.long(), 2).logits[0]
    margins = F.interpolate(
        (logits[:, 1:] - logits[:, :1]).flatten(0, 1)[:, None],
        size=pixel_values.shape[-2:],
        mode="bilinear",
        align_corners=True,
    ).unflatten(0, (-1, 2))
    assert [output.frame_idx for output in outputs] == list(range(6))
    for output, expected in zip(outputs[1:], margins, strict=True):
        torch.testing.assert_close(output.pred_masks, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["list", "array", "tensor", "pil", "iterator", "streaming"])
def test_every_source_of_frames_gives_the_same_masks(kind, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    reference = list(tiny_model.propagate_in_video_iterator(open_session(tiny_processor, frames, ids[0])))
    sources = {
        "list": list(frames),
        "array": frames,
        "tensor": torch.from_numpy(frames).permute(0, 3, 1, 2),
        "pil": [Image.fromarray(frame) for frame in frames],
        "iterator": iter(frames),
        "streaming": None,
    }
    session = open_session(tiny_processor, sources[kind], ids[0])
    if kind == "streaming":
        outputs = stream(tiny_model, tiny_processor, session, frames)
    else:
        outputs = list(tiny_model.propagate_in_video_iterator(session))
    assert [output.frame_idx for output in outputs] == list(range(6))
    for one, other in zip(outputs, reference, strict=True):
        torch.testing.assert_close(one.pred_masks, other.pred_masks)


def test_the_given_mask_comes_back(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    # At 97x161 the network sees the 96x160 mask almost as it is.
    output = next(iter(tiny_model.propagate_in_video_iterator(open_session(tiny_processor, frames, ids[0] * 7))))
    id_map = tiny_processor.post_process_id_map(output, SIZE)
    assert id_map.dtype == np.int32
    assert set(np.unique(id_map)) == {0, 7, 14}
    assert (id_map == ids[0] * 7).mean() > 0.985


@pytest.mark.parametrize(
    "masks",
    [
        lambda ids: {"input_masks": ids},
        lambda ids: {"input_masks": ids.astype(np.int64)},
        lambda ids: {"input_masks": torch.from_numpy(ids)},
        lambda ids: {"input_masks": ids, "obj_ids": [1, 2]},
        lambda ids: {"input_masks": np.stack([ids == 1, ids == 2]), "obj_ids": [1, 2]},
        lambda ids: {"input_masks": [ids == 1, (ids == 2).astype(np.float32)], "obj_ids": [1, 2]},
        lambda ids: {"input_masks": [torch.from_numpy(ids == 1), torch.from_numpy(ids == 2)], "obj_ids": [1, 2]},
        lambda ids: {"input_masks": palette(ids)},
    ],
)
def test_every_form_of_masks_means_the_same(masks, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = tiny_processor.init_video_session(video=frames[:2])
    tiny_processor.add_inputs_to_inference_session(session, frame_idx=0, **masks(ids[0]))
    output = list(tiny_model.propagate_in_video_iterator(session))[1]
    assert output.object_ids == [1, 2]
    reference = list(tiny_model.propagate_in_video_iterator(open_session(tiny_processor, frames[:2], ids[0])))[1]
    torch.testing.assert_close(output.pred_masks, reference.pred_masks)


@pytest.mark.parametrize("obj_id", [5, np.int64(5), np.array(5), torch.tensor(5), {5}])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float16])
def test_ids_and_masks_of_any_type(obj_id, dtype, tiny_processor, tiny_clip):
    _, ids = tiny_clip
    session = tiny_processor.init_video_session()
    mask = torch.from_numpy(ids[0] == 1).to(dtype)
    tiny_processor.add_inputs_to_inference_session(session, np.int64(0), obj_ids=obj_id, input_masks=mask[None])
    assert session.object_ids == [5] and torch.equal(session._inputs[0][5], mask > 0)


def test_what_processor_and_reader_return_is_taken_as_it_is(tiny_model, tiny_processor, tiny_clip, caplog):
    frames, ids = tiny_clip
    decoded = [SimpleNamespace(index=index, image=frame) for index, frame in enumerate(frames)]
    session = tiny_processor.init_video_session(video=iter(decoded))
    sizes = tiny_processor(images=frames[0]).original_sizes
    tiny_processor.add_inputs_to_inference_session(session, 0, input_masks=ids[0], original_size=sizes)
    output = next(tiny_model.propagate_in_video_iterator(session))
    assert tiny_processor.post_process_id_map(output, sizes).shape == SIZE and not caplog.records


def palette(ids):
    image = Image.fromarray(ids)
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    assert image.mode == "P"
    return image


def test_ids_are_the_callers_and_masks_never_overlap(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = tiny_processor.init_video_session(video=frames)
    masks = [np.ones(SIZE, dtype=bool), ids[0] == 2]
    tiny_processor.add_inputs_to_inference_session(session, frame_idx=0, obj_ids=[-5, 70000], input_masks=masks)
    for output in tiny_model.propagate_in_video_iterator(session):
        assert output.object_ids == [-5, 70000]
        masks = tiny_processor.post_process_masks([output.pred_masks], original_sizes=[SIZE])[0]
        assert masks.shape == (2, 1, *SIZE)
        assert masks.dtype == torch.bool
        assert (masks.sum(0) <= 1).all()
        id_map = tiny_processor.post_process_id_map(output, SIZE)
        np.testing.assert_array_equal(id_map == 70000, masks[1, 0].numpy())
        np.testing.assert_array_equal(id_map == -5, masks[0, 0].numpy())


def test_nothing_grows_with_the_length_of_the_video(tiny_model, tiny_processor):
    generator = np.random.default_rng(0)
    ids = np.zeros(SIZE, dtype=np.uint8)
    ids[20:60, 30:80] = 3
    session = tiny_processor.init_video_session()
    tiny_processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=ids)
    pixel_values = tiny_processor(images=generator.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).pixel_values[0]
    sizes = []
    for _ in range(1000):
        tiny_model(inference_session=session, frame=pixel_values)
        sizes.append(session.num_bytes)
    # A frame that is the previous one and a long-term one is held once: the size swings with the interval.
    interval = TINY_CONFIG["memory_interval"]
    assert all(len(set(sizes[50 + phase :: interval])) == 1 for phase in range(interval))
    assert max(sizes) == max(sizes[:50])
    held = sum(len(value) for value in vars(session).values() if isinstance(value, (dict, list)))
    assert held == 0, "no list or dictionary of the session keeps anything of passed frames"


def test_objects_join_mid_stream(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = tiny_processor.init_video_session()
    tiny_processor.add_inputs_to_inference_session(session, 0, obj_ids=[1], input_masks=[ids[0] == 1])
    seen = []
    for index, frame in enumerate(frames):
        if index == 3:
            tiny_processor.add_inputs_to_inference_session(session, 3, obj_ids=[9], input_masks=[ids[3] == 2])
        output = tiny_model(inference_session=session, frame=tiny_processor(images=frame).pixel_values[0])
        seen.append(output.object_ids)
        if index == 3:
            joined = tiny_processor.post_process_id_map(output, SIZE) == 9
            assert (joined == (ids[3] == 2)).mean() > 0.98
    assert seen == [[1]] * 3 + [[1, 9]] * 3
    video_session = tiny_processor.init_video_session(video=frames)
    tiny_processor.add_inputs_to_inference_session(video_session, 0, obj_ids=[1], input_masks=[ids[0] == 1])
    tiny_processor.add_inputs_to_inference_session(video_session, 3, obj_ids=[9], input_masks=[ids[3] == 2])
    *_, last = tiny_model.propagate_in_video_iterator(video_session)
    torch.testing.assert_close(last.pred_masks, output.pred_masks)


def test_a_correction_enters_the_bounded_bank(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    stream(tiny_model, tiny_processor, session, frames[:4])
    tiny_processor.add_inputs_to_inference_session(session, 4, obj_ids=[2], input_masks=[ids[4] == 1])
    (output,) = stream(tiny_model, tiny_processor, session, frames[4:5])
    id_map = tiny_processor.post_process_id_map(output, SIZE)
    assert (id_map[ids[4] == 1] == 2).mean() > 0.95, "the correction overrules what was predicted"
    bank = session._memory
    assert [frame.frame_idx for frame in bank.long_term if frame.is_reference] == [0, 4]
    assert len(bank.long_term) <= TINY_CONFIG["long_term_slots"]
    # An object may be corrected away: an empty mask is no mistake for a known object.
    tiny_processor.add_inputs_to_inference_session(session, 5, obj_ids=[2], input_masks=[np.zeros(SIZE, bool)])
    (output,) = stream(tiny_model, tiny_processor, session, frames[5:6])
    assert 2 not in tiny_processor.post_process_id_map(output, SIZE)
    assert output.object_ids == [1, 2]


def test_correcting_the_frame_just_seen_replaces_its_memory(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    stream(tiny_model, tiny_processor, session, frames[:3])
    pixel_values = tiny_processor(images=frames[2]).pixel_values[0]
    tiny_processor.add_inputs_to_inference_session(session, 2, input_masks=ids[2])
    output = tiny_model(inference_session=session, frame=pixel_values, frame_idx=2)
    assert output.frame_idx == 2
    assert (tiny_processor.post_process_id_map(output, SIZE) == ids[2]).mean() > 0.98
    assert [frame.frame_idx for frame in session._memory.long_term] == [0, 2]
    assert tiny_model(inference_session=session, frame=pixel_values).frame_idx == 3


def test_removing_an_object_leaves_no_trace(tiny_model, tiny_processor, tiny_clip):
    """After the removal, the memory is what it would be had the object's pixels been background."""
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    stream(tiny_model, tiny_processor, session, frames[:1])
    session.remove_object(2)
    assert session.object_ids == [1]
    without = open_session(tiny_processor, None, np.where(ids[0] == 1, ids[0], 0))
    stream(tiny_model, tiny_processor, without, frames[:1])
    (one,) = stream(tiny_model, tiny_processor, session, frames[1:2])
    (other,) = stream(tiny_model, tiny_processor, without, frames[1:2])
    torch.testing.assert_close(one.pred_masks, other.pred_masks, atol=1e-5, rtol=1e-4)
    # Its place is free again, and the last object takes the whole memory with it.
    tiny_processor.add_inputs_to_inference_session(session, 2, obj_ids=[5], input_masks=[ids[2] == 2])
    (output,) = stream(tiny_model, tiny_processor, session, frames[2:3])
    assert output.object_ids == [1, 5]
    session.remove_object(1)
    session.remove_object(5)
    with pytest.raises(ValueError, match="No object is known"):
        stream(tiny_model, tiny_processor, session, frames[3:4])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("layers", [1, 2])
def test_groups_come_and_go(layers, dtype, tiny_processor, tiny_clip):
    """A group that loses its last object costs nothing more and leaves no ghost, in any precision."""
    frames, ids = tiny_clip
    model = DeformVosModel(DeformVosConfig(**{**TINY_CONFIG, "max_objects": 1, "num_hidden_layers": layers})).eval()
    session = open_session(tiny_processor, None, ids[0], dtype=dtype)
    stream(model, tiny_processor, session, frames[:2])
    session.remove_object(2)
    assert session._memory.previous.masks.shape[0] == 1
    (output,) = stream(model, tiny_processor, session, frames[2:3])
    assert output.object_ids == [1]
    tiny_processor.add_inputs_to_inference_session(session, 3, obj_ids=[8], input_masks=[ids[3] == 2])
    outputs = stream(model, tiny_processor, session, frames[3:])
    assert outputs[-1].object_ids == [1, 8]
    assert torch.isfinite(outputs[-1].pred_masks).all()
    held = [tensor for frame in session._memory.frames() for tensor in frame.tensors()]
    assert not any(tensor.requires_grad for tensor in held), "no graph may hang on the memory"
    shares = session._memory.previous.masks[:, 1:].sum((0, 1))
    assert shares.max() <= 1.001, "objects of all groups share each pixel"


def test_the_stream_goes_on_counting_when_the_last_object_leaves(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = tiny_processor.init_video_session()
    tiny_processor.add_inputs_to_inference_session(session, 0, obj_ids=[1], input_masks=[ids[0] == 1])
    tiny_processor.add_inputs_to_inference_session(session, 2, obj_ids=[2], input_masks=[ids[2] == 2])
    stream(tiny_model, tiny_processor, session, frames[:2])
    session.remove_object(1)
    (output,) = stream(tiny_model, tiny_processor, session, frames[2:3])
    assert (output.frame_idx, output.object_ids) == (2, [2])


def test_overlapping_masks_go_to_the_one_given_last(tiny_model, tiny_processor, tiny_clip):
    frames, _ = tiny_clip
    everything, band = np.ones(SIZE, bool), np.zeros(SIZE, bool)
    band[32:64] = True
    for masks in ({1: everything, 2: band}, {1: everything, 2: np.kron(band, np.ones((2, 2), bool))}):
        session = tiny_processor.init_video_session()
        for obj_id, mask in masks.items():
            tiny_processor.add_inputs_to_inference_session(session, 0, obj_ids=[obj_id], input_masks=[mask])
        (output,) = stream(tiny_model, tiny_processor, session, frames[:1])
        id_map = tiny_processor.post_process_id_map(output, SIZE)
        assert (id_map == np.where(band, 2, 1)).mean() > 0.97
        assert session._memory.previous.masks[:, 1:].sum(1).max() <= 1.001


def dot(row, column, size=SIZE):
    mask = np.zeros(size, bool)
    mask[row, column] = True
    return mask


@pytest.mark.parametrize("column", [0, 1, 2, 199, 317, 319])
def test_an_object_is_never_too_small_to_be_given(column, tiny_model, tiny_processor, tiny_clip):
    # 1920 columns on 161: most lie between those that nearest neighbours take.
    frames, _ = tiny_clip
    session = tiny_processor.init_video_session()
    around, point = np.ones((1080, 1920), bool), dot(500, 6 * column, (1080, 1920))
    tiny_processor.add_inputs_to_inference_session(session, 0, obj_ids=[3, 1], input_masks=[point, around & ~point])
    (output,) = stream(tiny_model, tiny_processor, session, frames[:1])
    given = output.pred_masks[:, 0] > 0
    (row, found), *others = given[0].nonzero().tolist()
    assert (row, found) == (500 * 97 // 1080, 6 * column * 161 // 1920) and not others
    assert given.sum(0).max() == 1, "and no pixel is given twice"


def test_a_new_object_that_others_cover_is_refused(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = tiny_processor.init_video_session()
    for obj_id in (4, 5):
        tiny_processor.add_inputs_to_inference_session(session, 0, obj_ids=[obj_id], input_masks=[ids[0] == 1])
    with pytest.raises(ValueError, match="Nothing is left of the mask of object 4 on frame 0"):
        stream(tiny_model, tiny_processor, session, frames[:1])
    session.remove_object(4)
    (output,) = stream(tiny_model, tiny_processor, session, frames[:1])
    assert output.object_ids == [5] and output.pred_masks.max() > 0
    # Of an object that is followed already it is a correction: it is hidden.
    tiny_processor.add_inputs_to_inference_session(session, 1, obj_ids=[5], input_masks=[ids[1] == 1])
    tiny_processor.add_inputs_to_inference_session(session, 1, obj_ids=[6], input_masks=[ids[1] == 1])
    (output,) = stream(tiny_model, tiny_processor, session, frames[1:2])
    assert output.object_ids == [5, 6] and output.pred_masks[0].max() < 0 < output.pred_masks[1].max()


def test_masks_of_frames_that_a_stream_has_passed_are_refused(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    stream(tiny_model, tiny_processor, session, frames[:4])
    held = session.num_bytes
    with pytest.raises(ValueError, match="Frame 2 has passed: frame 3 was handed over last"):
        tiny_processor.add_inputs_to_inference_session(session, 2, obj_ids=[9], input_masks=[ids[2] == 1])
    assert session.num_bytes == held and session.object_ids == [1, 2]
    tiny_processor.add_inputs_to_inference_session(session, 3, obj_ids=[9], input_masks=[ids[3] == 1])
    pixel_values = tiny_processor(images=frames[3]).pixel_values[0]
    again = tiny_model(inference_session=session, frame=pixel_values, frame_idx=3)
    assert again.object_ids == [1, 2, 9], "the last frame may be corrected and handed over once more"
    camera = open_session(tiny_processor, iter(frames), ids[0])
    tiny_processor.add_inputs_to_inference_session(camera, 4, obj_ids=[9], input_masks=[ids[4] == 1])
    with pytest.raises(ValueError, match=r"masks of the frames \[0, 4\] would be lost.*Start at 0"):
        next(tiny_model.propagate_in_video_iterator(camera, start_frame_idx=4))


# How a stream goes on after frame 3, which `steps` has just yielded.
WAYS_ON = {
    "the same propagation": lambda model, session, steps: steps,
    "another propagation": lambda model, session, steps: model.propagate_in_video_iterator(session),
    "one from there": lambda model, session, steps: model.propagate_in_video_iterator(session, start_frame_idx=3),
    "single frames": lambda model, session, steps: (model(inference_session=session) for _ in range(3)),
}


def give_on_the_held_frame(way, model, processor, frames, ids):
    """Outputs of a stream after an object was given on its frame 3, which was segmented without it."""
    session = processor.init_video_session(video=iter(frames))
    processor.add_inputs_to_inference_session(session, 0, obj_ids=[1], input_masks=[ids[0] == 1])
    steps = model.propagate_in_video_iterator(session)
    assert [next(steps).object_ids for _ in range(4)] == [[1]] * 4
    processor.add_inputs_to_inference_session(session, 3, obj_ids=[9], input_masks=[ids[3] == 2])
    return list(WAYS_ON[way](model, session, steps))


@pytest.mark.parametrize("way", WAYS_ON)
def test_masks_of_the_frame_that_a_stream_holds_are_taken_up(way, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    outputs = give_on_the_held_frame(way, tiny_model, tiny_processor, frames, ids)
    session = tiny_processor.init_video_session()
    tiny_processor.add_inputs_to_inference_session(session, 0, obj_ids=[1], input_masks=[ids[0] == 1])
    stream(tiny_model, tiny_processor, session, frames[:4])
    tiny_processor.add_inputs_to_inference_session(session, 3, obj_ids=[9], input_masks=[ids[3] == 2])
    again = tiny_model(inference_session=session, frame=tiny_processor(images=frames[3]).pixel_values[0], frame_idx=3)
    expected = [again, *stream(tiny_model, tiny_processor, session, frames[4:])]
    if way == "the same propagation":
        del expected[0]  # it has yielded that frame
    for output, same in zip(outputs, expected, strict=True):
        assert (output.frame_idx, output.object_ids) == (same.frame_idx, [1, 9])
        torch.testing.assert_close(output.pred_masks, same.pred_masks)


def test_the_only_object_may_be_replaced_on_the_frame_that_a_stream_holds(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = tiny_processor.init_video_session(video=iter(frames))
    tiny_processor.add_inputs_to_inference_session(session, 0, obj_ids=[1], input_masks=[ids[0] == 1])
    seen = []
    for output in tiny_model.propagate_in_video_iterator(session):
        seen.append((output.frame_idx, output.object_ids))
        if output.frame_idx == 3:
            session.remove_object(1)
            tiny_processor.add_inputs_to_inference_session(session, 3, obj_ids=[2], input_masks=[ids[3] == 2])
    assert seen == [*((index, [1]) for index in range(4)), (4, [2]), (5, [2])]


def go_past_masks_of_a_stream(model, processor, frames, ids):
    """What a stream says, and does, where a frame with masks is to be skipped."""
    session = processor.init_video_session(video=iter(frames))
    for index, obj_id in ((0, 1), (4, 2)):
        processor.add_inputs_to_inference_session(session, index, obj_ids=[obj_id], input_masks=[ids[index] == obj_id])
    yield model(inference_session=session).object_ids
    with pytest.raises(ValueError, match="frame 4 would be lost: segment that frame before frame 5") as caught:
        model(inference_session=session, frame_idx=5)
    yield str(caught.value)
    for index in (4, 5):
        yield model(inference_session=session, frame_idx=index).object_ids


def test_a_stream_does_not_go_past_masks(tiny_model, tiny_processor, tiny_clip):
    *_, fourth, fifth = go_past_masks_of_a_stream(tiny_model, tiny_processor, *tiny_clip)
    assert fourth == fifth == [1, 2]


def give_on_a_frame_that_breaks(model, processor, frames, ids):
    """What a stream follows after a frame with the first masks of an object turned out to be none."""
    session = processor.init_video_session(video=iter([frames[0], np.full((*SIZE, 3), np.nan), *frames[2:]]))
    for index, obj_id in ((0, 1), (1, 2)):
        processor.add_inputs_to_inference_session(session, index, obj_ids=[obj_id], input_masks=[ids[index] == obj_id])
    processor.add_inputs_to_inference_session(session, 3, obj_ids=[2], input_masks=[np.zeros(SIZE, bool)])
    with pytest.raises(ValueError, match="Frame 1 of the video cannot be used"):
        list(model.propagate_in_video_iterator(session))
    return [(output.frame_idx, output.object_ids) for output in model.propagate_in_video_iterator(session)]


def test_masks_of_a_frame_that_a_stream_could_not_use_are_told(tiny_model, tiny_processor, tiny_clip, caplog):
    followed = give_on_a_frame_that_breaks(tiny_model, tiny_processor, *tiny_clip)
    assert followed == [(index, [1]) for index in range(2, 6)]
    assert "The masks of frame 1 are lost" in caplog.text and "for frame 2 or a later one" in caplog.text


def empty_on_a_video(propagated, model, processor, frames, ids):
    """Frames, objects and masks of propagations through a video with an object on frame 3 that is gone on frame 1."""
    session = processor.init_video_session(video=frames)
    processor.add_inputs_to_inference_session(session, 3, obj_ids=[1], input_masks=[ids[3] == 1])
    if propagated:
        list(model.propagate_in_video_iterator(session))
    gone = {"obj_ids": [1], "input_masks": [np.zeros(SIZE, bool)]}
    with pytest.raises(ValueError, match=r"object 1 on frame 3 is empty\. .*, or marked on another frame"):
        processor.add_inputs_to_inference_session(session, 3, **gone)
    processor.add_inputs_to_inference_session(session, 1, **gone)
    with pytest.raises(ValueError, match=r"No object is known at frame 1 in this direction: .* frames \[3\]"):
        list(model.propagate_in_video_iterator(session, start_frame_idx=1))
    for way in ({}, {"start_frame_idx": 3, "reverse": True}, {"start_frame_idx": 0, "reverse": True}):
        outputs = list(model.propagate_in_video_iterator(session, **way))
        yield [
            (output.frame_idx, output.object_ids, 1 in processor.post_process_id_map(output, SIZE))
            for output in outputs
        ]
        assert session.count_frames(way.get("start_frame_idx"), None, "reverse" in way) == len(outputs)
    processor.add_inputs_to_inference_session(session, 0, obj_ids=[2], input_masks=[ids[0] == 2])
    yield [output.object_ids for output in model.propagate_in_video_iterator(session)]


@pytest.mark.parametrize("propagated", [False, True])
def test_an_empty_mask_says_the_same_whatever_was_propagated_before(propagated, tiny_model, tiny_processor, tiny_clip):
    forward, backward, first, both = empty_on_a_video(propagated, tiny_model, tiny_processor, *tiny_clip)
    assert [(index, ids) for index, ids, _ in forward] == [(3, [1]), (4, [1]), (5, [1])] and forward[0][2]
    assert [(index, ids) for index, ids, _ in backward] == [(index, [1]) for index in (3, 2, 1, 0)]
    assert backward[0][2] and not backward[2][2], "on the way back it is gone from frame 1 on"
    assert [index for index, *_ in first] == [0], "and both masks count where they lie behind the start"
    assert both == [[2]] * 3 + [[2, 1]] * 3


@pytest.mark.parametrize("kind", [list, iter])
def test_the_last_object_may_be_removed_while_a_video_is_followed(kind, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip

    def visited(later):
        session = tiny_processor.init_video_session(video=kind(frames))
        tiny_processor.add_inputs_to_inference_session(session, 0, obj_ids=[1], input_masks=[ids[0] == 1])
        if later:
            tiny_processor.add_inputs_to_inference_session(session, 4, obj_ids=[2], input_masks=[ids[4] == 2])
        for output in tiny_model.propagate_in_video_iterator(session):
            yield output.frame_idx, output.object_ids
            if output.frame_idx == 1:
                session.remove_object(1)

    assert list(visited(later=False)) == [(0, [1]), (1, [1])]
    assert list(visited(later=True)) == [(0, [1]), (1, [1]), (4, [2]), (5, [2])]


def test_masks_that_no_frame_reaches_are_told(tiny_model, tiny_processor, tiny_clip, caplog):
    frames, ids = tiny_clip
    session = tiny_processor.init_video_session()
    tiny_processor.add_inputs_to_inference_session(session, 2, input_masks=ids[2])
    pixel_values = tiny_processor(images=frames[3]).pixel_values[0]
    with pytest.raises(ValueError, match=r"The masks of frame 2 would be lost: .* before frame 3 \(`frame_idx=2`\)"):
        tiny_model(inference_session=session, frame=pixel_values, frame_idx=3)
    assert tiny_model(inference_session=session, frame=pixel_values).frame_idx == 2, "the session goes on"
    for first, outputs in ((7, None), (0, 6)):
        session = tiny_processor.init_video_session(video=iter(frames))
        for frame_idx in {first, 7}:
            tiny_processor.add_inputs_to_inference_session(session, frame_idx, input_masks=ids[0])
        if outputs is None:
            with pytest.raises(ValueError, match="The video ended before frame 7"):
                list(tiny_model.propagate_in_video_iterator(session))
        else:
            assert len(list(tiny_model.propagate_in_video_iterator(session))) == outputs
            assert "The video ended before frame 7" in caplog.text


def test_the_bar_counts_the_frames_that_are_visited(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = tiny_processor.init_video_session(video=frames)
    for index in (1, 4):
        tiny_processor.add_inputs_to_inference_session(session, index, input_masks=ids[index])
    for options in ((None, None, False), (3, None, False), (4, None, True), (1, 2, False), (4, 9, True)):
        visited = list(tiny_model.propagate_in_video_iterator(session, *options))
        assert session.count_frames(*options) == len(visited) > 0
    assert tiny_processor.init_video_session(video=iter(frames)).count_frames(None, 3, False) is None


def test_a_refused_frame_leaves_the_session_as_it_was(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    pixel_values = tiny_processor(images=frames[0]).pixel_values[0]
    with pytest.raises(ValueError, match="16k"):
        tiny_model(inference_session=session, frame=pixel_values[:, :-1, :-1])
    output = tiny_model(inference_session=session, frame=pixel_values)
    assert (output.frame_idx, output.object_ids) == (0, [1, 2])


def test_a_stream_goes_on_after_a_frame_that_cannot_be_used(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    broken_frames = [frames[0], np.full((*SIZE, 3), np.nan), *frames[2:4]]
    session = open_session(tiny_processor, iter(broken_frames), ids[0])
    with pytest.raises(ValueError, match=r"Frame 1 of the video.*NaN"):
        list(tiny_model.propagate_in_video_iterator(session))
    assert [output.frame_idx for output in tiny_model.propagate_in_video_iterator(session)] == [2, 3]
    with pytest.raises(ValueError, match="has passed"):
        tiny_processor.add_inputs_to_inference_session(session, frame_idx=1, input_masks=ids[1])


def test_errors_of_the_callers_own_code_are_not_the_end_of_the_video(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip

    class Broken(list):
        def __getitem__(self, index):
            return super().__getitem__(index if index < 2 else 99)

    session = open_session(tiny_processor, Broken(frames), ids[0])
    with pytest.raises(IndexError):
        list(tiny_model.propagate_in_video_iterator(session))


def test_the_memory_of_a_frame_seen_again_keeps_its_reference(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    stream(tiny_model, tiny_processor, session, frames[:3])
    tiny_model(inference_session=session, frame=tiny_processor(images=frames[0]).pixel_values[0], frame_idx=0)
    assert [(f.frame_idx, f.is_reference) for f in session._memory.long_term] == [(0, True), (2, False)]


@pytest.mark.parametrize("layers", [1, 2])
def test_more_objects_than_one_group_holds(layers, tiny_processor):
    model = DeformVosModel(DeformVosConfig(**{**TINY_CONFIG, "max_objects": 4, "num_hidden_layers": layers})).eval()
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 255, (4, *SIZE, 3), dtype=np.uint8)
    ids = (np.arange(96)[:, None] // 24) * 3 + np.arange(160)[None] // 54  # 12 tiles, one of them background
    session = open_session(tiny_processor, None, ids.astype(np.uint8))
    outputs = stream(model, tiny_processor, session, frames[:2])
    assert outputs[1].object_ids == list(range(1, 12))
    assert session._memory.previous.masks.shape[0] == 3
    assert torch.isfinite(outputs[1].pred_masks).all()
    # A group alone sees the others as background: its margins do not depend on them.
    alone = np.where(np.isin(ids, [1, 2, 3, 4]), ids, 0)
    (_, single) = stream(model, tiny_processor, open_session(tiny_processor, None, alone.astype(np.uint8)), frames[:2])
    torch.testing.assert_close(single.pred_masks, outputs[1].pred_masks[:4], atol=1e-4, rtol=1e-3)


def test_a_group_is_added_mid_stream(tiny_processor):
    model = DeformVosModel(DeformVosConfig(**{**TINY_CONFIG, "max_objects": 1, "num_hidden_layers": 2})).eval()
    frames = np.random.default_rng(0).integers(0, 255, (4, *SIZE, 3), dtype=np.uint8)
    first, second = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    first[:40], second[60:] = True, True
    session = tiny_processor.init_video_session()
    tiny_processor.add_inputs_to_inference_session(session, 0, obj_ids=[1], input_masks=[first])
    stream(model, tiny_processor, session, frames[:2])
    tiny_processor.add_inputs_to_inference_session(session, 2, obj_ids=[2], input_masks=[second])
    outputs = stream(model, tiny_processor, session, frames[2:])
    assert [output.object_ids for output in outputs] == [[1, 2], [1, 2]]
    assert torch.isfinite(outputs[1].pred_masks).all()


def test_object_dependent_attention_takes_one_group(tiny_processor):
    config = DeformVosConfig(**{**TINY_CONFIG, "max_objects": 1, "object_independent": False})
    model = DeformVosModel(config).eval()
    ids = np.zeros(SIZE, np.uint8)
    ids[:20], ids[40:] = 1, 2
    session = open_session(tiny_processor, None, ids)
    with pytest.raises(ValueError, match="object_independent"):
        stream(model, tiny_processor, session, np.zeros((1, *SIZE, 3), np.uint8))


def test_an_object_that_leaves_may_return(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    stream(tiny_model, tiny_processor, session, frames[:2])
    gone = np.zeros(SIZE, bool)
    tiny_processor.add_inputs_to_inference_session(session, 2, obj_ids=[1], input_masks=[gone])
    outputs = stream(tiny_model, tiny_processor, session, frames[2:])
    assert all(output.object_ids == [1, 2] for output in outputs), "an absent object keeps its id"
    assert [f.frame_idx for f in session._memory.long_term if f.is_reference] == [0, 2]
    # What would find it again is still there: its first appearance.
    assert session._memory.long_term[0].masks[0, 1].sum() > 0


def test_reverse_mirrors_forward(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = tiny_processor.init_video_session(video=frames)
    tiny_processor.add_inputs_to_inference_session(session, frame_idx=5, input_masks=ids[0])
    backward = list(tiny_model.propagate_in_video_iterator(session, reverse=True))
    assert [output.frame_idx for output in backward] == [5, 4, 3, 2, 1, 0]
    mirrored = open_session(tiny_processor, frames[::-1], ids[0])
    for one, other in zip(backward, tiny_model.propagate_in_video_iterator(mirrored), strict=True):
        torch.testing.assert_close(one.pred_masks, other.pred_masks)


def test_start_and_length(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = tiny_processor.init_video_session(video=frames)
    tiny_processor.add_inputs_to_inference_session(session, frame_idx=1, input_masks=ids[1])

    def visited(**options):
        return [output.frame_idx for output in tiny_model.propagate_in_video_iterator(session, **options)]

    assert visited() == [1, 2, 3, 4, 5], "the earliest frame with an input comes first"
    assert visited(max_frame_num_to_track=2) == [1, 2, 3]
    assert visited(start_frame_idx=3) == [3, 4, 5]
    assert visited(start_frame_idx=3, max_frame_num_to_track=0, show_progress_bar=False) == [3]
    assert visited(start_frame_idx=1, reverse=True) == [1, 0]


def test_two_sessions_share_a_model_and_nothing_else(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    alone = list(tiny_model.propagate_in_video_iterator(open_session(tiny_processor, frames, ids[0])))
    one = open_session(tiny_processor, frames, ids[0])
    other = open_session(tiny_processor, frames[::-1], ids[5] * 3)
    pairs = zip(
        tiny_model.propagate_in_video_iterator(one), tiny_model.propagate_in_video_iterator(other), strict=True
    )
    for (output, _), expected in zip(pairs, alone, strict=True):
        torch.testing.assert_close(output.pred_masks, expected.pred_masks)


def test_reset(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, frames, ids[0])
    first = list(tiny_model.propagate_in_video_iterator(session))
    session.reset_tracking_data()
    assert session.object_ids == []
    assert session.num_bytes == session.source.num_bytes, "of the session only the frame at hand is left"
    assert session.num_frames == 6, "the video stays"
    tiny_processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=ids[0])
    again = list(tiny_model.propagate_in_video_iterator(session))
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one.pred_masks, other.pred_masks)
    session.reset_inference_session()
    assert session.num_frames is None
    assert session.object_ids == []


@pytest.mark.parametrize("short_side", [None, 64])
def test_a_session_is_pickled_with_its_video(short_side, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, list(frames), ids[0], short_side=short_side)
    restored = pickle.loads(pickle.dumps(session))
    both = (tiny_model.propagate_in_video_iterator(each) for each in (restored, session))
    for one, other in zip(*both, strict=True):
        assert one.object_ids == other.object_ids and torch.equal(one.pred_masks, other.pred_masks)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda session: pickle.loads(pickle.dumps(session))])
def test_a_copy_of_a_session_goes_on_by_itself(duplicate, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    stream(tiny_model, tiny_processor, session, frames[:3])
    other = duplicate(session)
    assert other.num_bytes == session.num_bytes
    other.remove_object(1)
    (without,) = stream(tiny_model, tiny_processor, other, frames[3:4])
    assert without.object_ids == [2]
    outputs = stream(tiny_model, tiny_processor, session, frames[3:])
    whole = stream(tiny_model, tiny_processor, open_session(tiny_processor, None, ids[0]), frames)
    assert all(torch.equal(one.pred_masks, same.pred_masks) for one, same in zip(outputs, whole[3:], strict=True))


def test_a_snapshot_shares_the_model_and_the_video(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip

    class Video(list):
        def __deepcopy__(self, memo):
            pytest.fail("the video is copied")

    tiny_model.__deepcopy__ = lambda memo: pytest.fail("the model is copied")
    session = open_session(tiny_processor, Video(frames), ids[0])
    steps = tiny_model.propagate_in_video_iterator(session)
    next(steps)
    snapshot = copy.deepcopy(session)
    expected = list(steps)
    outputs = [tiny_model(inference_session=snapshot) for _ in expected]
    assert all(torch.equal(one.pred_masks, same.pred_masks) for one, same in zip(outputs, expected, strict=True))


def test_a_session_may_go_from_thread_to_thread(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    expected = list(tiny_model.propagate_in_video_iterator(open_session(tiny_processor, iter(frames), ids[0])))
    steps = tiny_model.propagate_in_video_iterator(open_session(tiny_processor, iter(frames), ids[0]))
    for output in expected:
        with ThreadPoolExecutor(1) as thread:
            masks = thread.submit(next, steps).result().pred_masks
        assert torch.equal(masks, output.pred_masks) and not masks.requires_grad


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("part", ["encode_images", "rewrite", "segment", "remember", "output"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_step_that_fails_halfway_leaves_the_session_as_it_was(part, reset, monkeypatch, tiny_processor, tiny_clip):
    """Also where the frame brings an object, and with it a group."""
    frames, ids = tiny_clip
    model = DeformVosModel(DeformVosConfig(**{**TINY_CONFIG, "max_objects": 1})).eval()

    def follow(session):
        tiny_processor.add_inputs_to_inference_session(session, 0, obj_ids=[1], input_masks=[ids[0] == 1])
        stream(model, tiny_processor, session, frames[:2])
        tiny_processor.add_inputs_to_inference_session(session, 2, obj_ids=[9], input_masks=[ids[2] == 2])
        return session

    expected = stream(model, tiny_processor, follow(tiny_processor.init_video_session()), frames[2:])
    session = follow(tiny_processor.init_video_session())
    held = session.num_bytes
    with monkeypatch.context() as patch:
        owner, name = (inference_session_deformvos, "DeformVosVideoOutput") if part == "output" else (model, part)
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream(model, tiny_processor, session, frames[2:3])
    assert session.num_bytes == held
    if reset:
        session.reset_tracking_data()
        assert session.num_bytes == 0
        follow(session)
    for output, same in zip(stream(model, tiny_processor, session, frames[2:]), expected, strict=True):
        assert (output.frame_idx, output.object_ids) == (same.frame_idx, same.object_ids)
        assert torch.equal(output.pred_masks, same.pred_masks)


def test_a_removal_that_fails_takes_nothing(monkeypatch, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    stream(tiny_model, tiny_processor, session, frames[:2])
    with monkeypatch.context() as patch:
        patch.setattr(tiny_model, "rewrite", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.remove_object(2)
    assert session.object_ids == [1, 2]
    session.remove_object(2)
    assert session.object_ids == [1] and not session._memory.previous.masks[:, 2].any()


def test_mask_of_another_size_is_resized(tiny_model, tiny_processor, tiny_clip, caplog):
    frames, ids = tiny_clip
    large = np.kron(ids[0], np.ones((3, 3), np.uint8))
    session = tiny_processor.init_video_session(video=frames[:2])
    tiny_processor.add_inputs_to_inference_session(session, 0, input_masks=large, original_size=SIZE)
    output = list(tiny_model.propagate_in_video_iterator(session))[1]
    reference = list(tiny_model.propagate_in_video_iterator(open_session(tiny_processor, frames[:2], ids[0])))[1]
    assert (output.pred_masks - reference.pred_masks).abs().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_lower_precision_by_autocast(dtype, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    outputs = list(tiny_model.propagate_in_video_iterator(open_session(tiny_processor, frames, ids[0], dtype=dtype)))
    reference = list(tiny_model.propagate_in_video_iterator(open_session(tiny_processor, frames, ids[0])))
    assert tiny_model.dtype == torch.float32
    assert (outputs[-1].pred_masks - reference[-1].pred_masks).abs().mean() < 0.1
    assert outputs[-1].pred_masks.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, "double", torch.float8_e4m3fn, torch.int32])
def test_dtypes_that_nothing_computes_in_are_refused(dtype, tiny_processor):
    with pytest.raises(ValueError, match=f"`dtype` must be float32, bfloat16 or float16, got '?{dtype}'?; leave it"):
        tiny_processor.init_video_session(dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_dtype_that_the_weights_do_not_hold_is_refused(dtype, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0], dtype=dtype)
    with pytest.raises(ValueError, match=f"asks for {dtype}, the model's weights are torch.bfloat16: load it in"):
        stream(tiny_model.to(torch.bfloat16), tiny_processor, session, frames[:1])


@pytest.mark.parametrize("is_same", [False, True])
def test_weights_of_another_dtype_than_the_memorys_are_refused(is_same, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    stream(tiny_model, tiny_processor, session, frames[:1])
    cast = (tiny_model if is_same else copy.deepcopy(tiny_model)).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"weights must be torch\.float32, .* got torch\.bfloat16; cast the model"):
        stream(cast, tiny_processor, session, frames[1:2])
    (output,) = stream(tiny_model.float(), tiny_processor, session, frames[1:2])
    assert output.frame_idx == 1, "the session goes on"
    session.reset_tracking_data()
    tiny_processor.add_inputs_to_inference_session(session, 0, input_masks=ids[0])
    assert len(stream(cast.to(torch.bfloat16), tiny_processor, session, frames[:2])) == 2


def test_auto_classes_load_what_was_saved(tiny_model, tiny_processor, tiny_clip, tmp_path):
    frames, ids = tiny_clip
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is type(tiny_processor)
    assert dict(processor.image_processor.size) == dict(tiny_processor.image_processor.size)
    one = list(model.propagate_in_video_iterator(open_session(processor, frames, ids[0])))
    other = list(tiny_model.propagate_in_video_iterator(open_session(tiny_processor, frames, ids[0])))
    assert all(torch.equal(a.pred_masks, b.pred_masks) for a, b in zip(one, other, strict=True))


def test_attentions_and_states_on_request(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    stream(tiny_model, tiny_processor, session, frames[:1])
    pixel_values = tiny_processor(images=frames[1]).pixel_values[0]
    output = tiny_model(
        inference_session=session, frame=pixel_values, output_attentions=True, output_hidden_states=True
    )
    assert set(output.attentions[0]) == set(output.sampled_locations[0]) == {"long_term", "short_term", "self"}
    assert output.hidden_states[0][0].shape[:2] == (1, TINY_CONFIG["hidden_size"])


def test_the_configuration_and_return_dict_count_as_in_transformers(tiny_model, tiny_processor, tiny_clip, tmp_path):
    frames, ids = tiny_clip
    session = open_session(tiny_processor, None, ids[0])
    stream(tiny_model, tiny_processor, session, frames[:1])
    pixel_values = tiny_processor(images=frames[1]).pixel_values[0]
    tiny_model.config.output_attentions = True
    assert tiny_model(inference_session=session, frame=pixel_values).attentions
    quiet = tiny_model(inference_session=session, frame=pixel_values, output_attentions=False, return_dict=False)
    assert quiet[0] == 2 and quiet[1] == [1, 2] and len(quiet) == 3
    tiny_model.save_pretrained(tmp_path, True, tiny_model.state_dict())
    assert (tmp_path / "model.safetensors").exists()


def broken(frame, value):
    frame = frame.clone()
    frame[0, 0, 0] = value
    return frame


def under_autocast(model, session, frame):
    with torch.autocast("cpu", torch.bfloat16):
        return model(inference_session=session, frame=frame)


MISTAKES = {
    "no mask at all": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0), "input_masks"),
    "empty id map": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, input_masks=y * 0), "empty"),
    "empty object": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [4], [y == 99]), "object 4.*empty"),
    "id not in the map": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [8], y), r"none of \[8\]"),
    "no id": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [], y), "`obj_ids` is empty"),
    "no id of no masks": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [], y[:0] > 0), "is empty"),
    "huge id": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [2**40], [y == 1]), "32-bit"),
    "emptied before it began": (lambda s, p, f, y: give_then_empty(s, p, y), "object 1.*empty"),
    "path as video": (lambda s, p, f, y: p.init_video_session(video="clip.mp4"), "VideoReader"),
    "one frame as video": (lambda s, p, f, y: p.init_video_session(video=f), "num_frames"),
    "frame beyond the video": (
        lambda s, p, f, y: p.add_inputs_to_inference_session(p.init_video_session(video=[f]), 1, input_masks=y),
        "below the video's 1 frames",
    ),
    "no such dtype": (lambda s, p, f, y: p.init_video_session(dtype="bf16"), "bfloat16"),
    "more ids than masks": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [1, 2], [y == 1]), "1 masks"),
    "ids twice": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [1, 1], [y == 1, y == 2]), "differ"),
    "background as id": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [0], [y == 1]), "background"),
    "fractions": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, input_masks=y * 0.3), "whole numbers"),
    "NaN mask": (
        lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [1], [np.full(SIZE, np.nan)]),
        "NaN",
    ),
    "colour mask": (
        lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, input_masks=Image.new("RGB", (8, 8))),
        "RGB",
    ),
    "mask with channels": (
        lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [1], [np.ones((4, 4, 3))]),
        "height, width",
    ),
    "negative frame": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, -1, input_masks=y), "frame_idx"),
    "unknown id": (lambda s, p, f, y: s.remove_object(17), "17"),
    "colours as masks": (
        lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, input_masks=np.stack([y] * 3, axis=-1)),
        r"is a colour image, \(96, 160, 3\)",
    ),
    "a size of one side": (
        lambda s, p, f, y: p.post_process_masks(np.zeros((1, 1, 8, 8), np.float32), [(10,)]),
        r"must be \(height, width\), got \(10,\)",
    ),
    "two videos": (
        lambda s, p, f, y: p.init_video_session(video=[[f, f], [f, f]]).source.read(0),
        "one video, got 2 frames in place of one",
    ),
    "empty video": (lambda s, p, f, y: p.init_video_session(video=[]), "no frame"),
    "bad interval": (lambda s, p, f, y: p.init_video_session(memory_interval=0), "memory_interval"),
    "fractional frame": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 1.7, input_masks=y), "whole number"),
    "fractional id": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [1.5], [y == 1]), "obj_ids.*1.5"),
    "path as mask": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [1], "mask.png"), "'mask.png'"),
    "dict as mask": (lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, [1], {1: y}), "id map"),
    "ids beyond int32": (
        lambda s, p, f, y: p.add_inputs_to_inference_session(s, 0, input_masks=y.astype(np.int64) << 40),
        "32-bit",
    ),
    "number as video": (lambda s, p, f, y: p.init_video_session(video=5), "got int"),
    "dict as video": (lambda s, p, f, y: p.init_video_session(video={0: f}), "got dict"),
    "picture as video": (lambda s, p, f, y: p.init_video_session(video=Image.new("RGB", (8, 8))), "got Image"),
    "short side below 1": (lambda s, p, f, y: p.init_video_session(short_side=0), "`short_side` must be at least 1"),
    "fractional interval": (lambda s, p, f, y: p.init_video_session(memory_interval=2.5), "whole number, got 2.5"),
    "no such device": (lambda s, p, f, y: p.init_video_session(inference_device="foo"), "cuda:0, got 'foo'"),
    "NaN picture": (lambda s, p, f, y: p(images=np.full((*SIZE, 3), np.nan)), "NaN"),
    "values out of range": (lambda s, p, f, y: p(images=np.full((*SIZE, 3), 999)), r"0\.\.255"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, tiny_processor, tiny_clip):
    act, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        act(tiny_processor.init_video_session(), tiny_processor, *[part[0] for part in tiny_clip])


@pytest.mark.parametrize(
    ("asked", "own", "fits"),
    [("cuda", "cuda:1", True), ("cuda:1", "cuda:1", True), ("cuda:0", "cuda", True), ("cuda:1", "cuda:0", False)],
)
def test_a_session_computes_where_its_model_is(asked, own, fits, tiny_model, tiny_processor, monkeypatch):
    """No device is needed to tell whether two are the same; the next error is that there is none here."""
    session = tiny_processor.init_video_session()
    session.inference_device = torch.device(asked)
    monkeypatch.setattr(type(tiny_model), "device", torch.device(own))
    with pytest.raises((RuntimeError, AssertionError, ValueError)) as caught:
        session._pixel_values(tiny_model, torch.zeros(3, 97, 161), 0)
    assert ("move one of them" in str(caught.value)) is not fits


def give_then_empty(session, processor, ids):
    processor.add_inputs_to_inference_session(session, 0, [1], [ids == 1])
    processor.add_inputs_to_inference_session(session, 0, [1], [np.zeros(SIZE, bool)])


STEP_MISTAKES = {
    "no tensor": (lambda m, s, f: m(inference_session=s, frame=f.numpy()), "must be a tensor"),
    "no object": (lambda m, s, f: m(inference_session=s, frame=f, frame_idx=0), "No object is known"),
    "no frame": (lambda m, s, f: m(inference_session=s), "no video"),
    "NaN": (lambda m, s, f: m(inference_session=s, frame=broken(f, float("nan")), frame_idx=2), "NaN"),
    "infinite": (lambda m, s, f: m(inference_session=s, frame=broken(f, float("inf")), frame_idx=2), "infinite"),
    "other size": (lambda m, s, f: m(inference_session=s, frame=f[:, :81]), "97x161"),
    "two frames": (lambda m, s, f: m(inference_session=s, frame=torch.stack([f, f])), "one frame"),
    "flat": (lambda m, s, f: m(inference_session=s, frame=f[0]), "one frame"),
    "clips": (lambda m, s, f: m(inference_session=s, frame=f[None, None]), "one frame"),
    "no pixels": (lambda m, s, f: m(inference_session=s, frame=f[:, :0]), "one frame"),
    "one channel": (lambda m, s, f: m(inference_session=s, frame=f[:1]), "one frame"),
    "whole numbers": (
        lambda m, s, f: m(inference_session=s, frame=f.to(torch.uint8)),
        "normalised numbers, got torch.u",
    ),
    "under autocast": (
        lambda m, s, f: under_autocast(m, s, f),
        "computed in torch.float32, this one would be in torch.b",
    ),
    "on another device": (
        lambda m, s, f: copy.deepcopy(m).to("meta")(inference_session=s, frame=f),
        "must lie on cpu",
    ),
    "another model": (
        lambda m, s, f: DeformVosModel(DeformVosConfig(**TINY_CONFIG, num_hidden_layers=2))(
            inference_session=s, frame=f
        ),
        "must have 1 propagation layers, as at the frames before, got 2",
    ),
    "before the first": (
        lambda m, s, f: m(inference_session=s, frame=f, frame_idx=-1),
        "must not be negative, got -1",
    ),
    "between frames": (lambda m, s, f: m(inference_session=s, frame=f, frame_idx=1.5), "whole number, got 1.5"),
    "not 16k+1": (lambda m, s, f: m(inference_session=s, frame=f[:, :-1]), "97x161|16k"),
    "nothing to iterate": (lambda m, s, f: next(m.propagate_in_video_iterator(s)), "no video"),
}


@pytest.mark.parametrize("mistake", STEP_MISTAKES)
def test_mistakes_of_a_step_are_named_and_lose_nothing(mistake, tiny_model, tiny_processor, tiny_clip):
    act, message = STEP_MISTAKES[mistake]
    frames, ids = tiny_clip
    pixel_values = tiny_processor(images=frames[2]).pixel_values[0]
    session = tiny_processor.init_video_session()
    tiny_processor.add_inputs_to_inference_session(session, frame_idx=1, input_masks=ids[1])
    if mistake != "no object":
        stream(tiny_model, tiny_processor, session, frames[1:2])
    with pytest.raises(ValueError, match=message):
        act(tiny_model, session, pixel_values)
    if mistake != "no object":
        assert tiny_model(inference_session=session, frame=pixel_values).frame_idx == 2, "the session goes on"


def test_mistakes_of_propagation(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip

    def propagate(session, **options):
        return list(tiny_model.propagate_in_video_iterator(session, **options))

    with pytest.raises(ValueError, match="No mask"):
        propagate(tiny_processor.init_video_session(video=frames))
    camera = open_session(tiny_processor, iter(frames), ids[0])
    with pytest.raises(ValueError, match="stream"):
        propagate(camera, reverse=True)
    assert len(propagate(camera)) == 6
    with pytest.raises(ValueError, match="has passed"):
        propagate(camera, start_frame_idx=2)
    session = open_session(tiny_processor, frames, ids[0])
    with pytest.raises(ValueError, match="start_frame_idx"):
        propagate(session, start_frame_idx=6)
    with pytest.raises(ValueError, match="max_frame_num_to_track"):
        propagate(session, max_frame_num_to_track=-1)
    session = tiny_processor.init_video_session(video=frames)
    tiny_processor.add_inputs_to_inference_session(session, frame_idx=3, input_masks=ids[3])
    with pytest.raises(ValueError, match="No object is known at frame 1"):
        propagate(session, start_frame_idx=1)
    changing = [frames[0], frames[1], frames[2][:64]]
    with pytest.raises(ValueError, match="one size"):
        propagate(open_session(tiny_processor, changing, ids[0]))


def test_a_session_in_float32_is_so_under_autocast(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    plain, own, surrounding = (
        open_session(tiny_processor, frames, ids[0], dtype=dtype) for dtype in (None, "float32", None)
    )
    expected = torch.cat([output.pred_masks for output in tiny_model.propagate_in_video_iterator(plain)])
    with torch.autocast("cpu", torch.bfloat16):
        masks = torch.cat([output.pred_masks for output in tiny_model.propagate_in_video_iterator(own)])
        lower = torch.cat([output.pred_masks for output in tiny_model.propagate_in_video_iterator(surrounding)])
    assert torch.equal(masks, expected) and not torch.equal(lower, expected)


def test_masks_of_several_frames_at_a_threshold(tiny_model, tiny_processor, tiny_clip):
    """As Sam2Video's users are used to."""
    frames, ids = tiny_clip
    session = open_session(tiny_processor, frames, ids[0])
    size = [session.video_height, session.video_width]
    assert size == list(SIZE)
    outputs = torch.stack([output.pred_masks for output in tiny_model.propagate_in_video_iterator(session)])
    logits = tiny_processor.post_process_masks(outputs, [size] * len(frames), binarize=False)
    for threshold in (-2.0, 0.0, 2.0):
        masks = tiny_processor.post_process_masks(outputs.numpy(), [size] * len(frames), threshold)
        for found, of_frame in zip(masks, logits, strict=True):
            best = of_frame == of_frame.max(0).values
            assert torch.equal(found, best & (of_frame > threshold))
    (nothing,) = tiny_processor.post_process_masks(outputs[0, :0], [size])
    assert nothing.shape == (0, 1, *SIZE) and nothing.dtype == torch.bool
    assert tiny_processor.init_video_session().video_width is None


def test_object_table_keeps_places():
    table = ObjectTable(2)
    for obj_id in (10, -3, 99):
        table.add(obj_id)
    assert [table.place(obj_id) for obj_id in (10, -3, 99)] == [(0, 0), (0, 1), (1, 0)]
    assert table.num_groups == 2
    table.remove(-3)
    table.add(5)
    assert table.place(5) == (0, 1)
    assert table.place(99) == (1, 0), "others keep their places"
    assert table.object_ids == [10, 99, 5]
    assert table.valid(2, torch.device("cpu")).tolist() == [[True, True, True], [True, True, False]]
