"""The demo's job for programs, `/segment`, through `gradio_client` over HTTP."""

import io
import json
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import demo_clips as clips
import numpy as np
import pytest
from PIL import Image

from hf_deformvos.video import VideoReader


pytestmark = [pytest.mark.weights, pytest.mark.slow]


@pytest.fixture(scope="module")
def client(demo_server):
    return connect(demo_server)


def connect(server):
    """One program's connection, without a request to anywhere else."""
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(server.url, verbose=False, analytics_enabled=False)


def segment(client, video, mask, **settings):
    from gradio_client import handle_file

    return client.predict(
        video=handle_file(video) if video else None,
        mask=handle_file(mask) if mask else None,
        **{"frame": 0, "direction": "both", "model": "Student", "quality": "Fast", **settings},
        api_name="/segment",
    )


def read_masks(path):
    with zipfile.ZipFile(path) as archive:
        return {
            int(name[len("masks/") : -len(".png")]): np.asarray(Image.open(io.BytesIO(archive.read(name))))
            for name in archive.namelist()
        }


def test_it_is_the_only_endpoint_and_says_what_it_takes(client):
    described = client.view_api(return_format="dict", print_info=False)
    assert set(described["named_endpoints"]) == {"/segment"} and not described["unnamed_endpoints"]
    endpoint = described["named_endpoints"]["/segment"]
    parameters = {entry["parameter_name"]: entry for entry in endpoint["parameters"]}
    assert list(parameters) == ["video", "mask", "frame", "direction", "model", "quality"]
    types = {name: entry["python_type"]["type"] for name, entry in parameters.items()}
    assert types["frame"] in {"int", "float"} and "filepath" in types["video"] and "filepath" in types["mask"]
    assert types["direction"] == "Literal['forwards', 'backwards', 'both']"
    assert types["quality"] == "Literal['Fast', 'Standard', 'Adapted']" and "Student" in types["model"]
    optional = [name for name, entry in parameters.items() if entry["parameter_has_default"]]
    defaults = {name: parameters[name]["parameter_default"] for name in optional}
    assert defaults == {"frame": 0, "direction": "both", "model": "Student", "quality": "Standard"}
    assert len(endpoint["returns"]) == 3
    assert all("filepath" in entry["python_type"]["type"] for entry in endpoint["returns"])
    assert "Follow the objects of a mask" in endpoint["description"]


def test_the_whole_job_from_a_frame_in_the_middle(client, demo_server, tmp_path):
    video, mask = clips.write_clip(tmp_path / "squares.mp4", 8), clips.write_mask(tmp_path / "mask.png", 3)
    overlay, masks, record = segment(client, video, mask, frame=3)
    found = read_masks(masks)
    assert sorted(found) == list(range(8))
    assert np.array_equal(found[3], clips.true_ids(3))
    for frame_idx, ids in found.items():
        for obj_id in (1, 2):
            assert clips.iou(ids == obj_id, clips.true_ids(frame_idx) == obj_id) > 0.8, (frame_idx, obj_id)
    with VideoReader(overlay) as reader:
        assert [frame.image.shape for frame in reader] == [(clips.HEIGHT, clips.WIDTH, 3)] * 8
    with open(record, encoding="utf-8") as file:
        told = json.load(file)
    assert told["video"]["name"] == "squares.mp4" and told["num_frames_done"] == 8
    assert told["run"]["model"] == "Student" and told["run"]["quality"] == "Fast" and told["run"]["start_frame"] == 3
    assert told["frames"][0]["objects"]["1"]["area"] == int((found[0] == 1).sum())
    assert demo_server.videos() == []  # nothing of a program's video stays


