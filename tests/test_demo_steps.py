"""What the demo's page does with every event, without a browser: the handlers, one visitor's events after another."""

import json
import sys
import threading
import time
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import demo_clips as clips
import numpy as np
import pytest
from conftest import ROOT


pytest.importorskip("gradio", reason="the demo's packages are not installed: pip install -e .[demo]")
sys.path.insert(0, str(ROOT / "demo"))

import following
import gradio as gr
import page
import steps
from steps import EXAMPLE_VIDEO, Editing, Steps
from workspace import DemoError, Limits, Workspaces


VISITOR = SimpleNamespace(session_hash="a")


class Names:
    """Components that are their own names."""

    def __getattr__(self, name):
        return name


@pytest.fixture
def demo(tmp_path, monkeypatch, tiny_model, tiny_processor, one_thread):
    """The handlers, with a model of the tests and an upload folder of their own."""

    class Tiny:
        def get(self, name):
            assert name == "Tiny"
            return tiny_model, tiny_processor

    monkeypatch.setenv("DEFORMVOS_DTYPE", "float32")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    following.native_dtype.cache_clear()
    spaces = Workspaces(tmp_path / "files" / "root", Limits(min_free_disk=1, left_seconds=100))
    yield Steps(Names(), spaces, Tiny())
    spaces.close_all()
    following.native_dtype.cache_clear()


@pytest.fixture
def upload(tmp_path):
    """Puts a file where Gradio puts it."""

    def upload(name="clip.mp4", count=6):
        folder = tmp_path / "files" / "sent" / name
        folder.mkdir(parents=True, exist_ok=True)
        return str(clips.write_clip(folder / name, count))

    return upload


def opened(demo, path):
    """What is being edited, after a video was uploaded."""
    editing = Editing()
    list(demo.open_video(path, editing, VISITOR))
    demo.show_video(editing, VISITOR)
    demo.workspaces.get("a").set_marks(0, clips.true_ids(0))
    return editing


def run(demo, editing, ticket=None):
    """All that a run shows, together."""
    shown, ticket = {}, editing.runs if ticket is None else ticket
    for each in demo.run("Tiny", "Fast", "both", ticket, editing, VISITOR):
        if isinstance(each, dict):
            shown.update(each)
    demo.show_result(editing, VISITOR)
    return shown


def followed(demo, path):
    editing = opened(demo, path)
    assert demo.begin(None, editing, VISITOR)["ticket"] == 1
    assert "6 frames in" in run(demo, editing)["run_status"]
    return editing


def is_idle(shown):
    return shown["follow"]["interactive"] and not shown["stop"]["interactive"]


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def test_a_video_that_is_opened_while_a_run_waits_ends_the_waiting(demo, upload):
    editing = opened(demo, upload())
    demo.begin(None, editing, VISITOR)
    assert editing.is_running
    list(demo.open_video(upload("next.mp4", 4), editing, VISITOR))
    assert is_idle(demo.show_video(editing, VISITOR))
    assert is_idle(run(demo, editing))
    assert demo.workspaces.get("a").num_done == 0
    demo.workspaces.get("a").set_marks(0, clips.true_ids(0))
    demo.begin(None, editing, VISITOR)
    assert is_idle(demo.close_video(editing, VISITOR))
    assert is_idle(run(demo, editing))


def test_a_video_that_is_taken_away_while_it_is_read_is_no_idle_page(demo, upload):
    editing = Editing()
    reading = demo.open_video(upload(count=30), editing, VISITOR)
    next(reading)
    demo.close_video(editing, VISITOR)
    assert [shown["video_status"] for shown in reading if "video_status" in shown][-1] == ""


