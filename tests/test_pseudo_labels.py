"""Self-supervision: proposals from features, and labels of plain videos."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from synthetic import draw_scene, save_palette

from hf_deformvos import DeformVosImageProcessor, DeformVosProcessor
from hf_deformvos.data import ClipSampler, ClipSpec
from hf_deformvos.training.proposals import (
    choose_foreground,
    connected_component,
    cut_to_mask,
    normalised_cut,
    propose_masks,
    token_affinity,
)
from hf_deformvos.training.pseudo_labels import (
    DiskClip,
    find_videos,
    follow_objects,
    hash_model,
    label_videos,
    propose_in_frame,
    propose_objects,
)
from hf_deformvos.video import H264Writer


SIZE = (96, 160)


def iou(first, second) -> float:
    return (first & second).sum() / max(1, (first | second).sum())


# ---- Proposals ------------------------------------------------------------------------------------------------------


def test_cut_solves_the_generalised_eigenproblem():
    features = torch.randn(30, 8, dtype=torch.float64)
    affinity = token_affinity(features, 0.1)
    assert torch.equal(affinity, affinity.T)
    assert set(affinity.unique().tolist()) == {1e-5, 1.0}
    cut = normalised_cut(affinity)
    degree = affinity.sum(1).diag()
    value = (cut @ (degree - affinity) @ cut) / (cut @ degree @ cut)
    assert torch.allclose((degree - affinity) @ cut, value * degree @ cut, atol=1e-9)
    # NumPy's own solution of D^-1 (D - W), which is not symmetric, has the same second eigenvalue.
    others = np.sort(np.linalg.eigvals(np.linalg.inv(degree.numpy()) @ (degree - affinity).numpy()).real)
    assert float(value) == pytest.approx(others[1], abs=1e-9)


def test_foreground_is_the_side_of_the_extreme_entry_but_for_three_corners():
    cut = torch.zeros(5, 6, dtype=torch.float64) - 0.1
    cut[2, 2:4] = -1.0
    for sign in (1, -1):
        assert choose_foreground(sign * cut)[2, 2] == 1.0
    # The frame's border as one side: it has the extreme entry, and the corners.
    ring = torch.full((5, 6), -1.0, dtype=torch.float64)
    ring[1:4, 1:5] = 0.5
    assert choose_foreground(ring)[2, 2] == 0.5
    assert choose_foreground(-ring)[2, 2] == 0.5


def test_connected_component_against_flood_fill():
    mask = np.random.default_rng(0).random((40, 50)) < 0.62
    seed = tuple(int(axis[0]) for axis in np.nonzero(mask))
    expected, stack = np.zeros_like(mask), [seed]
    while stack:
        row, column = stack.pop()
        if 0 <= row < 40 and 0 <= column < 50 and mask[row, column] and not expected[row, column]:
            expected[row, column] = True
            stack += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    assert 1 < expected.sum() < mask.sum()
    assert np.array_equal(connected_component(mask, seed), expected)
    outside = tuple(int(axis[0]) for axis in np.nonzero(~mask))
    assert not connected_component(mask, outside).any()


def test_mask_lies_on_its_tokens():
    cut = torch.zeros(6, 8, dtype=torch.float64)
    cut[2:4, 3:6] = 1.0
    mask = cut_to_mask(cut, (81, 113))
    rows, columns = np.nonzero(mask)
    # Tokens 2-3 and 3-5 lie on pixels 32-48 and 48-80; the edge is half-way to the next token.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (25, 55, 41, 87)
    assert iou(cut_to_mask(cut, (162, 226))[::2, ::2], mask) > 0.9
    cut[0, 0] = 0.99
    again = cut_to_mask(cut, (81, 113))
    assert not again[:20].any(), "only the part of the greatest entry counts"
    assert iou(again, mask) > 0.9


def token_scene() -> torch.Tensor:
    """Three kinds of tokens on an 8x12 grid: background, an object of 3x3 and one of 2x2."""
    kinds = torch.zeros(8, 12, dtype=torch.long)
    kinds[1:4, 2:5], kinds[5:7, 8:10] = 1, 2
    vectors = torch.eye(3)[:, :, None, None][kinds.flatten()].reshape(8, 12, 3).permute(2, 0, 1)
    return vectors + 0.05 * torch.randn(3, 8, 12)


def test_proposals_find_one_object_after_the_other():
    proposals = propose_masks(token_scene(), (113, 177), max_proposals=2)
    assert len(proposals) == 2
    assert not (proposals[0].mask & proposals[1].mask).any()
    centres = sorted(tuple(int(axis.mean()) for axis in np.nonzero(item.mask)) for item in proposals)
    assert np.abs(np.subtract(centres, [(32, 48), (88, 136)])).max() <= 1
    for item in proposals:
        assert item.area == item.mask.mean()
        assert 0.5 < item.confidence < 1.5
    assert len(propose_masks(token_scene(), (113, 177))) == 1
    assert len(propose_masks(token_scene(), (113, 177), max_proposals=9)) <= 9


def test_nothing_is_proposed_where_nothing_stands_out():
    assert propose_masks(torch.ones(4, 8, 12), (113, 177)) == []
    assert propose_masks(torch.ones(4, 1, 1), (16, 16)) == []
    assert propose_masks(torch.zeros(4, 2, 2), (17, 17), max_proposals=3) == []
    # A speck, half of a token's cell, and an object that fills the frame.
    for rows, columns in ((slice(0, 1), slice(0, 1)), (slice(1, 15), slice(1, 29))):
        tokens = torch.eye(2)[:, 0].reshape(2, 1, 1).repeat(1, 16, 30)
        tokens[:, rows, columns] = torch.eye(2)[:, 1].reshape(2, 1, 1)
        assert propose_masks(tokens, (241, 465)) == []


# ---- A teacher that follows colours ---------------------------------------------------------------------------------


class ColourProcessor(DeformVosProcessor):
    """The package's processor, but for sessions, which are plain records."""

    def init_video_session(self, video=None, **options):
        return SimpleNamespace(video=video, colours=None, given={})

    def add_inputs_to_inference_session(self, session, frame_idx, input_masks, **options):
        session.given[frame_idx] = np.asarray(input_masks)

    def post_process_id_map(self, output, original_size):
        ids = torch.from_numpy(output.ids)[None, None].float()
        return F.interpolate(ids, size=original_size, mode="nearest-exact")[0, 0].numpy().astype(np.int32)


