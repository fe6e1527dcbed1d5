"""Exported graphs: sessions on them give what PyTorch's give, at any size, without PyTorch, and mistakes are named."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, STUDENT, TINY_CONFIG
from PIL import Image
from synthetic import write_davis
from test_image_processing import GREYS, NO_FRAMES
from test_session import MISTAKES

from hf_deformvos import DeformVosConfig, DeformVosImageProcessor, DeformVosModel, DeformVosProcessor
from hf_deformvos.benchmark.clock import STAGES
from hf_deformvos.cli import main
from hf_deformvos.export import export_model, exporting
from hf_deformvos.export.graphs import build_graphs, export_program
from hf_deformvos.export.onnx_session import (
    SETTINGS_FILE,
    MemoryBank,
    MemoryFrame,
    OnnxDeformVos,
    OnnxDeformVosProcessor,
    OnnxGraphs,
    resize_bilinear,
    resize_nearest,
)
from hf_deformvos.export.quantization import _prepare_frames, quantize
from hf_deformvos.inference import hash_weights, load_for_inference
from hf_deformvos.inference_session_deformvos import resize_nearest as resize_nearest_torch
from hf_deformvos.video import VideoReader, read_mask


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# The exporter meets its own deprecations; it takes a minute for a graph on a machine that is busy.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

# The most that a probability may differ by.
TOLERANCE = 1e-3
MAX_OBJECTS = 4


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Both formats begin with the same programs, and tracing takes longest: a graph of a model is traced once here."""
    programs = {}

    def export_once(graph):
        weights = sum(float(parameter.double().sum()) for parameter in graph.module.parameters())
        if (graph.name, weights) not in programs:
            programs[graph.name, weights] = export_program(graph)
        return programs[graph.name, weights]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "export_program", export_once)
        yield