def test_a_run_that_waits_can_be_called_off_and_begun_again(demo, upload):
    editing = opened(demo, upload())
    first = demo.begin(None, editing, VISITOR)["ticket"]
    stopped = demo.stop(editing, VISITOR)
    assert is_idle(stopped) and page.STOPPED_EARLY in stopped["run_status"]
    assert demo.show_editor(editing)["editor"]["visible"]
    assert demo.show_result(editing, VISITOR)["editor"]["visible"]
    second = demo.begin(None, editing, VISITOR)["ticket"]
    assert "follow" not in run(demo, editing, first)  # its turn comes, and it is not waited for any more
    assert demo.workspaces.get("a").num_done == 0
    assert editing.is_running
    assert is_idle(run(demo, editing, second))
    assert demo.workspaces.get("a").num_done == 6
    # Nothing has changed since: what is being painted stays.
    assert "editor" not in demo.show_result(editing, VISITOR)


def test_a_second_click_disturbs_no_run(demo, upload):
    editing = opened(demo, upload())
    ticket = demo.begin(None, editing, VISITOR)["ticket"]
    running = demo.run("Tiny", "Fast", "both", ticket, editing, VISITOR)
    next(running)
    assert "ticket" not in demo.begin(None, editing, VISITOR)
    assert "follow" not in run(demo, editing, ticket)
    assert is_idle(list(running)[-1])


def test_the_frame_that_was_shown_at_the_click_is_the_start(demo, upload):
    editing = opened(demo, upload())
    demo.go_to_frame(2, None, editing, VISITOR)
    demo.workspaces.get("a").set_marks(2, clips.true_ids(2))
    demo.begin(None, editing, VISITOR)
    demo.go_to_frame(5, None, editing, VISITOR)
    run(demo, editing)
    assert read_json(editing.downloads[2])["run"]["start_frame"] == 2


def test_downloads_follow_names_and_corrections(demo, upload):
    editing = followed(demo, upload())
    overlay, masks, record = editing.downloads
    demo.rename_object("Left", 1, editing, VISITOR)
    assert editing.downloads == (overlay, masks, record)  # marking waits for no file
    assert demo.save(editing, VISITOR)["get_record"] == str(editing.downloads[2]) != str(record)
    assert not masks.exists() and not record.exists() and overlay.exists()
    assert read_json(editing.downloads[2])["objects"][0]["name"] == "Left"
    assert read_json(editing.downloads[2])["run"]["frames"] == 6
    demo.go_to_frame(3, None, editing, VISITOR)
    found = demo.workspaces.get("a").mask(3)
    demo.enter_box(*clips.boxes(0)[1], editing, VISITOR)
    assert demo.save(editing, VISITOR)["get_masks"] == str(editing.downloads[1])
    assert read_json(editing.downloads[2])["mask_frames"] == [0, 3]
    demo.clear_frame(editing, VISITOR)
    assert np.array_equal(demo.workspaces.get("a").mask(3), found)
    demo.clear_frame(editing, VISITOR)
    demo.save(editing, VISITOR)
    with zipfile.ZipFile(editing.downloads[1]) as archive:
        assert [int(name[6:11]) for name in archive.namelist()] == [0, 1, 2, 4, 5]
    demo.go_to_frame(4, None, editing, VISITOR)
    assert "get_masks" not in demo.save(editing, VISITOR)  # nothing new
    assert overlay.exists()


@pytest.mark.parametrize("change", ["mark", "run", "video"])
def test_what_changes_while_downloads_are_saved_is_saved_after_them(demo, upload, monkeypatch, change):
    editing = followed(demo, upload())
    earlier, write = editing.downloads, steps.write_json
    demo.rename_object("Left", 1, editing, VISITOR)

    def write_late(*args):
        write(*args)
        if change == "mark":
            demo.enter_box(*clips.boxes(0)[1], editing, VISITOR)
        elif change == "run":
            assert demo.begin(None, editing, VISITOR)["ticket"] == 2
        else:
            list(demo.open_video(upload("next.mp4", 4), editing, VISITOR))

    with monkeypatch.context() as patch:
        patch.setattr(steps, "write_json", write_late)
        patch.setattr(gr, "Warning", lambda *args, **kwargs: pytest.fail("There is nothing to warn of."))
        assert "get_masks" not in demo.save(editing, VISITOR)
    assert editing.downloads == (() if change == "video" else earlier)
    folders = list((demo.workspaces.get("a").folder / "downloads").iterdir())
    assert folders == [earlier[0].parent]
    assert ("get_masks" in demo.save(editing, VISITOR)) == (change == "mark")
    if change == "run":
        assert "6 frames in" in run(demo, editing)["run_status"]