def test_one_direction_gives_one_side(client, tmp_path):
    video, mask = clips.write_clip(tmp_path / "squares.mp4", 5), clips.write_mask(tmp_path / "mask.png", 2)
    assert sorted(read_masks(segment(client, video, mask, frame=2, direction="forwards")[1])) == [2, 3, 4]
    assert sorted(read_masks(segment(client, video, mask, frame=2, direction="backwards")[1])) == [0, 1, 2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A video, a mask, and files that are not what they should be."""
    folder = tmp_path_factory.mktemp("files")
    empty_mask = folder / "black.png"
    Image.fromarray(np.zeros((clips.HEIGHT, clips.WIDTH), np.uint8)).save(empty_mask)
    (folder / "corrupt.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40)
    return {
        "video": clips.write_clip(folder / "squares.mp4", 3),
        "mask": clips.write_mask(folder / "mask.png"),
        "long": clips.write_clip(folder / "long.mp4", 25, fps=1),
        "sound": clips.write_sound(folder / "sound.m4a"),
        "corrupt": folder / "corrupt.mp4",
        "black": empty_mask,
        "nothing": None,
    }


@pytest.mark.parametrize(
    ("video", "mask", "settings", "message"),
    [
        ("nothing", "mask", {}, "A video and a mask are needed"),
        ("video", "nothing", {}, "A video and a mask are needed"),
        ("corrupt", "mask", {}, "corrupt.mp4"),
        ("sound", "mask", {}, "sound.m4a holds sound only"),
        ("long", "mask", {}, "long.mp4 is longer than 20 seconds"),
        ("video", "black", {}, "black.png"),
        ("video", "video", {}, "squares.mp4"),
        ("video", "mask", {"frame": 3}, "The video has the frames 0 to 2, got 3"),
        ("video", "mask", {"frame": -1}, "frame|-1"),
        ("video", "mask", {"direction": "sideways"}, "sideways"),
        ("video", "mask", {"model": "Professor"}, "Professor"),
        ("video", "mask", {"quality": "Best"}, "Best"),
    ],
)
def test_wrong_inputs_are_told(client, demo_server, files, video, mask, settings, message):
    from gradio_client.exceptions import AppError

    with pytest.raises((AppError, ValueError), match=message) as caught:
        segment(client, files[video], files[mask], **settings)
    assert "Traceback" not in str(caught.value)
    assert demo_server.videos() == []


def test_two_programs_at_once_do_not_mix(demo_server, tmp_path):
    heights = {"low.mp4": clips.HEIGHT, "high.mp4": clips.HEIGHT + 32}
    for name, height in heights.items():
        clips.write_clip(tmp_path / name, 4 + height // 32, height=height)
        ids = np.pad(clips.true_ids(0), ((0, height - clips.HEIGHT), (0, 0)))
        Image.fromarray(ids).save(tmp_path / f"{name}.png")

    def job(name):
        return segment(connect(demo_server), tmp_path / name, tmp_path / f"{name}.png")

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(heights, pool.map(job, heights), strict=True))
    for name, (overlay, masks, record) in results.items():
        height = heights[name]
        assert {ids.shape for ids in read_masks(masks).values()} == {(height, clips.WIDTH)}
        assert len(read_masks(masks)) == 4 + height // 32
        with VideoReader(overlay) as reader:
            assert {frame.image.shape[0] for frame in reader} == {height}
        with open(record, encoding="utf-8") as file:
            assert json.load(file)["video"]["name"] == name


def test_a_job_that_is_called_off_frees_the_model(demo_server, tmp_path):
    from gradio_client import handle_file

    video, mask = clips.write_clip(tmp_path / "long.mp4", 200), clips.write_mask(tmp_path / "mask.png")
    job = connect(demo_server).submit(
        handle_file(video), handle_file(mask), 0, "both", "Student", "Standard", api_name="/segment"
    )
    deadline = time.monotonic() + 60
    while not demo_server.videos() and time.monotonic() < deadline:
        time.sleep(0.05)
    started = time.monotonic()
    job.cancel()
    while demo_server.videos() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert demo_server.videos() == []
    assert time.monotonic() - started < 10  # all of it takes longer


def test_mistakes_of_callers_are_no_failures_of_the_program(demo_server):
    # The last of this file, since it looks at what the others left in the log.
    assert demo_server.failures() == []