class ColourTeacher(torch.nn.Module):
    """Follows objects by their mean colour on the frame where they are given; its tokens are colours as well."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.config = SimpleNamespace(to_json_string=lambda: "{}")
        self.visited: list[int] = []

    def encode_images(self, pixel_values):
        tokens = F.avg_pool2d(pixel_values, 9, 16, 4, count_include_pad=False)
        tokens = tokens - tokens.flatten(2).median(-1).values[..., None, None]
        return SimpleNamespace(tokens=torch.cat([tokens, torch.full_like(tokens[:, :1], 0.3)], dim=1))

    def segment(self, session, image, ids=None):
        """`(height, width, 3)` floats to ids, by the nearest colour; learns the colours from `ids` first."""
        if ids is not None:
            session.colours = {number: np.median(image[ids == number], axis=0) for number in np.unique(ids[ids > 0])}
        numbers = np.array(list(session.colours))
        distances = [np.abs(image - colour).sum(-1) for colour in session.colours.values()]
        return np.where(np.min(distances, axis=0) < 1.0, numbers[np.argmin(distances, axis=0)], 0).astype(np.uint8)

    def forward(self, inference_session, frame):
        image, ids = frame.permute(1, 2, 0).numpy(), inference_session.given.pop(0, None)
        if ids is not None:
            ids = np.asarray(Image.fromarray(ids).resize(image.shape[1::-1], Image.NEAREST))
        return SimpleNamespace(ids=self.segment(inference_session, image, ids))

    def propagate_in_video_iterator(self, session, start_frame_idx, reverse):
        step, end = (-1, -1) if reverse else (1, len(session.video))
        for index in range(start_frame_idx, end, step):
            self.visited.append(index)
            image = session.video[index].astype(np.float32) / 60
            yield SimpleNamespace(frame_idx=index, ids=self.segment(session, image, session.given.get(index)))


@pytest.fixture
def teacher():
    return ColourTeacher().train()


@pytest.fixture
def processor():
    return ColourProcessor(DeformVosImageProcessor(size={"shortest_edge": 96}))


@pytest.fixture
def options(tmp_path):
    return {"short_side": 96, "cache_dir": tmp_path / "cache", "show_progress_bar": False}


def scene(index: int, numbers=(1,), size=SIZE) -> tuple[np.ndarray, np.ndarray]:
    """A frame of squares that move to the right, and its ids."""
    boxes = {n: (20 + 2 * index + 60 * (n - 1), 24, 60 + 2 * index + 60 * (n - 1), 64) for n in numbers}
    return draw_scene(*size, boxes)


def write_frames(folder, frames: int = 6, numbers=(1,), gone: tuple = (), mask: bool = True, size=SIZE):
    """A folder of frames, `gone` ones without objects, and the first frame's mask beside it."""
    folder.mkdir(parents=True)
    for index in range(frames):
        image, _ = scene(index, () if index in gone else numbers, size)
        Image.fromarray(image).save(folder / f"{index:05d}.png")
    if mask:
        save_palette(folder.with_name(f"{folder.name}.png"), scene(0, numbers, size)[1])
    return folder