def test_a_disk_that_is_full_when_downloads_are_saved_is_told(demo, upload, monkeypatch):
    editing, told = followed(demo, upload()), []
    earlier = editing.downloads
    demo.rename_object("Left", 1, editing, VISITOR)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "write_masks_zip", full)
        patch.setattr(gr, "Warning", lambda text, title: told.append(text))
        demo.save(editing, VISITOR)
        demo.begin(None, editing, VISITOR)
        assert "disk of this machine is full" in run(demo, editing)["run_status"]
    assert len(told) == 1 and page.NOT_SAVED in told[0] and "disk of this machine is full" in told[0]
    assert editing.downloads == earlier and all(path.exists() for path in earlier)
    assert demo.save(editing, VISITOR)["get_masks"] == str(editing.downloads[1])


def test_downloads_stay_until_the_next_ones_are_written(demo, upload, monkeypatch):
    editing = followed(demo, upload())
    earlier = editing.downloads

    def broken(*args):
        assert all(path.exists() for path in earlier)
        raise DemoError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "write_json", broken)
        demo.begin(None, editing, VISITOR)
        assert "The disk is full." in run(demo, editing)["run_status"]
    folder = demo.workspaces.get("a").folder / "downloads"
    assert editing.downloads == earlier and len(list(folder.iterdir())) == 1
    demo.begin(None, editing, VISITOR)
    run(demo, editing)
    assert not any(path.exists() for path in earlier)
    assert len(list(folder.iterdir())) == 1


def test_a_video_that_was_removed_is_told_once(demo, upload):
    events = {
        "slider": lambda editing: demo.go_to_frame(2, None, editing, VISITOR),
        "clear": lambda editing: demo.clear_frame(editing, VISITOR),
        "scrub": lambda editing: demo.scrub(2, editing, VISITOR),
        "follow": lambda editing: demo.begin(None, editing, VISITOR),
    }
    for event in events.values():
        editing = opened(demo, upload())
        demo.workspaces.close("a")
        shown = event(editing)
        assert page.GONE in shown["video_status"]
        assert shown["mark_panel"]["visible"] is False and shown["mark_empty"]["visible"]
        assert not editing.has_video
        assert is_idle(run(demo, editing))


def test_leaving_for_a_moment_costs_nothing(demo, upload):
    editing = opened(demo, upload())
    demo.begin(None, editing, VISITOR)
    running = demo.run("Tiny", "Fast", "both", editing.runs, editing, VISITOR)
    next(running)
    demo.leave(VISITOR)
    demo.workspaces.sweep()
    assert is_idle(list(running)[-1])
    assert list(demo.workspaces.get("a").marks) == [0]
    assert demo.workspaces.get("a").num_done == 6


def test_who_waits_for_a_run_keeps_the_video(demo, upload):
    demo.workspaces.limits = replace(demo.workspaces.limits, max_workspaces=1)
    editing = opened(demo, upload())
    demo.begin(None, editing, VISITOR)
    workspace = demo.workspaces.get("a")
    workspace.last_used -= 10_000
    demo.workspaces.sweep()
    with pytest.raises(DemoError, match="Many people"):
        demo.workspaces.get("b")
    assert "6 frames in" in run(demo, editing)["run_status"]
    assert not workspace.is_waiting
    demo.begin(None, editing, VISITOR)
    demo.stop(editing, VISITOR)
    assert not workspace.is_waiting
    demo.begin(None, editing, VISITOR)
    list(demo.open_video(upload("next.mp4", 4), editing, VISITOR))
    assert not workspace.is_waiting


