"""
The demo in a real browser, as visitors use it: what they do, what they see, what they take home.

One server and one browser serve all tests; every visitor is a browser context of its own.
"""

import io
import json
import re
import time
import zipfile

import demo_clips as clips
import numpy as np
import pytest
import torch
from conftest import STUDENT
from demo_page import DemoPage, expect, open_browser
from PIL import Image
from synthetic import COLOURS

from hf_deformvos.inference import load_for_inference, size_option
from hf_deformvos.video import VideoReader, colorblind_palette


pytestmark = [pytest.mark.weights, pytest.mark.slow, pytest.mark.timeout(600)]

SIZE = (clips.WIDTH, clips.HEIGHT)
# Without a graphics card every movement draws the window anew: a small one, and coarse.
SMALL, DESKTOP = {"width": 760, "height": 640}, {"width": 1280, "height": 1000}
COARSE = 0.5


@pytest.fixture(scope="module")
def browser(demo_server):
    already = len(demo_server.log)
    with open_browser() as browser:
        yield browser
    # Leaving stops runs and takes files away, some seconds later, which may go wrong, too.
    assert_no_videos(demo_server)
    assert not demo_server.failures(already)


@pytest.fixture
def visit(browser, demo_server):
    """Opens pages, one a visitor; in the end none of them has had an error, nor has the server."""
    pages, already = [], len(demo_server.log)

    def visit(**options):
        look = {"viewport": SMALL, "device_scale_factor": COARSE, **options}
        pages.append(DemoPage(browser, demo_server.url, **look))
        return pages[-1]

    yield visit
    problems = [problem for page in pages for problem in page.problems]
    for page in pages:
        page.close()
    assert not problems
    assert not demo_server.failures(already)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Videos of several lengths and a mask."""
    folder = tmp_path_factory.mktemp("clips")
    for name, count in (("short", 6), ("squares", 12), ("long", 72)):
        clips.write_clip(folder / f"{name}.mp4", count)
    clips.write_clip(folder / "high.mp4", 5, height=128)
    clips.write_mask(folder / "mask.png")
    return folder


def assert_no_videos(server, seconds=60):
    """The server comes to keep nothing of any visitor: it learns a little later that somebody has left."""
    deadline = time.monotonic() + seconds
    while server.videos() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.videos() == []


def read_masks(path):
    """The id maps in a zip by frame."""
    with zipfile.ZipFile(path) as archive:
        return {
            int(name[len("masks/") : -len(".png")]): np.asarray(Image.open(io.BytesIO(archive.read(name))))
            for name in archive.namelist()
        }


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@torch.inference_mode()
def followed(video, first_mask):
    """What the Python API makes of a video, at the quality Fast."""
    model, processor = load_for_inference(str(STUDENT), dtype="float32")
    session, size = processor.init_video_session(), size_option(processor, 320)
    found = {}
    with VideoReader(video) as reader:
        for frame in reader:
            inputs = processor(images=frame.image, return_tensors="pt", **size)
            if frame.index == 0:
                processor.add_inputs_to_inference_session(
                    session, frame_idx=0, input_masks=first_mask, original_size=first_mask.shape
                )
            output = model(inference_session=session, frame=inputs.pixel_values[0])
            found[frame.index] = processor.post_process_id_map(output, original_size=first_mask.shape)
    return found


def assert_alike(found, expected, at_least=0.9):
    assert sorted(found) == sorted(expected)
    for frame_idx, ids in found.items():
        for obj_id in np.unique(expected[frame_idx])[1:]:
            overlap = clips.iou(ids == obj_id, expected[frame_idx] == obj_id)
            assert overlap >= at_least, f"frame {frame_idx}, object {obj_id}: IoU {overlap:.3f}"


def texts_of(page, selector):
    """Begins to record every text that an element ever shows; the returned function tells them."""
    page.page.evaluate(
        """selector => {
            const texts = window.recorded = [], element = document.querySelector(selector);
            new MutationObserver(() => texts.push(element.innerText))
                .observe(element, {childList: true, subtree: true, characterData: true});
        }""",
        selector,
    )
    return lambda: page.page.evaluate("window.recorded")


def painted(box, obj_id):
    """The middle of a square that `obj_id` is painted over (0: none), and the colour that it has in the editor."""
    middle, number = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2), 1 if box[1] < 48 else 2
    paint, opacity = np.array(colorblind_palette()[obj_id], float), 0.65 if obj_id else 0
    return middle, tuple((opacity * paint + (1 - opacity) * np.array(COLOURS[number])).round().astype(int).tolist())


def paint_object(page, obj_id, box):
    """Paints, and again where it is not to be seen: what of a stroke comes before the editor is ready is lost."""
    middle, colour = painted(box, obj_id)
    beginning = (box[0] + 4, box[1] + 4)  # of the stroke: it may be the rest alone that came to be painted
    for _ in range(3):
        page.paint(box, SIZE)
        if page.shows(middle, SIZE, colour, seconds=10) and page.shows(beginning, SIZE, colour, seconds=1):
            return
    raise AssertionError(f"Object {obj_id} cannot be painted.")


# One visitor from beginning to end


def followed_on_the_page(page, folder):
    """What comes of the marks, from the download."""
    page.choose("quality", "Fast")
    page.follow()
    page.wait_for_result()
    return read_masks(page.download("get_masks", folder))


def test_mask_file_to_downloads(visit, files, tmp_path):
    page = visit(viewport=DESKTOP)
    expect(page.find("#limits")).to_contain_text("Up to 20 seconds, 18,000 frames, 2.0 MB and 4096 pixels a side")
    page.open_video(files / "squares.mp4")
    expect(page.find("#video_status")).to_contain_text("12 frames")
    # It would cut what the browser plays, and nothing else.
    expect(page.find("#video").get_by_label("Trim video to selection")).to_be_hidden()

    # Nothing marked: a message, and all goes on from there.
    page.follow()
    expect(page.find("#run_status .alert")).to_contain_text("Nothing is marked yet")

    page.mark_file(files / "mask.png")
    expect(page.find("#marked")).to_have_text("Marked: frame 0.")
    page.find("#name textarea").fill("Left square")
    page.find("#name textarea").press("Enter")
    expect(page.find("#marked_table")).to_contain_text("Left square")

    page.choose("quality", "Fast")
    seen = texts_of(page, "#run_status")
    page.follow()
    page.wait_for_result()
    assert "Nothing is marked" not in seen()[-1]

    masks = read_masks(page.download("get_masks", tmp_path))
    assert np.array_equal(masks[0], clips.true_ids(0))  # what was given, to the pixel
    assert_alike(masks, followed(files / "squares.mp4", clips.true_ids(0)))
    assert_alike(masks, {i: clips.true_ids(i) for i in range(12)}, at_least=0.8)

    record = read_json(page.download("get_record", tmp_path))
    assert [entry["name"] for entry in record["objects"]] == ["Left square", "Object 2"]
    assert record["run"]["quality"] == "Fast" and record["run"]["frames"] == record["num_frames_done"] == 12
    assert record["frames"][5]["objects"]["2"]["area"] == int((masks[5] == 2).sum())

    # What is renamed afterwards is in the record as soon as that has been written anew.
    page.find("#name textarea").fill("Square")
    page.find("#name textarea").press("Enter")
    deadline = time.monotonic() + 30
    while record["objects"][0]["name"] != "Square" and time.monotonic() < deadline:
        page.page.wait_for_timeout(200)
        record = read_json(page.download("get_record", tmp_path))
    assert record["objects"][0]["name"] == "Square"

    with VideoReader(page.download("get_overlay", tmp_path)) as reader:
        frames = [frame.image for frame in reader]
    assert [frame.shape for frame in frames] == [(clips.HEIGHT, clips.WIDTH, 3)] * 12
    expect(page.find("#plot canvas, #plot svg").first).to_be_visible()
    page.scrub_to(7)


def test_brush_in_two_colours(visit, files, tmp_path):
    page = visit()
    page.open_video(files / "short.mp4")
    paint_object(page, 1, clips.boxes(0)[1])
    # Another tool by mistake: what is painted before the page has settled counts as well.
    page.add_object(2)
    page.open_tool("Box")
    page.open_tool("Brush")
    paint_object(page, 2, clips.boxes(0)[2])
    masks = followed_on_the_page(page, tmp_path)
    assert_alike({0: masks[0]}, {0: clips.true_ids(0)}, at_least=0.7)
    assert_alike(masks, followed(files / "short.mp4", masks[0]))


def test_marks_come_into_the_editor_and_can_be_rubbed_out(visit, files):
    page = visit()
    page.open_video(files / "short.mp4")
    page.mark_file(files / "mask.png")
    shares = page.find("#marked_table tbody td:last-child")
    expect(shares).to_have_text(["10.4 %", "7.5 %"])
    page.open_tool("Brush")
    for obj_id in (1, 2):
        middle, colour = painted(clips.boxes(0)[obj_id], obj_id)
        assert page.shows(middle, SIZE, colour)
    page.find("#editor").get_by_label("Erase").click()
    page.paint(clips.boxes(0)[2], SIZE)
    middle, colour = painted(clips.boxes(0)[2], 0)
    assert page.shows(middle, SIZE, colour)
    page.open_tool("Box")
    expect(shares.last).not_to_have_text("7.5 %")
    expect(shares.first).to_have_text("10.4 %")
    assert float(shares.last.inner_text().rstrip(" %").replace("–", "0")) < 1.5


def test_what_is_typed_outlives_answers_that_come_late(visit, files):
    page = visit()
    page.open_video(files / "short.mp4")
    page.mark_file(files / "mask.png")
    name, table = page.find("#name textarea"), page.find("#marked_table")
    page.page.route("**/queue/data*", lambda route: None)  # answers have to wait until `unroute`
    with page.page.expect_response("**/queue/join*"):
        page.open_tool("Box")
    page.page.wait_for_timeout(500)  # the server has made up its answer, and nobody has it yet
    name.fill("Left square")
    name.press("Enter")
    page.page.wait_for_timeout(500)
    page.page.unroute("**/queue/data*")
    expect(page.find("#box_picture img")).to_be_visible()
    expect(table).to_contain_text("Left square")
    expect(name).to_have_value("Left square")
    page.choose("objects", "Object 2")
    expect(name).to_have_value("Object 2")
    # Typed, and another object chosen before anybody has answered.
    name.fill("Right square")
    page.choose("objects", "Left square")
    expect(name).to_have_value("Left square")
    expect(table.locator("tbody th")).to_have_text(["Left square", "Right square"])


def test_box_by_clicks_and_by_numbers(visit, files, tmp_path):
    page = visit()
    page.open_video(files / "short.mp4")
    page.open_tool("Box")
    picture = page.find("#box_picture img")
    expect(picture).to_be_visible()
    x0, y0, x1, y1 = clips.boxes(0)[1]
    page.click_corner(x0 - 4, y0 - 4, clips.WIDTH)
    expect(page.find("#box_hint")).to_contain_text("Now click the opposite corner")
    page.click_corner(x1 + 4, y1 + 4, clips.WIDTH)
    expect(page.find("#box_hint")).to_contain_text("Object 1 is marked")

    # The same without a mouse.
    page.add_object(2)
    x0, y0, x1, y1 = clips.boxes(0)[2]
    page.find("#left input").focus()
    for number in (x0 - 4, y0 - 4, x1 + 4, y1 + 4):
        page.page.keyboard.press("Control+A")
        page.page.keyboard.type(str(number))
        page.page.keyboard.press("Tab")
    expect(page.find("#mark_box")).to_be_focused()
    page.page.keyboard.press("Enter")
    expect(page.find("#box_hint")).to_contain_text("Object 2 is marked")

    masks = followed_on_the_page(page, tmp_path)
    assert_alike({0: masks[0]}, {0: clips.true_ids(0)}, at_least=0.9)
    assert_alike(masks, followed(files / "short.mp4", masks[0]))


def test_a_box_that_is_none_is_told(visit, files):
    page = visit()
    page.open_video(files / "short.mp4")
    page.open_tool("Box")
    for name, number in (("left", 400), ("top", 10), ("right", 500), ("bottom", 30)):
        page.find(f"#{name} input").fill(str(number))
    page.find("#mark_box").click()
    expect(page.find(".toast-body").first).to_contain_text("outside of the picture")
    expect(page.find("#marked")).to_have_text("Nothing is marked yet.")


def test_progress_stop_correct_and_go_on(visit, files, tmp_path):
    page = visit()
    page.open_video(files / "long.mp4")
    page.mark_file(files / "mask.png")
    page.choose("quality", "Fast")
    seen = texts_of(page, "#run_status")
    page.follow()
    page.wait_for_progress(4)
    page.stop()
    counts = [int(match[1]) for text in seen() if (match := re.match(r"(\d+) of 72 frames", text))]
    assert len(set(counts)) >= 2 and counts == sorted(counts)
    assert any(re.search(r"\d\.\d frames a second · .*\d s left", text) for text in seen()), seen()
    first = read_masks(page.download("get_masks", tmp_path))
    assert sorted(first) == list(range(len(first))) and 4 <= len(first) < 72

    # In frame 2 the right square becomes a third object; what lies before stays as it is.
    page.correct(2)
    middle, colour = painted(clips.boxes(2)[1], 1)
    assert page.shows(middle, SIZE, colour)  # what was found is there to be changed
    page.add_object(3)
    paint_object(page, 3, clips.boxes(2)[2])
    page.choose("direction", "To the end")
    page.follow()
    page.wait_for_progress(4)
    page.stop()
    second = read_masks(page.download("get_masks", tmp_path))
    assert sorted(second) == list(range(len(second))) and len(second) >= len(first)
    assert np.array_equal(second[0], first[0]) and np.array_equal(second[1], first[1])
    assert clips.iou(second[2] == 1, first[2] == 1) > 0.9
    for frame_idx in (2, 3, 4):
        assert clips.iou(second[frame_idx] == 3, clips.true_ids(frame_idx) == 2) > 0.6
        assert clips.iou(second[frame_idx] == 1, clips.true_ids(frame_idx) == 1) > 0.8


# Files and clicks that are not as they should be


def test_bad_files_are_told_and_the_page_stays_usable(visit, files, tmp_path):
    whole = (files / "short.mp4").read_bytes()
    noise = np.random.default_rng(0).bytes(2_100_000)
    bad = {
        "corrupt.mp4": (whole[:40] + noise[:5000], "corrupt.mp4"),
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"not a video\n" * 50, "text.mp4 is not a video"),
        "large.mp4": (noise, None),
    }
    page = visit()
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        page.upload(tmp_path / name)
        told = page.find("#video_status .alert, .toast-body.error")
        expect(told.filter(has_text=message) if message else told.first).to_be_visible()
        page.be_ready_for_another_video()
    for path, message in (
        (clips.write_sound(tmp_path / "sound.mp4"), "sound.mp4 holds sound only"),
        (clips.write_clip(tmp_path / "lasting.mp4", 25, fps=1), "lasting.mp4 is longer than 20 seconds"),
    ):
        page.upload(path)
        expect(page.find("#video_status .alert")).to_contain_text(message)
        page.be_ready_for_another_video()
    page.open_video(files / "short.mp4")
    page.open_tool("Mask file")
    page.find("#mask input[type=file]").set_input_files(tmp_path / "text.mp4")
    expect(page.find(".toast-body").first).to_be_visible()
    page.problems.clear()  # the browser notes refused uploads on its console


def test_a_double_click_is_one_run(visit, files, tmp_path):
    page = visit()
    page.open_video(files / "short.mp4")
    page.mark_file(files / "mask.png")
    page.choose("quality", "Fast")
    page.find("#follow").dblclick()
    page.wait_for_result("6 frames in")
    assert len(read_masks(page.download("get_masks", tmp_path))) == 6
    expect(page.find(".toast-body")).to_have_count(0)


def test_loading_anew_during_a_run(visit, files, demo_server):
    page = visit()
    page.open_video(files / "long.mp4")
    page.mark_file(files / "mask.png")
    page.choose("quality", "Fast")
    page.follow()
    page.wait_for_progress()
    page.load()
    page.problems.clear()  # of the page that was left: its connection broke
    expect(page.find("#step-2")).to_be_visible()
    expect(page.find("#follow")).to_have_count(0)
    page.open_video(files / "short.mp4")
    page.mark_file(files / "mask.png")
    page.choose("quality", "Fast")
    page.follow()
    page.wait_for_result("6 frames in")
    page.remove_video()
    expect(page.find("#follow")).to_have_count(0)
    assert_no_videos(demo_server)  # neither the video that was left nor the one that was taken away


def test_a_page_that_was_offline_for_a_moment_goes_on(visit, files, demo_server):
    page = visit()
    page.open_video(files / "short.mp4")
    page.mark_file(files / "mask.png")
    page.context.set_offline(True)
    page.page.wait_for_timeout(1000)
    page.context.set_offline(False)
    page.choose("quality", "Fast")
    page.follow()
    page.wait_for_result("6 frames in")
    page.problems.clear()  # of the connection that broke


def test_two_visitors_at_once(visit, files, tmp_path):
    pages = {"short": visit(), "high": visit()}
    mask = np.pad(clips.true_ids(0), ((0, 32), (0, 0)))
    Image.fromarray(mask).save(tmp_path / "high.png")
    for name, page in pages.items():
        page.open_video(files / f"{name}.mp4")
        page.mark_file(tmp_path / "high.png" if name == "high" else files / "mask.png")
        page.choose("quality", "Fast")
    for page in pages.values():
        page.follow()
    for name, page in pages.items():
        page.wait_for_result()
        folder = tmp_path / name
        folder.mkdir()
        record = read_json(page.download("get_record", folder))
        masks = read_masks(page.download("get_masks", folder))
        assert record["video"]["name"] == f"{name}.mp4" and record["num_frames_done"] == len(masks)
        assert {ids.shape for ids in masks.values()} == {(128 if name == "high" else clips.HEIGHT, clips.WIDTH)}
        other = "high" if name == "short" else "short"
        assert f"{other}.mp4" not in page.page.content()


# Without a mouse, in the dark, on a phone


def test_the_keyboard_reaches_every_step(visit, files):
    page = visit()
    page.open_video(files / "short.mp4")
    page.mark_file(files / "mask.png")
    # The browser goes on from where the last click was: here, from the top.
    page.find("#limits").click()
    reached = []
    for _ in range(80):
        page.page.keyboard.press("Tab")
        place = page.page.evaluate("document.activeElement.closest('[id]')?.id || ''")
        visible = page.page.evaluate("document.activeElement.matches(':focus-visible')")
        assert visible or place == "", f"the focus is not to be seen in {place}"
        reached.append(page.page.evaluate(WHERE))
        if reached[-1] == "follow":
            break
    steps = ["video", "example", "frame", "tools", "mask", "objects", "name", "add", "model", "quality", "follow"]
    firsts = [reached.index(step) for step in steps if step in reached]
    assert [step for step in steps if step not in reached] == []
    assert firsts == sorted(firsts), dict(zip(steps, firsts, strict=True))


# Which part of the page has the focus.
WHERE = """() => {
    const names = ['video', 'example', 'frame', 'mask', 'objects', 'name', 'add', 'clear', 'model', 'quality',
        'direction', 'follow', 'tools'];
    return names.find(name => document.activeElement.closest('#' + name)) || '';
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(visit, files, scheme):
    page = visit(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    for step in range(2):
        if step:
            page.open_video(files / "short.mp4")
            page.open_tool("Box")
        assert page.page.evaluate("document.scrollingElement.scrollWidth") <= 390
    background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert (brightness < 60) == (scheme == "dark")