def write_video(path, frames: int = 6):
    """A video file of the same scene."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = H264Writer(path, fps=24)
    for index in range(frames):
        writer.write(scene(index)[0], index / 24)
    writer.close()
    return path


# ---- Labels ---------------------------------------------------------------------------------------------------------


def test_videos_with_masks_become_a_store(tmp_path, teacher, processor, options):
    root = tmp_path / "videos"
    write_frames(root / "folder10", numbers=(1, 2))
    write_frames(root / "folder2", frames=4)
    write_video(root / "file.mp4")
    Image.fromarray((scene(0)[1] * 255).astype(np.uint8)).save(root / "file_mask.png")
    (root / "README.md").write_text("no video")
    (root / ".hidden").mkdir()
    store = label_videos(root, teacher, processor, **options)
    assert {name: len(span) for name, span in store.sequences.items()} == {"file": 6, "folder2": 4, "folder10": 6}
    assert store.skipped == []
    assert store.frame_names[:2] == ["00000", "00001"]
    for name, numbers in (("folder2", (1,)), ("folder10", (1, 2))):
        for index, position in enumerate(store.sequences[name]):
            image, ids = scene(index, numbers)
            assert np.array_equal(store.image(position), image)
            assert np.array_equal(store.mask(position), ids)
    last = store.sequences["file"][-1]
    assert iou(store.mask(last) == 1, scene(5)[1] == 1) > 0.85
    assert teacher.training, "the teacher's mode is as it was"
    batch = ClipSampler([store])(0, ClipSpec((33, 49), frames=3, batch=2, max_gap=2))
    assert set(batch.masks.unique().tolist()) >= {0, 1}


def test_frames_are_stored_at_the_short_side(tmp_path, teacher, processor, options):
    write_frames(tmp_path / "videos" / "clip", frames=3, numbers=(1, 2))
    store = label_videos(tmp_path / "videos", teacher, processor, **{**options, "short_side": 48}, max_frames=2)
    assert store.sizes == [(48, 80)] * 2
    assert iou(store.mask(1) == 2, scene(1, (1, 2))[1][::2, ::2] == 2) > 0.85


def test_second_call_opens_the_cache_until_something_changes(tmp_path, teacher, processor, options):
    root = tmp_path / "videos"
    folder = write_frames(root / "clip")
    first = label_videos(root, teacher, processor, **options)
    visits = len(teacher.visited)
    assert label_videos(root, teacher, processor, **options).folder == first.folder
    assert len(teacher.visited) == visits, "nothing is labelled twice"
    assert label_videos(root, teacher, processor, max_frames=3, **options).folder != first.folder
    save_palette(root / "clip.png", scene(0)[1] * 3)
    assert label_videos(root, teacher, processor, **options).objects[0][0].object_id == 3
    (folder / "00005.png").unlink()
    assert len(label_videos(root, teacher, processor, **options)) == 5
    with torch.no_grad():
        teacher.weight.add_(1)
    visits = len(teacher.visited)
    label_videos(root, teacher, processor, **options)
    assert len(teacher.visited) == visits + 5
    assert not list((tmp_path / "cache").glob(".building*"))


def test_proposals_are_followed_to_both_ends(tmp_path, teacher, processor, options):
    # The object is absent from the first frames' middle candidate, so that another frame starts.
    write_frames(tmp_path / "videos" / "clip", frames=10, mask=False)
    store = label_videos(tmp_path / "videos", teacher, processor, **options)
    assert sorted(set(teacher.visited)) == list(range(10)), "every frame is visited"
    assert teacher.visited[0] > 0, "the first frame is not where it began"
    assert len(store) == 10
    for index in range(10):
        assert iou(store.mask(index) == 1, scene(index)[1] == 1) > 0.9, index


def test_several_objects_are_proposed(tmp_path, teacher, processor, options):
    write_frames(tmp_path / "videos" / "clip", numbers=(1, 2), mask=False)
    store = label_videos(tmp_path / "videos", teacher, processor, max_proposals=2, **options)
    for index in range(6):
        ids = scene(index, (1, 2))[1]
        mine = [max(iou(store.mask(index) == own, ids == true) for own in (1, 2)) for true in (1, 2)]
        assert min(mine) > 0.9


def test_frames_where_the_object_is_unseen_are_left_out_at_the_ends(tmp_path, teacher, processor, options):
    write_frames(tmp_path / "videos" / "clip", frames=10, gone=(0, 1, 4, 8, 9), mask=False)
    store = label_videos(tmp_path / "videos", teacher, processor, **options)
    assert store.frame_names == [f"{index:05d}" for index in range(2, 8)]
    assert not store.mask(2).any()
    assert store.mask(3).any()


def make_broken(root, kind: str):
    """A folder with one good video and one of which `kind` is wrong."""
    write_frames(root / "good")
    if kind == "unreadable":
        (root / "bad.mp4").write_bytes(b"\x00" * 500)
    elif kind == "no frames":
        (root / "bad").mkdir()
    elif kind == "broken frame":
        write_frames(root / "bad")
        (root / "bad" / "00003.png").write_bytes(b"nothing")
    elif kind == "size of mask":
        write_frames(root / "bad")
        save_palette(root / "bad.png", scene(0)[1][:50])
    elif kind == "empty mask":
        write_frames(root / "bad")
        save_palette(root / "bad.png", np.zeros(SIZE, np.uint8))
    elif kind == "no mask file":
        write_frames(root / "bad")
        (root / "bad.png").write_bytes(b"nothing")
    elif kind == "lost":
        write_frames(root / "bad", frames=12, gone=range(1, 12))
    elif kind == "nothing to propose":
        write_frames(root / "bad", gone=range(6), mask=False)
    elif kind == "one frame":
        write_frames(root / "bad", frames=1)


MISTAKES = {
    "unreadable": "not a video",
    "no frames": "holds no images",
    "broken frame": "00003.png is not an image",
    "size of mask": "must have the video's size 160x96, got 160x50",
    "empty mask": "is empty",
    "no mask file": "not an image",
    "lost": "is lost: the teacher sees it in 1 of 12 frames",
    "nothing to propose": "give a mask of the first frame",
    "one frame": "has 1 frame",
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_broken_videos_are_named_and_skipped_or_refused(
    kind, tmp_path, teacher, processor, options, warnings_of_package
):
    root = tmp_path / "videos"
    make_broken(root, kind)
    with pytest.raises(ValueError, match="bad") as refused:
        label_videos(root, teacher, processor, on_error="raise", **options)
    assert MISTAKES[kind] in str(refused.value)
    store = label_videos(root, teacher, processor, **options)
    assert list(store.sequences) == ["good"]
    assert len(store.skipped) == 1
    assert MISTAKES[kind] in store.skipped[0]
    assert MISTAKES[kind] in warnings_of_package.text
    with pytest.raises(ValueError, match="bad"):
        label_videos(root, teacher, processor, on_error="raise", **options)


def test_damaged_video_gives_the_frames_that_decode(tmp_path, teacher, processor, options):
    path = write_video(tmp_path / "videos" / "clip.mp4", frames=24)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(0.8 * len(whole))])
    save_palette(path.with_suffix(".png"), scene(0)[1])
    try:
        store = label_videos(path.parent, teacher, processor, **options)
    except ValueError as error:
        assert "clip.mp4" in str(error)  # the index of an mp4 lies at its end: nothing decodes without it
    else:
        assert 2 <= len(store) <= 24
        assert len(store.skipped) <= 1


def test_folder_mistakes(tmp_path, teacher, processor, options, warnings_of_package):
    def label(root, **more):
        return label_videos(root, teacher, processor, **{**options, **more})

    with pytest.raises(ValueError, match="which is none"):
        label(tmp_path / "missing")
    frames = write_frames(tmp_path / "one" / "clip")
    with pytest.raises(ValueError, match="sub-folder of their own"):
        label(frames)
    for name, value in (("short_side", 1), ("max_frames", 1), ("max_proposals", 0), ("on_error", "ignore")):
        with pytest.raises(ValueError, match=name):
            label(tmp_path / "one", **{name: value})
    save_palette(tmp_path / "one" / "clop.png", scene(0)[1])
    with pytest.raises(ValueError, match=r"mask of no video: clop\.png"):
        label(tmp_path / "one", on_error="raise")
    assert len(label(tmp_path / "one")) == 6
    assert "clop.png" in warnings_of_package.text
    write_video(tmp_path / "one" / "clip.mp4")
    with pytest.raises(ValueError, match="rename one"):
        find_videos(tmp_path / "one")
    only_bad = tmp_path / "bad"
    (only_bad / "clip").mkdir(parents=True)
    with pytest.raises(ValueError, match="no frame could be read"):
        label(only_bad)


def test_excluded_videos_are_left_out_by_name(tmp_path, teacher, processor, options, warnings_of_package):
    root = tmp_path / "videos"
    write_frames(root / "mine")
    write_frames(root / "swing")
    write_video(root / "flamingo.mp4")
    store = label_videos(root, teacher, processor, exclude=("swing", "flamingo", "kite-walk"), **options)
    assert list(store.sequences) == ["mine"]
    assert "flamingo, swing are left out" in warnings_of_package.text
    with pytest.raises(ValueError, match="and there are no others"):
        label_videos(root, teacher, processor, exclude=("swing", "flamingo", "mine"), **options)


def peak_of_labelling(tmp_path, frames: int, mask: bool) -> int:
    root = tmp_path / f"videos-{frames}-{mask}"
    write_frames(root / "clip", frames=frames, mask=mask, size=(96, 224))
    teacher, processor = ColourTeacher(), ColourProcessor(DeformVosImageProcessor(size={"shortest_edge": 96}))
    tracemalloc.start()
    try:
        store = label_videos(root, teacher, processor, 96, cache_dir=tmp_path / "cache", show_progress_bar=False)
        assert len(store) == frames
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "proposals"])
def test_memory_does_not_grow_with_the_video(tmp_path, mask):
    peak_of_labelling(tmp_path, 20, mask)  # what is imported and cached at first use
    # Frames waiting to be written are the same sixteen in both.
    short, long = peak_of_labelling(tmp_path, 24, mask), peak_of_labelling(tmp_path, 64, mask)
    assert long - short < 8 * 96 * 224 * 4, (short, long)


def test_disk_clip_reads_what_was_written(tmp_path):
    with DiskClip(tmp_path) as clip:
        images = np.random.default_rng(0).integers(0, 255, (5, 7, 9, 3), dtype=np.uint8)
        for image in images:
            clip.append(image)
        clip.write_mask(4, images[4, ..., 0])
        clip.write_mask(1, images[1, ..., 1])
        assert len(clip) == 5
        assert clip.size == (7, 9)
        assert np.array_equal(clip[3], images[3])
        assert np.array_equal(clip.read_mask(4), images[4, ..., 0])
        assert np.array_equal(clip.read_mask(1), images[1, ..., 1])
    assert not list(tmp_path.iterdir())


# ---- The real model -------------------------------------------------------------------------------------------------


def test_real_session_is_driven_as_by_hand(tmp_path, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    with DiskClip(tmp_path) as clip:
        for frame in frames:
            clip.append(frame)
        visible = follow_objects(clip, 2, ids[2], tiny_model, tiny_processor)
        assert visible.shape == (6,)
        expected = {2: ids[2]}
        for reverse in (False, True):
            session = tiny_processor.init_video_session(video=frames)
            tiny_processor.add_inputs_to_inference_session(session, frame_idx=2, input_masks=ids[2])
            for output in tiny_model.propagate_in_video_iterator(session, start_frame_idx=2, reverse=reverse):
                expected.setdefault(output.frame_idx, tiny_processor.post_process_id_map(output, (96, 160)))
        for index in range(6):
            assert np.array_equal(clip.read_mask(index), expected[index]), index
            assert visible[index] == expected[index].any()


def test_real_tokens_are_few_enough(tiny_model, tiny_processor, tiny_clip, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hf_deformvos.training.pseudo_labels.propose_masks",
        lambda tokens, size, count: seen.append((tokens.shape[1] * tokens.shape[2], size)) or [],
    )
    monkeypatch.setattr("hf_deformvos.training.pseudo_labels.MAX_TOKENS", 40)
    assert propose_in_frame(tiny_clip[0][0], tiny_model, tiny_processor) == []
    assert seen[0][0] <= 40
    assert seen[0][1] == (96, 160)
    with pytest.raises(ValueError, match="set an object apart"):
        propose_objects(tiny_clip[0], tiny_model, tiny_processor)


def test_hash_tells_weights_and_configuration(tiny_model):
    before = hash_model(tiny_model)
    assert hash_model(tiny_model) == before
    tiny_model.config.memory_interval += 1
    other = hash_model(tiny_model)
    with torch.no_grad():
        tiny_model.decoder.classifier.bias[0] += 1e-6
    assert len({before, other, hash_model(tiny_model)}) == 3


@pytest.mark.weights
@pytest.mark.slow
def test_bundled_student_proposes_the_object_of_the_example_clip(tmp_path, student_dir, options):
    from hf_deformvos.inference import load_for_inference

    root = tmp_path / "videos"
    root.mkdir()
    (root / "bunny.mp4").symlink_to(ROOT / "examples" / "bunny.mp4")
    model, processor = load_for_inference(str(student_dir), device="cpu")
    store = label_videos(root, model, processor, max_frames=6, **{**options, "short_side": 240})
    with Image.open(ROOT / "examples" / "bunny_mask.png") as image:
        truth = np.asarray(image.resize(store.sizes[0][::-1], Image.NEAREST)) == 1
    assert len(store) == 6
    assert iou(store.mask(0) > 0, truth) > 0.6