def test_who_leaves_while_a_run_waits_makes_room_and_is_told(demo, upload):
    demo.workspaces.limits = replace(demo.workspaces.limits, max_workspaces=1)
    editing = opened(demo, upload())
    demo.begin(None, editing, VISITOR)
    demo.leave(VISITOR)
    demo.workspaces.get("a").last_used -= 1
    demo.workspaces.get("b")
    shown = run(demo, editing)
    assert is_idle(shown) and page.GONE in shown["video_status"] and shown["run_status"] == ""
    assert shown["follow_panel"]["visible"] is False and shown["follow_empty"]["visible"]


def test_a_page_whose_connection_broke_during_a_run_can_go_on(demo, upload):
    editing = opened(demo, upload())
    running = demo.run("Tiny", "Fast", "both", demo.begin(None, editing, VISITOR)["ticket"], editing, VISITOR)
    next(running)
    running.close()
    assert is_idle(demo.show_editor(editing))
    stopped = demo.stop(editing, VISITOR)
    assert is_idle(stopped) and stopped["run_status"] == stopped["live"] == ""
    demo.begin(None, editing, VISITOR)
    assert "6 frames in" in run(demo, editing)["run_status"]


def test_uploads_are_kept_as_long_as_the_page_plays_them(demo, upload, tmp_path):
    editing = opened(demo, upload())
    first = demo.workspaces.get("a").source
    assert first.exists()
    mask = clips.write_mask(tmp_path / "files" / "sent" / "mask.png")
    demo.take_mask(str(mask), editing, VISITOR)
    shown = list(demo.open_video(upload("next.mp4", 4), editing, VISITOR))[-1]
    assert "video" not in shown
    assert not first.exists() and not mask.exists()
    # What browsers cannot play is not shown, and not kept.
    path = clips.write_clip(tmp_path / "files" / "sent" / "other.mp4", 4)
    path = path.replace(path.with_suffix(".avi"))
    shown = list(demo.open_video(str(path), editing, VISITOR))[-1]
    assert shown["video"] is None and "there is no preview" in shown["video_status"]
    assert not path.exists()
    assert list(demo.open_example(editing, VISITOR))[-1]["video"] == str(EXAMPLE_VIDEO)
    assert EXAMPLE_VIDEO.exists()


def test_the_example_leaves_the_preview_of_a_video_that_is_being_read(demo, upload):
    editing, path = Editing(), upload()
    reading = demo.workspaces.get("a").import_video(path)
    next(reading)
    shown = list(demo.open_example(editing, VISITOR))[-1]
    assert "still reading" in shown["video_status"] and "video" not in shown
    assert list(reading)[-1][0] == 6


def test_a_name_for_an_object_that_is_no_more(demo, upload):
    editing = opened(demo, upload())
    assert "objects" not in demo.rename_object("Late", 7, editing, VISITOR)


def test_a_picture_of_hardly_any_height_is_shown():
    assert "data:image/jpeg" in page.picture(np.zeros((2, 4096, 3), np.uint8), "flat")


def call(demo, tmp_path, count=6, **settings):
    video, mask = clips.write_clip(tmp_path / "clip.mp4", count), clips.write_mask(tmp_path / "mask.png")
    settings = {"frame": 0, "model": "Tiny", "quality": "Fast", **settings}
    return demo.segment(str(video), str(mask), **settings)


def test_a_program_that_does_not_wait_frees_the_model(demo, tmp_path):
    job = call(demo, tmp_path)
    threads = threading.active_count()
    assert [next(job), next(job)] == [(None, None, None)] * 2
    assert len(demo.workspaces) == 1
    job.close()
    assert len(demo.workspaces) == 0
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == threads
    assert all(steps.Path(path).is_file() for path in list(call(demo, tmp_path))[-1])
    job = call(demo, tmp_path)
    paths = next(paths for paths in job if paths[0])
    job.close()
    assert not any(steps.Path(path).exists() for path in paths)


def test_a_program_without_a_frame_is_told(demo, tmp_path):
    with pytest.raises(gr.Error, match="number of the mask's frame"):
        list(call(demo, tmp_path, frame=None))
