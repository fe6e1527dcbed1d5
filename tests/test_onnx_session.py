"""Exported sessions, as PyTorch's, on the graphs' modules: nothing is exported here, as it is in test_export.py."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG
from test_image_processing import LOW
from test_session import (
    WAYS_ON,
    empty_on_a_video,
    give_on_a_frame_that_breaks,
    give_on_the_held_frame,
    go_past_masks_of_a_stream,
)

from hf_deformvos import DeformVosConfig, DeformVosImageProcessor, DeformVosModel, DeformVosProcessor
from hf_deformvos.export import onnx_session
from hf_deformvos.export.graphs import build_graphs
from hf_deformvos.export.onnx_session import GRAPHS, OnnxDeformVos, OnnxDeformVosProcessor, OnnxGraphs


class Modules:
    """The graphs of a model, as modules."""

    def __init__(self, model):
        self.graphs = {graph.name: graph for graph in build_graphs(model)}

    @torch.no_grad()
    def __call__(self, name, inputs):
        outputs = self.graphs[name].module(**{key: torch.from_numpy(array) for key, array in inputs.items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(self.graphs[name].outputs, (output.numpy() for output in outputs), strict=True))


@pytest.fixture
def torch_model():
    """With one object a group, and two layers."""
    torch.manual_seed(0)
    return DeformVosModel(DeformVosConfig(**{**TINY_CONFIG, "max_objects": 1, "num_hidden_layers": 2})).eval()


@pytest.fixture
def onnx_model(torch_model):
    images = DeformVosImageProcessor()
    settings = {"size": {"shortest_edge": 96}, "resample": 2, "rescale_factor": 1 / 255}
    settings |= {"image_mean": images.image_mean, "image_std": images.image_std}
    return OnnxDeformVos(Modules(torch_model), {"config": torch_model.config.to_dict(), "processor": settings})


@pytest.fixture
def both(onnx_model, torch_model, tiny_processor):
    """Models with their processors, exported and not."""
    return (onnx_model, onnx_model.processor), (torch_model, tiny_processor)


def open_session(processor, video, ids):
    session = processor.init_video_session(video=video)
    processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=ids)
    return session


def stream(model, session, frames):
    """Hand frames over one by one; returns the outputs."""
    return [model(session, model.processor(frame).pixel_values[0]) for frame in frames]


def assert_equal(outputs, expected):
    for output, same in zip(outputs, expected, strict=True):
        assert (output.frame_idx, output.object_ids) == (same.frame_idx, same.object_ids)
        np.testing.assert_array_equal(output.pred_masks, same.pred_masks)


@pytest.mark.parametrize("shape", LOW)
def test_low_frames_are_prepared_as_pytorch_does(shape):
    frame = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    reference = DeformVosImageProcessor()
    processor = OnnxDeformVosProcessor(dict(reference.size), 2, 1 / 255, reference.image_mean, reference.image_std)
    for kind in (frame, frame[None], torch.from_numpy(frame), torch.from_numpy(np.moveaxis(frame, -1, 0))):
        inputs, expected = processor(kind), reference(kind, return_tensors="pt")
        assert inputs.original_sizes == [tuple(size) for size in expected.original_sizes]
        if isinstance(kind, np.ndarray):
            assert inputs.original_sizes == [shape[:2]]
        np.testing.assert_allclose(inputs.pixel_values, expected.pixel_values.numpy(), atol=2e-6)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda session: pickle.loads(pickle.dumps(session))])
def test_a_copy_of_a_session_goes_on_by_itself(duplicate, onnx_model, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(onnx_model.processor, None, ids[0])
    stream(onnx_model, session, frames[:3])
    other = duplicate(session)
    keys, _ = other._memory.stacked()
    assert all(np.shares_memory(frame.keys, keys) for frame in other._memory.long_term), "nothing is held twice"
    other.remove_object(1)
    assert stream(onnx_model, other, frames[3:4])[0].object_ids == [2]
    expected = stream(onnx_model, open_session(onnx_model.processor, None, ids[0]), frames)
    assert_equal(stream(onnx_model, session, frames[3:]), expected[3:])


def test_a_session_is_pickled_with_its_video(onnx_model, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(onnx_model.processor, list(frames), ids[0])
    restored = pickle.loads(pickle.dumps(session))
    assert_equal(*map(onnx_model.propagate_in_video_iterator, (restored, session)))


def test_a_snapshot_shares_the_model_and_the_video(onnx_model, tiny_clip):
    frames, ids = tiny_clip

    class Video(list):
        def __deepcopy__(self, memo):
            pytest.fail("the video is copied")

    onnx_model.__deepcopy__ = lambda memo: pytest.fail("the model is copied")
    session = open_session(onnx_model.processor, Video(frames), ids[0])
    steps = onnx_model.propagate_in_video_iterator(session)
    next(steps)
    snapshot = copy.deepcopy(session)
    expected = list(steps)
    assert_equal([onnx_model(snapshot) for _ in expected], expected)


@pytest.mark.parametrize("part", ["encode", "read", "write", "output"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_step_that_fails_halfway_leaves_the_session_as_it_was(part, reset, onnx_model, monkeypatch, tiny_clip):
    """Also where the frame brings an object, and with it a group."""
    frames, ids = tiny_clip
    processor = onnx_model.processor

    def follow(session):
        processor.add_inputs_to_inference_session(session, 0, obj_ids=[1], input_masks=[ids[0] == 1])
        stream(onnx_model, session, frames[:2])
        processor.add_inputs_to_inference_session(session, 2, obj_ids=[9], input_masks=[ids[2] == 2])
        return session

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    expected = stream(onnx_model, follow(processor.init_video_session()), frames[2:])
    session = follow(processor.init_video_session())
    held = session.num_bytes
    with monkeypatch.context() as patch:
        if part == "output":
            patch.setattr(onnx_session, "OnnxDeformVosOutput", interrupt)
        else:
            patch.setattr(onnx_model.graphs.graphs[part].module, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream(onnx_model, session, frames[2:3])
    assert session.num_bytes == held
    if reset:
        session.reset_tracking_data()
        assert session.num_bytes == 0
        follow(session)
    assert_equal(stream(onnx_model, session, frames[2:]), expected)


def test_a_removal_that_fails_takes_nothing(onnx_model, monkeypatch, tiny_clip):
    frames, ids = tiny_clip
    session = open_session(onnx_model.processor, None, ids[0])
    stream(onnx_model, session, frames[:2])
    with monkeypatch.context() as patch:
        patch.setattr(onnx_model.graphs.graphs["write"].module, "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.remove_object(2)
    assert session.object_ids == [1, 2]
    session.remove_object(2)
    assert session.object_ids == [1] and len(session._memory.previous.masks) == 1


def test_sessions_on_graphs_are_pytorchs(onnx_model, torch_model, tiny_clip):
    """Snapshots of both go on alike."""
    frames, ids = tiny_clip
    processor = DeformVosProcessor(DeformVosImageProcessor(size={"shortest_edge": 96}))
    results = []
    for model, each in ((onnx_model, onnx_model.processor), (torch_model, processor)):
        session = open_session(each, frames, ids[0])
        next(model.propagate_in_video_iterator(session))
        snapshot = copy.deepcopy(session)
        snapshot.remove_object(1)
        outputs = [model(inference_session=taken) for taken in (snapshot, session, snapshot)]
        results.append([(o.frame_idx, o.object_ids, np.tanh(np.asarray(o.pred_masks))) for o in outputs])
    for (*state, masks), (*expected, others) in zip(*results, strict=True):
        assert state == expected
        np.testing.assert_allclose(masks, others, atol=1e-3)


@pytest.mark.parametrize("way", WAYS_ON)
def test_masks_of_the_frame_that_a_stream_holds_are_taken_up_as_in_pytorch(way, both, tiny_clip):
    results = [give_on_the_held_frame(way, *each, *tiny_clip) for each in both]
    for output, expected in zip(*results, strict=True):
        assert (output.frame_idx, output.object_ids) == (expected.frame_idx, [1, 9])
        masks, others = (np.tanh(np.asarray(each.pred_masks)) for each in (output, expected))
        np.testing.assert_allclose(masks, others, atol=1e-3)


@pytest.mark.parametrize(
    "scenario",
    [
        go_past_masks_of_a_stream,
        give_on_a_frame_that_breaks,
        partial(empty_on_a_video, False),
        partial(empty_on_a_video, True),
    ],
)
def test_masks_that_wait_or_are_empty_are_what_they_are_in_pytorch(scenario, both, tiny_clip):
    found, expected = (list(scenario(*each, *tiny_clip)) for each in both)
    assert found == expected


def test_no_id_is_refused(onnx_model, tiny_clip):
    session = onnx_model.processor.init_video_session()
    with pytest.raises(ValueError, match="`obj_ids` is empty: name an object"):
        onnx_model.processor.add_inputs_to_inference_session(session, 0, obj_ids=[], input_masks=tiny_clip[1][0])
    assert session.num_bytes == 0


def test_graphs_are_pickled_by_their_folder(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    shape = onnx.helper.make_tensor_value_info
    inputs, outputs = ([shape(name, onnx.TensorProto.FLOAT, [2])] for name in ("x", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "negative", inputs, outputs)
    opset = [onnx.helper.make_opsetid("", 18)]
    for name in GRAPHS:
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / f"{name}.onnx")
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(OnnxGraphs(".", num_threads=1))
    monkeypatch.chdir(tmp_path.parent)
    np.testing.assert_array_equal(pickle.loads(pickled)("read", {"x": np.float32([1, 2])})["y"], [-1, -2])