def save_tiny(folder, **changes):
    """A small model with random weights, offsets among them: whole-token sampling would hide mistakes."""
    torch.manual_seed(0)
    model = DeformVosModel(DeformVosConfig(**{**TINY_CONFIG, "max_objects": MAX_OBJECTS, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("offset.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    images = DeformVosImageProcessor(size={"shortest_edge": 96}, max_enlargement=1.5)
    DeformVosProcessor(images).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    """Of two layers; the released student has one."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def onnx_dir(tiny_dir, tmp_path_factory):
    return export_model(tiny_dir, tmp_path_factory.mktemp("onnx") / "out")


@pytest.fixture(scope="module")
def torch_dir(tiny_dir, tmp_path_factory):
    return export_model(tiny_dir, tmp_path_factory.mktemp("torch") / "out", format="torch")


@pytest.fixture(scope="module")
def torch_model(torch_dir):
    return load_for_inference(str(torch_dir))[0]


@pytest.fixture
def onnx_model(onnx_dir):
    return OnnxDeformVos.from_pretrained(onnx_dir, num_threads=1)


def moving_clip(num_frames, size, num_objects):
    """Squares that move over noise: frames and the id map of the first."""
    height, width = size
    generator = np.random.default_rng(0)
    frames = np.repeat(generator.integers(60, 120, (1, height, width, 3), dtype=np.uint8), num_frames, axis=0)
    colours = generator.integers(0, 255, (num_objects, 3))
    ids = np.zeros((num_frames, height, width), dtype=np.uint8)
    side = min(height, width) // 5
    for t in range(num_frames):
        for number in range(num_objects):
            top = (number // 4) * (height - side) // 3
            left = (number % 4 * width // 4 + t) % (width - side)
            frames[t, top : top + side, left : left + side] = colours[number]
            ids[t, top : top + side, left : left + side] = number + 1
    return frames, ids


def assert_same(output, expected, id_map=None, expected_map=None, tolerance=TOLERANCE):
    """Equal ids, probabilities within the tolerance, and id maps that differ only where the winner is a toss-up."""
    assert (output.frame_idx, output.object_ids) == (expected.frame_idx, expected.object_ids)
    logits = expected.pred_masks.float().numpy()
    probabilities = 1 / (1 + np.exp(-np.asarray(output.pred_masks)))
    assert np.abs(probabilities - 1 / (1 + np.exp(-logits))).max() <= tolerance
    if id_map is not None:
        candidates = np.concatenate([np.zeros_like(logits[:1]), logits]).squeeze(1)
        candidates = F.interpolate(torch.from_numpy(candidates)[None], size=id_map.shape, mode="bilinear")[0].numpy()
        best, second = -np.partition(-candidates, 1, axis=0)[:2]
        assert not ((id_map != expected_map) & (best - second > 1e-2)).any()


def compare(model, reference, frames, ids, size=None):
    """Stream a clip through an exported model and PyTorch's side by side, comparing every frame."""
    (torch_model, torch_processor), processor = reference, model.processor
    sessions = processor.init_video_session(), torch_processor.init_video_session()
    for each, session in zip((processor, torch_processor), sessions, strict=True):
        each.add_inputs_to_inference_session(session, 0, input_masks=ids[0])
    options = {} if size is None else {"size": size}
    for frame in frames:
        output, expected = (
            network(inference_session=session, frame=each(images=frame, **options).pixel_values[0])
            for network, each, session in zip(
                (model, torch_model), (processor, torch_processor), sessions, strict=True
            )
        )
        maps = (
            each.post_process_id_map(o, frame.shape[:2])
            for each, o in ((processor, output), (torch_processor, expected))
        )
        assert_same(output, expected, *maps)
    return sessions


# The graphs


def test_onnx_files_are_checked_and_dynamic(onnx_dir):
    onnx = pytest.importorskip("onnx")
    shapes = {}
    for name in ("encode", "start", "read", "write"):
        model = onnx.load(onnx_dir / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert [(opset.domain, opset.version >= 16) for opset in model.opset_import] == [("", True)]
        shapes[name] = {
            entry.name: [axis.dim_param or axis.dim_value for axis in entry.type.tensor_type.shape.dim]
            for entry in model.graph.input
        }
    assert not list(onnx_dir.glob("*.data")), "the weights are inside"
    height, width = shapes["encode"]["pixel_values"][2:]
    assert isinstance(height, str) and isinstance(width, str) and height != width
    slots, groups = shapes["read"]["long_term_keys"][1], shapes["read"]["valid"][0]
    assert isinstance(slots, str) and isinstance(groups, str)


@torch.no_grad()
@pytest.mark.parametrize("sides", [(2, 2), (3, 7), (6, 5), (8, 8)])
def test_graphs_take_any_size(sides, onnx_dir, tiny_dir):
    """Even and odd sides, and each number of groups and slots, in onnxruntime against the modules traced."""
    model, _ = load_for_inference(tiny_dir, "cpu")
    for graph in build_graphs(model):
        session = onnxruntime.InferenceSession(onnx_dir / f"{graph.name}.onnx", providers=["CPUExecutionProvider"])
        for groups, slots in ((1, 1), (3, 2)):
            lengths = {"h": sides[0], "w": sides[1], "groups": groups, "slots": slots}
            inputs = {
                name: torch.randn(
                    [
                        axis if isinstance(axis, int) else axis.scale * lengths[axis.symbol] + axis.offset
                        for axis in shape
                    ]
                )
                for name, shape in graph.inputs.items()
            }
            if "valid" in inputs:
                inputs["valid"] = torch.rand(inputs["valid"].shape) > 0.5
            expected = graph.module(**inputs)
            outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
            for output, tensor in zip(outputs, expected if isinstance(expected, tuple) else (expected,), strict=True):
                np.testing.assert_allclose(output, tensor.numpy(), atol=1e-3, rtol=1e-3)


def test_torch_programs_load_by_themselves(torch_dir):
    program = torch.export.load(torch_dir / "encode.pt2")
    for height, width in ((49, 65), (81, 161)):
        with torch.no_grad():
            tokens, stride8, stride4 = program.module()(pixel_values=torch.randn(1, 3, height, width))
        assert tokens.shape[-2:] == (height // 16 + 1, width // 16 + 1)
        assert stride8.shape[-2:] == (height // 8 + 1, width // 8 + 1)
        assert stride4.shape[-2:] == (height // 4 + 1, width // 4 + 1)


# Sessions


@pytest.mark.parametrize(("num_objects", "size"), [(1, (96, 160)), (3, (120, 96)), (12, (112, 144))])
def test_fifty_frames_are_pytorchs(num_objects, size, onnx_model, tiny_dir, one_thread):
    reference = load_for_inference(tiny_dir, "cpu")
    session, _ = compare(onnx_model, reference, *moving_clip(50, size, num_objects))
    assert len(session._memory.long_term) == TINY_CONFIG["long_term_slots"], "the memory filled up from one slot"
    assert session._memory.previous.masks.shape[0] == -(-num_objects // MAX_OBJECTS)


@pytest.mark.parametrize("num_objects", [1, 6])
def test_torch_programs_are_pytorchs(num_objects, torch_model, tiny_dir, one_thread):
    compare(torch_model, load_for_inference(tiny_dir, "cpu"), *moving_clip(12, (96, 128), num_objects))


def test_torch_programs_name_the_size_they_need(torch_model, tiny_clip):
    frames, ids = tiny_clip
    processor = torch_model.processor

    def follow(short_side):
        session = processor.init_video_session(video=frames[:2], short_side=short_side)
        processor.add_inputs_to_inference_session(session, 0, input_masks=ids[0])
        return [output.frame_idx for output in torch_model.propagate_in_video_iterator(session)]

    with pytest.raises(ValueError, match=r"must be at least 33 pixels.*got 17x33.*larger `short_side`.*format onnx"):
        follow(17)
    assert follow(33) == [0, 1]


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_the_released_student(format, tmp_path, one_thread):
    """Fifty frames of the example clip, with more objects than a group holds."""
    model, _ = load_for_inference(str(export_model(STUDENT, tmp_path / "out", format=format)))
    with VideoReader(ROOT / "examples" / "bunny.mp4", max_frames=50 if format == "onnx" else 12) as reader:
        frames = [frame.image for frame in reader]
    ids = read_mask(ROOT / "examples" / "bunny_mask.png", frames[0].shape[:2])
    size = {"shortest_edge": 144, "longest_edge": 1536}
    reference = load_for_inference(str(STUDENT), "cpu")
    compare(model, reference, frames, ids[None], size)
    rows, columns = np.indices(ids.shape)
    tiles = (rows * 3 // ids.shape[0]) * 4 + columns * 4 // ids.shape[1] + 1
    compare(model, reference, frames[:12], tiles[None], size)


@pytest.mark.parametrize("switch", ["do_resize", "do_rescale", "do_normalize"])
def test_a_processor_that_does_less_is_not_exported(switch, tiny_dir, tmp_path, without_graphs):
    shutil.copytree(tiny_dir, tmp_path / "model")
    DeformVosProcessor(DeformVosImageProcessor(**{switch: False})).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"the model's processor has {switch}=False"):
        export_model(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("size", [(96, 128), (60, 72), (200, 70)])
def test_frames_are_prepared_as_pytorch_does(size, onnx_dir, tiny_dir):
    """Small ones are enlarged as far as the release allows."""
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for same in (frame, frame / 255 * 1.2 - 0.1):  # floats beyond 0..1, as resampling makes them
        exported = OnnxDeformVos.from_pretrained(onnx_dir).processor(same).pixel_values
        expected = DeformVosImageProcessor.from_pretrained(tiny_dir)(same).pixel_values
        assert min(exported.shape[-2:]) == 97
        np.testing.assert_allclose(exported, expected.numpy(), atol=1e-5)


def changes(model, processor, frames, ids):
    """Outputs of a stream in which objects join, are corrected, leave and return."""
    session = processor.init_video_session()

    def step(index):
        return model(inference_session=session, frame=processor(images=frames[index]).pixel_values[0])

    def give(index, **masks):
        processor.add_inputs_to_inference_session(session, index, **masks)

    give(0, obj_ids=[70000], input_masks=[ids[0] == 1])
    yield step(0)
    yield step(1)
    give(2, obj_ids=[-5, 8, 9, 10], input_masks=[ids[2] == number for number in (2, 3, 4, 5)])  # a second group
    yield step(2)
    yield step(3)
    give(4, obj_ids=[8, 70000], input_masks=[ids[4] == 3, np.zeros_like(ids[0], dtype=bool)])
    dots = np.zeros((2, 1080, 1920), dtype=bool)
    dots[0, 500, 6], dots[1, 700:702, 803] = True, True  # between the network's pixels, as nearest neighbours go
    give(4, obj_ids=[20, 21], input_masks=dots)
    yield step(4)
    session.remove_object(20)
    session.remove_object(21)
    session.remove_object(10)  # and with it the second group
    yield step(5)
    session.remove_object(-5)
    give(6, obj_ids=[11, 12, 13], input_masks=[ids[6] == number for number in (1, 2, 6)])
    yield step(6)
    yield step(7)
    for obj_id in list(session.object_ids):
        session.remove_object(obj_id)
    give(8, obj_ids=[1], input_masks=[np.kron(ids[8] == 2, np.ones((2, 2), bool))])
    yield step(8)
    yield step(9)


def test_objects_come_and_go(onnx_model, tiny_dir, one_thread):
    clip = moving_clip(10, (96, 160), 6)
    torch_model, torch_processor = load_for_inference(tiny_dir, "cpu")
    outputs = changes(onnx_model, onnx_model.processor, *clip)
    for output, expected in zip(outputs, changes(torch_model, torch_processor, *clip), strict=True):
        assert_same(output, expected)


def edges(model, processor, frames, ids):
    """What a session refuses, and where a propagation ends, as text."""
    session = processor.init_video_session()

    def step(index):
        return model(inference_session=session, frame=processor(images=frames[index]).pixel_values[0]).object_ids

    def refused(act, *arguments):
        with pytest.raises(ValueError, match=r"Nothing is left|has passed|would be lost|ended before") as caught:
            act(*arguments)
        return str(caught.value)

    for obj_id in (4, 5):
        processor.add_inputs_to_inference_session(session, 0, obj_ids=[obj_id], input_masks=[ids[0] == 1])
    yield refused(step, 0)
    session.remove_object(4)
    yield step(0), step(1), step(2)
    yield refused(processor.add_inputs_to_inference_session, session, 1, [9], [ids[1] == 1])
    for kind in (list, iter):
        session = processor.init_video_session(video=kind(frames))
        for frame_idx, obj_id in ((0, 1), (4, 2)):
            mask = ids[frame_idx] == obj_id
            processor.add_inputs_to_inference_session(session, frame_idx, obj_ids=[obj_id], input_masks=[mask])
        for start in (None, 4):
            yield session.count_frames(start, None, False), session.count_frames(start, 1, True)
        for output in model.propagate_in_video_iterator(session):
            yield output.frame_idx, output.object_ids
            if output.frame_idx in (1, 4):
                session.remove_object(1 if output.frame_idx == 1 else 2)
    session = processor.init_video_session()
    processor.add_inputs_to_inference_session(session, 2, obj_ids=[1], input_masks=[ids[2] == 1])
    pixel_values = processor(images=frames[3]).pixel_values[0]
    yield refused(lambda: model(inference_session=session, frame=pixel_values, frame_idx=3))
    short = processor.init_video_session(video=iter(frames[:2]))
    processor.add_inputs_to_inference_session(short, 3, obj_ids=np.array(1), input_masks=[ids[3] == 1])
    yield refused(lambda: list(model.propagate_in_video_iterator(short)))
    camera = processor.init_video_session(video=iter(frames))
    processor.add_inputs_to_inference_session(camera, 0, obj_ids=[1], input_masks=[ids[0] == 1])
    yield refused(lambda: list(model.propagate_in_video_iterator(camera, start_frame_idx=3)))


def test_edges_of_a_session_are_pytorchs(onnx_model, tiny_dir, one_thread):
    clip = moving_clip(7, (96, 160), 2)
    expected = list(edges(*load_for_inference(tiny_dir, "cpu"), *clip))
    assert list(edges(onnx_model, onnx_model.processor, *clip)) == expected
    assert [event[0] for event in expected[5:8]] == [0, 1, 4], "nothing is left to follow at frames 2, 3 and 5"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reverse": True, "start_frame_idx": 4},
        {"start_frame_idx": 3, "max_frame_num_to_track": 2},
        {"max_frame_num_to_track": 0},
    ],
)
def test_a_whole_video_is_pytorchs(options, onnx_model, tiny_dir, one_thread):
    frames, ids = moving_clip(6, (96, 160), 3)
    torch_model, torch_processor = load_for_inference(tiny_dir, "cpu")
    results = []
    for model, processor in ((onnx_model, onnx_model.processor), (torch_model, torch_processor)):
        session = processor.init_video_session(video=frames, short_side=64, memory_interval=1, long_term_slots=2)
        processor.add_inputs_to_inference_session(session, 1, obj_ids=[1, 2], input_masks=[ids[1] == 1, ids[1] == 2])
        processor.add_inputs_to_inference_session(session, 4, obj_ids=[2, 3], input_masks=[ids[4] == 2, ids[4] == 3])
        results.append(list(model.propagate_in_video_iterator(session, **options)))
    assert len(results[0]) == len(results[1]) > 0
    for output, expected in zip(*results, strict=True):
        assert_same(output, expected)


@pytest.mark.parametrize("kind", ["list", "pil", "iterator", "streaming"])
def test_every_source_of_frames_gives_the_same_masks(kind, onnx_model, tiny_clip):
    frames, ids = tiny_clip
    processor = onnx_model.processor

    def follow(video):
        session = processor.init_video_session(video=video)
        processor.add_inputs_to_inference_session(session, 0, input_masks=ids[0])
        if video is not None:
            return list(onnx_model.propagate_in_video_iterator(session))
        return [onnx_model(session, processor(frame).pixel_values[0]) for frame in frames]

    sources = {
        "list": list(frames),
        "pil": [Image.fromarray(frame) for frame in frames],
        "iterator": iter(frames),
        "streaming": None,
    }
    for output, expected in zip(follow(sources[kind]), follow(frames), strict=True):
        assert output.frame_idx == expected.frame_idx
        np.testing.assert_array_equal(output.pred_masks, expected.pred_masks)


def test_nothing_grows_with_the_length_of_the_video(onnx_model):
    frames, ids = moving_clip(1, (48, 48), 5)
    processor = onnx_model.processor
    session = processor.init_video_session()
    processor.add_inputs_to_inference_session(session, 0, input_masks=ids[0])
    pixel_values = processor(frames[0]).pixel_values[0]
    sizes = []
    for _ in range(200):
        onnx_model(session, pixel_values)
        sizes.append(session.num_bytes)
    assert max(sizes) == max(sizes[:20])
    assert not session._inputs


def test_the_memory_is_stacked_once():
    """Frames of the long-term memory look into the stack, which is made again only when the memory changes."""
    bank = MemoryBank(2)
    for index in range(4):
        array = np.full((1, 3, 2, 2), index, dtype=np.float32)
        bank.write(MemoryFrame(index, array, array, None, array, False), to_long_term=index != 3)
        keys, _ = bank.stacked()
    assert bank.stacked()[0] is keys
    assert [frame.frame_idx for frame in bank.long_term] == [1, 2]
    assert all(np.shares_memory(frame.keys, keys) for frame in bank.long_term)


# Frames and masks


def test_frames_are_prepared_as_the_processor_does():
    generator = np.random.default_rng(0)
    reference = DeformVosImageProcessor(size={"shortest_edge": 40, "longest_edge": 100})
    processor = OnnxDeformVosProcessor(
        {"shortest_edge": 40, "longest_edge": 100}, 2, 1 / 255, reference.image_mean, reference.image_std
    )
    frame = generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    alpha = np.concatenate([frame, frame[..., :1]], axis=-1)
    kinds = [frame, Image.fromarray(frame), Image.fromarray(frame[..., 0]), frame[:30], np.moveaxis(frame, -1, 0)]
    kinds += [(frame / 255).astype(np.float32), frame.astype(np.int64), alpha, Image.fromarray(alpha), frame[:, :9]]
    kinds += [make(frame[..., 0]) for make in GREYS.values()]
    kinds += [torch.from_numpy(frame).bfloat16().requires_grad_(), [[frame], frame[None]], [frame[..., 0], frame]]
    for kind in kinds:
        inputs, expected = processor(kind), reference(kind, return_tensors="pt")
        np.testing.assert_allclose(inputs.pixel_values, expected.pixel_values.numpy(), atol=2e-6)
        assert inputs.pixel_values.dtype == np.float32 and inputs.pixel_values.flags.c_contiguous
        assert inputs.original_sizes == [tuple(size) for size in expected.original_sizes]
    assert processor([frame, frame]).pixel_values.shape == (2, 3, 33, 49)
    assert isinstance(processor([frame, frame[:30]]).pixel_values, list)
    assert processor(frame, size={"shortest_edge": 17}).pixel_values.shape[-2:] == (17, 17)
    assert processor(iter([frame, frame])).pixel_values.shape == (2, 3, 33, 49)


@pytest.mark.parametrize("kind", NO_FRAMES)
def test_frames_are_prepared_or_refused_as_the_processor_does(kind):
    reference = DeformVosImageProcessor()
    processor = OnnxDeformVosProcessor({"shortest_edge": 480}, 2, 1 / 255, [0.5] * 3, [0.5] * 3)
    make, message = NO_FRAMES[kind]
    frame = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=message) as expected:
        reference(make(frame))
    with pytest.raises(ValueError, match=message) as caught:
        processor(make(frame))
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("where", ["init", "call"])
@pytest.mark.parametrize(("name", "side"), [("shortest_edge", -5), ("shortest_edge", 0), ("longest_edge", 0.5)])
def test_frames_are_prepared_for_sizes_that_are_lengths(where, name, side):
    def prepare(size, override=None):
        processor = OnnxDeformVosProcessor(size, 2, 1 / 255, [0.5] * 3, [0.5] * 3)
        return processor(np.zeros((50, 70, 3), dtype=np.uint8), size=override)

    size = {"shortest_edge": 40, "longest_edge": None}
    assert prepare(size).pixel_values.shape == prepare(size, size).pixel_values.shape == (1, 3, 33, 49)
    broken = {**size, name: side}
    with pytest.raises(ValueError, match=rf'`size\["{name}"\]` must be a positive integer, .* got {side}'):
        prepare(broken) if where == "init" else prepare(size, broken)


@pytest.mark.parametrize(
    "sizes", [((31, 44), (97, 161)), ((97, 161), (96, 160)), ((97, 161), (31, 44)), ((1, 9), (3, 9))]
)
def test_resampling_is_pytorchs(sizes):
    source, target = sizes
    values = np.random.default_rng(0).normal(size=source).astype(np.float32)
    for align_corners in (True, False):
        expected = F.interpolate(
            torch.from_numpy(values)[None, None], target, mode="bilinear", align_corners=align_corners
        )
        np.testing.assert_allclose(resize_bilinear(values, target, align_corners), expected[0, 0], atol=1e-4)
    expected = resize_nearest_torch(torch.from_numpy(values > 0), target)
    np.testing.assert_array_equal(resize_nearest(values > 0, target), expected.numpy())


def test_masks_never_overlap(onnx_model, tiny_clip):
    frames, ids = tiny_clip
    processor = onnx_model.processor
    session = processor.init_video_session(video=frames)
    processor.add_inputs_to_inference_session(session, 0, input_masks=ids[0] * 7)
    output = list(onnx_model.propagate_in_video_iterator(session))[2]
    (masks,) = processor.post_process_masks([output.pred_masks], [(96, 160)])
    assert masks.shape == (2, 1, 96, 160) and masks.dtype == bool
    assert (masks.sum(0) <= 1).all()
    id_map = processor.post_process_id_map(output, (96, 160))
    np.testing.assert_array_equal(id_map == 14, masks[1, 0])
    (logits,) = processor.post_process_masks(output.pred_masks, [(96, 160)], binarize=False)
    assert logits.shape == masks.shape and logits.dtype == np.float32
    (fewer,) = processor.post_process_masks(output.pred_masks, [[session.video_height, session.video_width]], 1.0)
    np.testing.assert_array_equal(fewer, masks & (logits > 1.0))
    assert [len(part) for part in processor.post_process_masks(output.pred_masks[None, :0], [(96, 160)])] == [0]


# Of another API: dtypes and devices are PyTorch's, and how to decode a file is said in other words.
OF_PYTORCH = {"no such dtype", "no such device", "path as video"}


@pytest.mark.parametrize("mistake", sorted(set(MISTAKES) - OF_PYTORCH))
def test_mistakes_are_named_as_in_pytorch(mistake, tiny_clip):
    act, message = MISTAKES[mistake]
    processor = OnnxDeformVosProcessor({"shortest_edge": 96}, 2, 1 / 255, [0.5] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match=message):
        act(processor.init_video_session(), processor, *[part[0] for part in tiny_clip])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m, s, f: m(s, frame=list(f)), "must be an array"),
        (lambda m, s, f: m(s), "no video"),
        (lambda m, s, f: m(s, frame=np.where(f > 1, np.nan, f), frame_idx=2), "NaN"),
        (lambda m, s, f: m(s, frame=f[:, :81]), "97x161"),
        (lambda m, s, f: m(s, frame=np.stack([f, f])), "one frame"),
        (lambda m, s, f: m(s, frame=f[0]), "one frame"),
        (lambda m, s, f: m(s, frame=f[:, :0]), "one frame"),
        (lambda m, s, f: m(s, frame=f, frame_idx=-1), "must not be negative, got -1"),
        (lambda m, s, f: m(s, frame=f, frame_idx=1.5), "whole number, got 1.5"),
        (lambda m, s, f: next(m.propagate_in_video_iterator(s)), "no video"),
        (lambda m, s, f: m(m.processor.init_video_session(), f), "No object is known"),
    ],
)
def test_mistakes_of_a_step_lose_nothing(act, message, onnx_model, tiny_clip):
    frames, ids = tiny_clip
    processor = onnx_model.processor
    session = processor.init_video_session()
    processor.add_inputs_to_inference_session(session, 1, input_masks=ids[1])
    first, second = (processor(frame).pixel_values[0] for frame in frames[1:3])
    onnx_model(session, first)
    with pytest.raises(ValueError, match=message):
        act(onnx_model, session, second)
    assert onnx_model(session, second).frame_idx == 2, "the session goes on"


# In int8


@pytest.fixture(scope="module")
def int8_dir(onnx_dir, tmp_path_factory):
    """The float export, quantised on pictures of squares, and what was done."""
    folder = tmp_path_factory.mktemp("int8")
    (folder / "frames").mkdir()
    for index, frame in enumerate(moving_clip(4, (96, 160), 3)[0]):
        Image.fromarray(frame).save(folder / "frames" / f"{index:05d}.png")
    out = shutil.copytree(onnx_dir, folder / "out")
    return out, quantize(out, folder / "frames")


def test_int8_leaves_out_what_it_hurts(int8_dir, onnx_dir):
    onnx = pytest.importorskip("onnx")
    out, report = int8_dir
    assert report["num_convolutions"] == 53
    assert len(report["float_convolutions"]) < 53
    assert max(report["errors"]) < 0.25
    assert (out / "encode.onnx").stat().st_size < 0.5 * (onnx_dir / "encode.onnx").stat().st_size
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in onnx_dir.iterdir())
    graph = onnx.load(out / "encode.onnx").graph
    producers = {name: node.op_type for node in graph.node for name in node.output}
    in_float = {n.name for n in graph.node if n.op_type == "Conv" and producers.get(n.input[1]) != "DequantizeLinear"}
    assert in_float == set(report["float_convolutions"])


def test_int8_follows_as_float_does(int8_dir, onnx_model, one_thread):
    frames, ids = moving_clip(6, (96, 160), 3)
    results = []
    for model in (OnnxDeformVos.from_pretrained(int8_dir[0]), onnx_model):
        session = model.processor.init_video_session(video=frames)
        model.processor.add_inputs_to_inference_session(session, 0, input_masks=ids[0])
        outputs = list(model.propagate_in_video_iterator(session))
        results.append(np.stack([1 / (1 + np.exp(-output.pred_masks)) for output in outputs]))
    assert np.abs(results[0] - results[1]).mean() < 0.05
    assert not np.array_equal(*results)


def test_calibration_holds_the_frames_it_takes(onnx_dir, tmp_path):
    """Of a long video no more than of a short one; its frames here are grey, each brighter than the last."""
    for index in range(60):
        Image.new("RGB", (800, 480), (4 * index,) * 3).save(tmp_path / f"{index}.png", compress_level=1)
    tracemalloc.start()
    inputs = _prepare_frames(onnx_dir, str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    processor = OnnxDeformVosProcessor.from_pretrained(onnx_dir)
    greys = [processor(np.full((480, 800, 3), 4 * index, np.uint8)).pixel_values for index in range(60)]
    picked = [next(i for i, grey in enumerate(greys) if np.array_equal(grey, each["pixel_values"])) for each in inputs]
    assert picked == [0, 5, 11, 16, 21, 27, 32, 38, 43, 48, 54, 59]
    assert peak < 20 * 480 * 800 * 3, "of 60 frames"


# Without PyTorch


_PROGRAM = """\
import sys
{block}
sys.path.insert(0, {folder!r})
import numpy as np
from deformvos_onnx import OnnxDeformVos

model = OnnxDeformVos.from_pretrained({folder!r}, num_threads=1)
data = np.load({clip!r})
session = model.processor.init_video_session(video=data["frames"])
model.processor.add_inputs_to_inference_session(session, 0, input_masks=data["ids"])
masks = [model.processor.post_process_id_map(o, (96, 160)) for o in model.propagate_in_video_iterator(session)]
assert "torch" not in sys.modules or sys.modules["torch"] is None
np.save({result!r}, np.stack(masks))
"""


def run_alone(python, block, folder, tmp_path, onnx_model, tiny_clip):
    """Run the exported folder by another interpreter, and compare its masks with ours."""
    frames, ids = tiny_clip
    np.savez(tmp_path / "clip.npz", frames=frames, ids=ids[0])
    names = {"folder": str(folder), "clip": str(tmp_path / "clip.npz"), "result": str(tmp_path / "masks.npy")}
    program = _PROGRAM.format(block=block, **names)
    # Elsewhere, so that only what lies in the folder is found.
    result = subprocess.run(
        [str(python), "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env={"PATH": os.environ["PATH"]},
    )
    assert result.returncode == 0, result.stderr
    session = onnx_model.processor.init_video_session(video=frames)
    onnx_model.processor.add_inputs_to_inference_session(session, 0, input_masks=ids[0])
    outputs = onnx_model.propagate_in_video_iterator(session)
    expected = np.stack([onnx_model.processor.post_process_id_map(output, (96, 160)) for output in outputs])
    assert (np.load(tmp_path / "masks.npy") == expected).mean() > 0.9999


def test_runs_where_pytorch_is_missing(onnx_dir, onnx_model, tmp_path, tiny_clip):
    blocked = [
        "torch",
        "transformers",
        "hf_deformvos",
        "huggingface_hub",
        "safetensors",
        "tqdm",
        "scipy",
        "onnx",
        "av",
    ]
    block = f"sys.modules.update(dict.fromkeys({blocked!r}))"
    run_alone(sys.executable, block, onnx_dir, tmp_path, onnx_model, tiny_clip)


@pytest.mark.slow
def test_runs_in_an_environment_of_its_own(onnx_dir, onnx_model, tmp_path, tiny_clip):
    """NumPy, Pillow, PyAV and onnxruntime in a fresh environment, where a package index can be reached."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = [str(python), "-m", "pip", "install", "-q", "--retries", "0", "numpy", "pillow", "av", "onnxruntime"]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=240)
    if installed.returncode != 0:
        pytest.skip(f"no package index: {installed.stderr.strip().splitlines()[-1]}")
    run_alone(python, "import av", onnx_dir, tmp_path, onnx_model, tiny_clip)


# In the package


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_segment_takes_an_exported_folder(format, request, tiny_clip, tiny_dir, tmp_path):
    frames, ids = tiny_clip
    (tmp_path / "video").mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "video" / f"{index:05d}.png")
    Image.fromarray(ids[0]).save(tmp_path / "mask.png")
    masks = {}
    for name in (str(request.getfixturevalue(f"{format}_dir")), tiny_dir):
        arguments = [str(tmp_path / "video"), "--mask", str(tmp_path / "mask.png"), "--model", name, "--quiet"]
        assert main(["segment", *arguments, "--output", str(tmp_path / "out"), "--overwrite", "--device", "cpu"]) == 0
        masks[name] = np.stack([np.asarray(Image.open(file)) for file in sorted((tmp_path / "out/masks").glob("*"))])
        assert json.loads((tmp_path / "out/results.json").read_text())["model"]["sha256"] == hash_weights(name)
    one, other = masks.values()
    assert (one == other).mean() > 0.9999


def test_evaluate_takes_an_exported_folder(onnx_dir, tiny_dir, tmp_path, capsys):
    root = write_davis(tmp_path / "davis", frames=4)
    for name in ("ant", "bee"):
        (root / "ImageSets/2016").mkdir(parents=True, exist_ok=True)
        with open(root / "ImageSets/2016/val.txt", "a") as file:
            file.write(f"{name}\n")
    scores = []
    for model in (str(onnx_dir), tiny_dir):
        arguments = ["--dataset", "davis2016", "--root", str(root), "--split", "val", "--device", "cpu"]
        assert main(["evaluate", "--model", model, *arguments, "--json", str(tmp_path / "run.json")]) == 0
        total = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all 2 sequences"))
        scores.append([float(number) for number in total.split()[5:12]])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_benchmark_takes_an_exported_folder(onnx_dir, tiny_dir, tmp_path, capsys):
    def run(folder, *arguments):
        return main(["benchmark", "--model", str(folder), "--device", "cpu", "--threads", "1", *map(str, arguments)])

    path = tmp_path / "benchmark.json"
    options = ["--backend", "onnx", "--sizes", "96x160", "--frames", 2, "--memory-frames", 3, "--json", path]
    assert run(onnx_dir, *options) == 0
    report = json.loads(path.read_text())
    (case,) = report["cases"]
    # The graph that reads the memory decodes as well.
    assert list(case["stages"]) == [stage for stage in STAGES if stage != "decoder"]
    assert (report["backend"], report["hardware"]["dtype"]) == ("onnx", "float32")
    assert "rates" not in report and report["start"]["total_s"] > 0 and case["memory"]["frames"] == 3
    capsys.readouterr()
    assert run(onnx_dir, "--backend", "onnx", "--dtype", "int8") == 2
    assert "was exported in float32, got --dtype 'int8'" in capsys.readouterr().err
    for folder, backend in ((onnx_dir, "torch"), (tiny_dir, "onnx")):
        assert run(folder, "--backend", backend) == 2
        assert f"The backend '{backend}' does not run" in capsys.readouterr().err


def test_loading_names_mistakes(onnx_dir, torch_dir, tiny_dir, tmp_path):
    with pytest.raises(ValueError, match=r"dtype.*bfloat16"):
        load_for_inference(str(onnx_dir), dtype="bfloat16")
    with pytest.raises(ValueError, match="use_offsets"):
        load_for_inference(str(onnx_dir), overrides={"use_offsets": False})
    with pytest.raises(ValueError, match="torch format"):
        OnnxDeformVos.from_pretrained(torch_dir)
    with pytest.raises(ValueError, match="deformvos export"):
        OnnxDeformVos.from_pretrained(tmp_path)
    model, processor = load_for_inference(str(onnx_dir), overrides={"memory_interval": 5})
    assert model.config["memory_interval"] == 5
    with pytest.raises(ValueError, match="float32"):
        processor.init_video_session(dtype="bfloat16")
    assert hash_weights(str(onnx_dir)) not in (None, hash_weights(str(torch_dir)))


DAMAGE = {
    "{graph} missing": lambda path: path.unlink(),
    "{graph} cut": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "{graph} empty": lambda path: path.write_bytes(b""),
    f"{SETTINGS_FILE} empty": lambda path: path.write_text("{}"),
    f"{SETTINGS_FILE} cut": lambda path: path.write_text("{"),
    f"{SETTINGS_FILE} list": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("format", "graph"), [("onnx", "read.onnx"), ("torch", "encode.pt2")])
def test_damaged_files_are_named(damage, format, graph, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(f"{format}_dir"), tmp_path / "out")
    file = damage.format(graph=graph).split()[0]
    DAMAGE[damage](folder / file)
    with pytest.raises(ValueError, match=r"cannot be read \(.+\); export it again") as caught:
        load_for_inference(str(folder))
    assert str(caught.value).startswith(f"{file} of the exported model {folder} cannot")


def test_a_missing_onnxruntime_is_no_damage(onnx_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs onnxruntime: `pip install onnxruntime`\.$"):
        load_for_inference(str(onnx_dir))


# The command


def test_the_command_names_mistakes(onnx_dir, tiny_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    out = str(tmp_path / "out")
    for arguments, message in (
        ([tiny_dir, out, "--format", "torch", "--dtype", "int8"], "int8"),
        ([tiny_dir, out, "--calibration", "clip.mp4"], "int8"),
        ([tiny_dir, out, "--dtype", "int8", "--calibration", str(tmp_path / "file")], "file"),
        ([tiny_dir, str(onnx_dir)], "overwrite"),
        ([tiny_dir, str(tmp_path / "file")], "is a file"),
        ([tiny_dir, str(tmp_path / "full"), "--overwrite"], "no export"),
        ([str(onnx_dir), out], "exported model itself"),
        ([str(tmp_path / "none"), out], "none"),
        ([str(tmp_path / "none"), f"{tmp_path}/file/out"], f"be written to, got {tmp_path}/file/out ("),
    ):
        assert main(["export", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error, error
        assert not os.path.exists(out)
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_the_target_is_no_folder_that_one_is_in(tiny_dir, onnx_dir, tmp_path, monkeypatch):
    export = shutil.copytree(onnx_dir, tmp_path / "export")
    for folder, target in ((tmp_path / "empty", "."), (export / "sub", "..")):
        folder.mkdir()
        monkeypatch.chdir(folder)
        with pytest.raises(ValueError, match=rf"{(folder / target).resolve()} holds the current folder; name"):
            export_model(tiny_dir, target, overwrite=True)
        assert folder.is_dir()


@pytest.fixture
def without_graphs(monkeypatch):
    """Exports at once, of empty files."""
    monkeypatch.setattr(
        exporting, "write_graph", lambda graph, folder, format: (folder / f"{graph.name}.onnx").touch()
    )


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_only_an_export_is_replaced(format, request, tiny_dir, tmp_path):
    out = shutil.copytree(request.getfixturevalue(f"{format}_dir"), tmp_path / "out")
    request.getfixturevalue("without_graphs")
    (out / "__pycache__").mkdir(exist_ok=True)
    (out / "results").mkdir()
    (out / "mine.txt").write_text("mine")
    before = sorted(out.iterdir())
    with pytest.raises(ValueError, match=rf"{out} holds files that are no export \(mine.txt, results\); move them"):
        export_model(tiny_dir, out, overwrite=True)
    assert sorted(out.iterdir()) == before
    (out / "results").rmdir()
    (out / "mine.txt").unlink()
    export_model(tiny_dir, out, overwrite=True)
    assert (out / "encode.onnx").stat().st_size == 0 and not (out / "__pycache__").exists()


def test_a_link_to_a_folder_stays_one(tiny_dir, tmp_path, without_graphs):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    out = export_model(tiny_dir, tmp_path / "link")
    assert out == tmp_path / "link" and out.is_symlink()
    assert (tmp_path / "empty" / "deformvos_onnx.py").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


def test_missing_packages_are_named(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"needs onnxscript: `pip install onnxscript`"):
        export_model(tiny_dir, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnxruntime"):
        OnnxGraphs(tmp_path)


def test_the_module_written_is_the_packages(onnx_dir):
    """The copy is whole, and the README beside it fits it."""
    source = (ROOT / "hf_deformvos/export/onnx_session.py").read_bytes()
    assert (onnx_dir / "deformvos_onnx.py").read_bytes() == source
    spec = importlib.util.spec_from_file_location("deformvos_onnx", onnx_dir / "deformvos_onnx.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["deformvos_onnx"] = module
    spec.loader.exec_module(module)
    readme = (onnx_dir / "README.md").read_text()
    code = readme.split("```python")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert "OnnxDeformVos.from_pretrained" in code and hasattr(module, "OnnxDeformVos")
    del sys.modules["deformvos_onnx"]
    settings = json.loads((onnx_dir / SETTINGS_FILE).read_text())
    assert (settings["format"], settings["dtype"]) == ("onnx", "float32")


def test_an_export_is_replaced_whole(onnx_dir, tiny_dir, tmp_path, monkeypatch):
    """A failure leaves the export that was there."""
    out = tmp_path / "out"
    shutil.copytree(onnx_dir, out)
    monkeypatch.setattr("hf_deformvos.export.exporting.write_graph", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model(tiny_dir, out, overwrite=True)
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in onnx_dir.iterdir())
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
