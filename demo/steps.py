"""What happens on the page: every function here answers one event, for one visitor."""

from __future__ import annotations

import functools
import logging
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import cv2
import gradio as gr
import numpy as np
import page
import pandas as pd
from exports import write_json, write_masks_zip, write_overlay
from following import Models, Progress, follow
from gradio.utils import get_upload_folder
from marking import box_to_mask, id_map_to_layer, layers_to_id_map, mask_file_to_id_map
from stamps import NUMBERS, cornered, has_corners, read_stamp, stamped
from workspace import LIMITS, PALETTE, DemoError, Workspace, Workspaces, on_disk


logger = logging.getLogger(__name__)

_EXAMPLES = Path(__file__).resolve().parent / "examples"
EXAMPLE_VIDEO, EXAMPLE_MASK = _EXAMPLES / "bunny.mp4", _EXAMPLES / "bunny_mask.png"
EXAMPLE_NAMES = ("Rabbit", "Ruin")

# Painted areas let the picture shine through; above one half, or they would not count as painted.
_ALPHA = 166
# The brush's radius is such a part of the picture's shorter side; Gradio's own choice does not look at the picture.
_BRUSHES = 24
# Pixels that the box tool's picture has across, where the video has fewer.
_BOX_WIDTH = 640
# Seconds between two pictures of the progress of reading a file, and between two looks whether a program still waits.
_INTERVAL, _LOOK = 0.25, 1.0


@dataclass
class Editing:
    """
    What a visitor is about to mark.

    Attributes:
        frame (`int`): shown in step 2.
        tool (`str`): brush, box or file.
        given (`np.ndarray`, *optional*): what the editor was loaded with; what differs was painted since.
        given_frame (`int`): the frame that the editor was loaded with.
        is_hidden (`bool`): whether the editor was taken off the page for a run.
        load (`int`): how often the editor was loaded; its picture carries the number.
        radius (`int`): of the brush, in pixels of the video.
        obj_id (`int`): the object that brush and box mark.
        names (`list[str]`): of the objects 1, 2 and so on.
        corner (`tuple[int, int]`, *optional*): the first corner of a box.
        is_running, is_cancelled (`bool`): whether a run was asked for, and whether it was called off.
        runs, waiting (`int`): how many runs were asked for, and the number of the one that waits for its turn, else 0.
        start (`int`): the frame that the last run starts from.
        has_video (`bool`): whether a video was opened; if there is none then, it was removed meanwhile.
        has_news (`bool`): whether there is a new video, or a new result, that the page does not show yet.
        downloads (`tuple[Path, ...]`): video, masks and record of the last run.
        facts (`dict`): what the record says of the last run.
        saved (`tuple`): what the masks and the record were written from.
    """

    frame: int = 0
    tool: str = "brush"
    given: np.ndarray | None = None
    given_frame: int = 0
    is_hidden: bool = False
    load: int = 0
    radius: int = 15
    obj_id: int = 1
    names: list[str] = field(default_factory=lambda: ["Object 1"])
    corner: tuple[int, int] | None = None
    is_running: bool = False
    is_cancelled: bool = False
    runs: int = 0
    waiting: int = 0
    start: int = 0
    has_video: bool = False
    has_news: bool = False
    downloads: tuple[Path, ...] = ()
    facts: dict = field(default_factory=dict)
    saved: tuple = ()

    def begin_anew(self, **given):
        """For another video, or for none; what is counted goes on."""
        self.__init__(load=self.load, runs=self.runs, **given)


class VideoGone(DemoError):
    """The video was removed while nobody used the page."""


def guarded(handler):
    """Turns the visitor's mistakes into a message, everything else into a sentence and an entry in the log."""

    @functools.wraps(handler)
    def guard(*args, **kwargs):
        try:
            return handler(*args, **kwargs)
        except VideoGone as error:
            return args[0].close_steps(str(error))
        except DemoError as error:
            gr.Warning(str(error), title="Not yet")
        except Exception:
            logger.exception("An event failed.")
            gr.Warning(page.UNEXPECTED, title="Sorry")
        return gr.skip()

    return guard


class Steps:
    """
    The events of the page.

    Args:
        ui (`SimpleNamespace`): the components, by name.
        workspaces ([`Workspaces`]): the visitors' videos.
        models ([`Models`]): what follows.
    """

    def __init__(self, ui: SimpleNamespace, workspaces: Workspaces, models: Models):
        self.ui, self.workspaces, self.models = ui, workspaces, models

    def _workspace(self, request: gr.Request, editing: Editing | None = None) -> Workspace:
        """The visitor's workspace; `VideoGone` if it was removed and what is being edited with it."""
        if editing is None or not editing.has_video:
            return self.workspaces.get(request.session_hash)
        with suppress(DemoError):  # somebody else has its place
            workspace = self.workspaces.get(request.session_hash)
            if workspace.facts is not None:
                return workspace
        editing.begin_anew()
        raise VideoGone(page.GONE)

    def leave(self, request: gr.Request):
        """The page was closed or loaded anew, or the connection broke."""
        self.workspaces.leave(request.session_hash)

    # 1 Video

    def open_video(self, path: str | None, editing: Editing, request: gr.Request) -> Iterator[dict]:
        """Reads an uploaded or recorded video."""
        if path is not None:
            yield from self._open(Path(path), None, editing, request)

    def open_example(self, editing: Editing, request: gr.Request) -> Iterator[dict]:
        """Takes the example with its marks, so that it can be followed at once."""
        yield from self._open(EXAMPLE_VIDEO, EXAMPLE_MASK, editing, request)

    def hide_steps(self) -> dict:
        """While a video is read there is nothing to mark."""
        ui = self.ui
        return {
            **{each: gr.update(visible=True) for each in (ui.mark_empty, ui.follow_empty, ui.result_empty)},
            **{each: gr.update(visible=False) for each in (ui.mark_panel, ui.follow_panel, ui.result_panel)},
        }

    def close_steps(self, why: str) -> dict:
        """There is no video any more."""
        return {**self.hide_steps(), self.ui.video: None, self.ui.video_status: page.alert(why)}

    def _open(self, path: Path, mask: Path | None, editing: Editing, request: gr.Request) -> Iterator[dict]:
        ui, kept, workspace = self.ui, "", None
        editing.has_news = False
        try:
            workspace = self._workspace(request)
            kept = f" {workspace.facts.name} is still open." if workspace.facts else ""
            if mask is None:
                workspace.receive(path)
            told = 0.0
            for done, expected in workspace.import_video(path):
                if time.monotonic() - told > _INTERVAL:
                    told = time.monotonic()
                    of = f" of about {expected}" if expected else ""
                    share = min(done / expected, 1.0) if expected else None
                    yield {ui.video_status: page.progress_bar(share, f"Reading the video: {done}{of} frames")}
            editing.begin_anew(has_news=True, has_video=True)
            workspace.waiting_since = None
            has_preview = mask is not None or workspace.is_playable
            workspace.source = path if mask is None and has_preview else None
            self._discard_uploads(workspace)
            if mask is not None:
                workspace.set_marks(0, mask_file_to_id_map(mask, self._size(workspace)))
                editing.names = list(EXAMPLE_NAMES)
            self._name_objects(workspace, editing)
        except DemoError as error:
            # The visitor may have taken the video away while it was read, and knows.
            gone = workspace is not None and workspace.is_closed and not editing.has_video
            yield {**self._without_preview(mask), ui.video_status: "" if gone else page.alert(str(error) + kept)}
        except Exception:
            logger.exception("A video could not be opened.")
            yield {**self._without_preview(mask), ui.video_status: page.alert(page.UNEXPECTED + kept)}
        else:
            shown = {ui.video: str(path)} if mask is not None else {} if has_preview else {ui.video: None}
            yield {**shown, ui.video_status: page.facts_line(workspace.facts, has_preview)}

    def _without_preview(self, mask: Path | None) -> dict:
        """Takes away the preview of an upload; the example has none before it is open."""
        return {} if mask is not None else {self.ui.video: None}

    def _discard_uploads(self, workspace: Workspace):
        """Of what was uploaded for this video and for earlier ones, keeps only what the page plays."""
        earlier, workspace.uploads = workspace.uploads, {}
        if workspace.source in earlier:
            workspace.uploads[workspace.source] = earlier.pop(workspace.source)
        self.workspaces.discard(earlier)

    @guarded
    def show_video(self, editing: Editing, request: gr.Request) -> dict:
        """Opens the steps again, for a video that has just been read or for the one before it."""
        workspace, ui = self._workspace(request, editing), self.ui
        if workspace.facts is None:
            return gr.skip()
        updates = {
            **({} if editing.is_running else self._idle()),
            ui.mark_empty: gr.update(visible=False),
            ui.mark_panel: gr.update(visible=True),
            ui.follow_empty: gr.update(visible=False),
            ui.follow_panel: gr.update(visible=True),
            ui.frame: self._slider(workspace, editing.frame),
            ui.tools: gr.update(selected=editing.tool),
            **self._show_frame(workspace, editing),
            **self._show_object(editing),
        }
        if editing.has_news:
            editing.has_news = False
            return {**updates, ui.mask: None, ui.run_status: "", ui.live: ""}
        has_result = bool(editing.downloads)
        shown = {ui.result_empty: gr.update(visible=not has_result), ui.result_panel: gr.update(visible=has_result)}
        return {**updates, **shown}

    @staticmethod
    def _slider(workspace: Workspace, frame_idx: int) -> dict:
        last = workspace.facts.num_frames - 1
        return gr.update(value=frame_idx, maximum=max(last, 1), interactive=last > 0)

    @guarded
    def close_video(self, editing: Editing, request: gr.Request) -> dict:
        """The visitor took the video away."""
        ui = self.ui
        self.workspaces.close(request.session_hash)
        editing.begin_anew()
        return {ui.video_status: "", ui.run_status: "", ui.live: "", **self.hide_steps(), **self._idle()}

    # 2 Mark

    @staticmethod
    def _size(workspace: Workspace) -> tuple[int, int]:
        if workspace.facts is None:
            raise DemoError("There is no video yet. Upload one first.")
        return workspace.facts.height, workspace.facts.width

    @staticmethod
    def _ids(workspace: Workspace, frame_idx: int) -> np.ndarray | None:
        """What is marked on a frame, else what was found there."""
        ids = workspace.marks.get(frame_idx)
        return workspace.mask(frame_idx) if ids is None else ids

    def _name_objects(self, workspace: Workspace, editing: Editing):
        """There are names for all objects; the workspace has those of objects that are there."""
        present = workspace.object_ids
        for obj_id in range(len(editing.names) + 1, max(present, default=0) + 1):
            editing.names.append(f"Object {obj_id}")
        for obj_id in present:
            workspace.names[obj_id] = editing.names[obj_id - 1]

    def _commit(self, workspace: Workspace, editing: Editing, editor_value: dict | None) -> bool:
        """Keeps what was painted since the editor was loaded; whether all that it was loaded with is there."""
        if editing.given is None or not (editor_value or {}).get("layers"):
            return False
        number = read_stamp(editor_value.get("background"))
        if number not in (None, editing.load % NUMBERS):
            return False  # it still has the picture of another frame, so nothing can have been painted on this one
        ids = layers_to_id_map(editor_value, PALETTE, self._size(workspace))
        has_layer = any(map(has_corners, editor_value["layers"]))
        if not has_layer:
            ids = np.where(ids > 0, ids, editing.given)  # its layer is still on the way: nothing was rubbed out
        painted = ids != editing.given
        if painted.any():
            # Only the strokes: a box or a file may have marked more meanwhile.
            marked = self._ids(workspace, editing.given_frame)
            marked = editing.given if marked is None else marked
            workspace.set_marks(editing.given_frame, np.where(painted, ids, marked))
            editing.given = ids
            self._name_objects(workspace, editing)
        return has_layer and number is not None

    def _show_frame(self, workspace: Workspace, editing: Editing, reload: bool = True) -> dict:
        """The frame in the tool that is open, and what is marked on it; without `reload` the editor stays as it is."""
        ui, frame_idx = self.ui, editing.frame
        ids = self._ids(workspace, frame_idx)
        editing.corner = None
        updates = {
            ui.objects: self._objects(editing),
            ui.add: gr.update(interactive=len(editing.names) < LIMITS.max_objects),
            ui.marked: page.marked_table(workspace, editing.names, frame_idx, ids),
            ui.start: page.hint(f"Starts at {page.frame_label(workspace, frame_idx)}, the one shown above."),
            **self._unsaved(workspace, editing),
        }
        if editing.tool == "brush" and reload:
            image = workspace.frames[frame_idx]
            editing.given = np.zeros(image.shape[:2], dtype=np.uint8) if ids is None else ids
            editing.given_frame, editing.is_hidden = frame_idx, editing.is_running
            layer = cornered(id_map_to_layer(editing.given, PALETTE, _ALPHA))
            editing.load += 1
            editing.radius = max(round(min(image.shape[:2]) / _BRUSHES), 2)
            image = workspace.keep_picture("editor", stamped(image, editing.load % NUMBERS))
            layer = workspace.keep_picture("layer", layer)
            updates[ui.editor] = gr.update(
                value={"background": str(image), "layers": [str(layer)], "composite": None},
                brush=brush(editing.obj_id, editing.radius),
                eraser=gr.Eraser(default_size=editing.radius),
                visible=not editing.is_running,
            )
            updates[ui.resting] = self._resting(workspace, editing) if editing.is_running else ""
        if editing.tool == "box":
            updates[ui.box_picture] = self._box_picture(workspace, self._enlarged(workspace, frame_idx))
            updates[ui.box_hint] = page.hint(page.BOX_HINT)
        if editing.tool == "file":
            text = f"{page.frame_label(workspace, frame_idx)}, as it is marked"
            updates[ui.file_picture] = page.picture(workspace.overlay(frame_idx), text.capitalize())
        return updates

    def _is_in_editor(self, workspace: Workspace, editing: Editing) -> bool:
        """Whether the editor was loaded with the frame as it is marked now."""
        if editing.is_hidden or editing.given_frame != editing.frame:
            return False
        ids = self._ids(workspace, editing.frame)
        return np.array_equal(editing.given, np.zeros_like(editing.given) if ids is None else ids)

    def _resting(self, workspace: Workspace, editing: Editing) -> str:
        """What stands in the editor's place during a run: Gradio reads the editor with every sign of progress."""
        text = f"{self._caption(workspace, editing.frame)}, as it is marked. The brush rests until the run is over."
        return page.picture(workspace.overlay(editing.frame), text)

    @staticmethod
    def _enlargement(workspace: Workspace) -> int:
        """How much larger the box tool shows a small video: Gradio shows pictures at their own size at most."""
        return max(_BOX_WIDTH // workspace.facts.width, 1)

    def _enlarged(self, workspace: Workspace, frame_idx: int) -> np.ndarray:
        """A frame with its marks for the box tool."""
        times = self._enlargement(workspace)
        image = workspace.overlay(frame_idx)
        return image if times == 1 else cv2.resize(image, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)

    @staticmethod
    def _box_picture(workspace: Workspace, image: np.ndarray) -> str:
        return str(workspace.keep_picture("box", image, ".jpg"))

    @staticmethod
    def _choices(editing: Editing) -> list[tuple[str, int]]:
        return [(name or f"Object {i}", i) for i, name in enumerate(editing.names, start=1)]

    def _objects(self, editing: Editing) -> dict:
        """The objects to choose from; not which one is chosen: a visitor may be choosing or naming one just now."""
        return gr.update(choices=self._choices(editing))

    def _show_object(self, editing: Editing) -> dict:
        """The chosen object: for what chooses one, and nothing else."""
        return {
            self.ui.objects: gr.update(choices=self._choices(editing), value=editing.obj_id),
            self.ui.name: editing.names[editing.obj_id - 1],
            self.ui.named: editing.obj_id,
        }

    @guarded
    def go_to_frame(self, frame: float, editor_value: dict, editing: Editing, request: gr.Request) -> dict:
        """Another frame to mark; what was painted on the last one is kept."""
        workspace = self._workspace(request, editing)
        frame_idx = int(frame or 0)
        if frame_idx == editing.frame or workspace.facts is None or frame_idx >= workspace.facts.num_frames:
            return gr.skip()
        self._commit(workspace, editing, editor_value)
        editing.frame = frame_idx
        return self._show_frame(workspace, editing)

    @guarded
    def settle(self, frame: float, editing: Editing, request: gr.Request) -> dict:
        """The frame that the slider came to rest on: its events may arrive in another order than they were sent."""
        workspace, frame_idx = self._workspace(request, editing), int(frame or 0)
        if frame_idx == editing.frame or workspace.facts is None or frame_idx >= workspace.facts.num_frames:
            return gr.skip()
        editing.frame = frame_idx
        return self._show_frame(workspace, editing)

    @guarded
    def use_tool(self, tool: str, editor_value: dict, editing: Editing, request: gr.Request) -> dict:
        """A tool was opened: brush, box or file."""
        workspace = self._workspace(request, editing)
        if workspace.facts is None:
            return gr.skip()
        has_arrived = self._commit(workspace, editing, editor_value)
        if tool == editing.tool:
            return gr.skip()
        editing.tool = tool
        # Loading wipes out strokes that are painted meanwhile.
        is_there = has_arrived and self._is_in_editor(workspace, editing)
        return self._show_frame(workspace, editing, reload=not is_there)

    @guarded
    def choose_object(self, obj_id: int, editing: Editing) -> dict:
        """Another object to mark, in its own colour."""
        editing.obj_id = int(obj_id)
        return {
            **self._show_object(editing),
            self.ui.editor: gr.update(brush=brush(editing.obj_id, editing.radius)),
        }

    @guarded
    def add_object(self, editing: Editing) -> dict:
        """One more object."""
        if len(editing.names) >= LIMITS.max_objects:
            raise DemoError(f"Up to {LIMITS.max_objects} objects can be followed at once.")
        editing.names.append(f"Object {len(editing.names) + 1}")
        editing.obj_id = len(editing.names)
        return {
            **self._show_object(editing),
            self.ui.editor: gr.update(brush=brush(editing.obj_id, editing.radius)),
            self.ui.add: gr.update(interactive=len(editing.names) < LIMITS.max_objects),
        }

    @guarded
    def rename_object(self, name: str, obj_id: int, editing: Editing, request: gr.Request) -> dict:
        """The name of an object; by now, another one may be chosen."""
        workspace = self._workspace(request, editing)
        name = " ".join((name or "").split())[:40] or f"Object {obj_id}"
        # The object may be one of the video before this one.
        if workspace.facts is None or obj_id > len(editing.names) or name == editing.names[obj_id - 1]:
            return gr.skip()
        editing.names[obj_id - 1] = name
        self._name_objects(workspace, editing)
        ids = self._ids(workspace, editing.frame)
        return {
            self.ui.objects: self._objects(editing),
            self.ui.marked: page.marked_table(workspace, editing.names, editing.frame, ids),
            self.ui.plot: self._plot(workspace),
            **self._unsaved(workspace, editing),
        }

    @guarded
    def click_corner(self, editing: Editing, request: gr.Request, event: gr.SelectData) -> dict:
        """A click on the picture of the box tool: the first corner, or the second."""
        workspace, place = self._workspace(request, editing), (int(event.index[0]), int(event.index[1]))
        self._size(workspace)
        editing.tool = "box"
        point = tuple(number // self._enlargement(workspace) for number in place)
        if editing.corner is None:
            editing.corner = point
            image, shade = self._enlarged(workspace, editing.frame), PALETTE[editing.obj_id].tolist()
            image = cv2.drawMarker(image, place, shade, cv2.MARKER_CROSS, 24, 3)
            return {
                self.ui.box_picture: self._box_picture(workspace, image),
                self.ui.box_hint: page.note(page.BOX_SECOND),
                self.ui.left: point[0],
                self.ui.top: point[1],
            }
        box = (*editing.corner, *point)
        corners = {self.ui.left: box[0], self.ui.top: box[1], self.ui.right: box[2], self.ui.bottom: box[3]}
        return {**self._mark_box(workspace, editing, box), **corners}

    @guarded
    def enter_box(
        self, left: float, top: float, right: float, bottom: float, editing: Editing, request: gr.Request
    ) -> dict:
        """A box by its numbers."""
        if None in (left, top, right, bottom):
            raise DemoError("A box needs four numbers: left, top, right and bottom, in pixels.")
        return self._mark_box(self._workspace(request, editing), editing, (left, top, right, bottom))

    def _mark_box(self, workspace: Workspace, editing: Editing, box: tuple) -> dict:
        size, obj_id = self._size(workspace), editing.obj_id
        editing.tool, editing.corner = "box", None
        found = box_to_mask(workspace.frames[editing.frame], box)
        ids = self._ids(workspace, editing.frame)
        ids = np.zeros(size, dtype=np.uint8) if ids is None else ids.copy()
        ids[ids == obj_id] = 0
        ids[found.mask] = obj_id
        workspace.set_marks(editing.frame, ids)
        self._name_objects(workspace, editing)
        name = editing.names[obj_id - 1]
        done = f"{name} is marked. Not quite? Mend it with the brush, or click a new box."
        if not found.refined:
            done = f"No clear outline there: the whole box is {name} now. Mend it with the brush, or click a new box."
        return {**self._show_frame(workspace, editing), self.ui.box_hint: page.note(done)}

    @guarded
    def take_mask(self, path: str | None, editing: Editing, request: gr.Request) -> dict:
        """A mask from a file takes the place of what is marked on the frame."""
        if path is None:
            return gr.skip()
        workspace = self._workspace(request, editing)
        workspace.receive(Path(path))
        editing.tool = "file"
        workspace.set_marks(editing.frame, mask_file_to_id_map(path, self._size(workspace)))
        self._name_objects(workspace, editing)
        return self._show_frame(workspace, editing)

    @guarded
    def clear_frame(self, editing: Editing, request: gr.Request) -> dict:
        """Forgets the marks of the frame; what was found there before comes back, or nothing stays."""
        workspace = self._workspace(request, editing)
        self._size(workspace)
        workspace.clear_frame(editing.frame)
        return self._show_frame(workspace, editing)

    # 3 Follow

    def begin(self, editor_value: dict, editing: Editing, request: gr.Request) -> dict:
        """Takes what is painted and makes the page ready for `run`, or says why there is nothing to run."""
        try:
            workspace = self._workspace(request, editing)
            if editing.is_running or workspace.is_busy:
                return gr.skip()  # a second click
            self._commit(workspace, editing, editor_value)
            ids = self._ids(workspace, editing.frame)
            if editing.frame not in workspace.marks and ids is not None:
                workspace.set_marks(editing.frame, ids)
            if not workspace.marks:
                raise DemoError("Nothing is marked yet. Paint over an object, box it, or upload a mask in step 2.")
        except VideoGone as error:
            return self.close_steps(str(error))
        except DemoError as error:
            return {self.ui.run_status: page.alert(str(error))}
        except Exception:
            logger.exception("A run did not begin.")
            return {self.ui.run_status: page.alert(page.UNEXPECTED)}
        editing.is_running, editing.is_cancelled, editing.is_hidden = True, False, True
        editing.runs += 1
        editing.waiting, editing.start, workspace.waiting_since = editing.runs, editing.frame, time.monotonic()
        return {
            self.ui.ticket: editing.runs,
            self.ui.follow: gr.update(interactive=False),
            self.ui.stop: gr.update(interactive=True),
            self.ui.run_status: page.progress_bar(None, page.WAITING),
            self.ui.live: page.picture(workspace.overlay(editing.frame), self._caption(workspace, editing.frame)),
            self.ui.editor: gr.update(visible=False),
            self.ui.resting: self._resting(workspace, editing),
            self.ui.marked: page.marked_table(workspace, editing.names, editing.frame, ids),
        }

    @staticmethod
    def _caption(workspace: Workspace, frame_idx: int) -> str:
        return page.frame_label(workspace, frame_idx).capitalize()

    @guarded
    def stop(self, editing: Editing, request: gr.Request) -> dict:
        """Ends the run; what is done stays. A run that waits for its turn is over at once, and never gets it."""
        editing.is_cancelled = True
        if not editing.is_running:  # the connection broke, and the run with it, or it has just ended
            return {**self._idle(), self.ui.run_status: "", self.ui.live: ""}
        workspace = self._workspace(request, editing)
        if not editing.waiting:
            workspace.stop.set()
            return {self.ui.stop: gr.update(interactive=False)}
        editing.waiting, editing.is_running, workspace.waiting_since = 0, False, None
        return {**self._idle(), self.ui.run_status: page.note(page.STOPPED_EARLY), self.ui.live: ""}

    def run(
        self, model: str, quality: str, direction: str, ticket: float, editing: Editing, request: gr.Request
    ) -> Iterator[dict]:
        """Follows, shows every few frames, and writes what there is to download."""
        if not editing.waiting or ticket != editing.waiting:
            # `begin` found a reason, or it was called off while it waited, or another run goes on.
            yield gr.skip() if editing.is_running else self._idle()
            return
        editing.waiting, workspace = 0, None
        try:
            workspace, text, started = self._workspace(request, editing), page.STOPPED_EARLY, time.monotonic()
            workspace.waiting_since = None
            for progress in follow(workspace, self.models, model, quality, editing.start, direction):
                if editing.is_cancelled:  # it may have been before `follow` began to listen
                    workspace.stop.set()
                shown = workspace.overlay(progress.frame_idx)
                yield {
                    self.ui.run_status: page.run_progress(progress),
                    self.ui.live: page.picture(shown, self._caption(workspace, progress.frame_idx)),
                }
            editing.facts = run_facts(model, quality, direction, editing.start, progress, started)
            writing = page.progress_bar(None, page.WRITING)
            yield {self.ui.stop: gr.update(interactive=False), self.ui.run_status: writing}
            if workspace.num_done:
                yield from self._export(workspace, editing)
                text = page.run_summary(editing.facts)
            yield {**self._idle(), self.ui.run_status: page.note(text)}
        except VideoGone as error:
            yield {**self._idle(), self.ui.run_status: "", self.ui.live: "", **self.close_steps(str(error))}
        except DemoError as error:
            gone = workspace is not None and workspace.is_closed  # the visitor took the video away, and knows
            yield {**self._idle(), self.ui.run_status: "" if gone else page.alert(str(error))}
        except Exception:
            logger.exception("A run failed.")
            yield {**self._idle(), self.ui.run_status: page.alert(page.UNEXPECTED)}
        finally:
            if ticket == editing.runs:
                editing.is_running = False

    def _idle(self) -> dict:
        return {self.ui.follow: gr.update(interactive=True), self.ui.stop: gr.update(interactive=False)}

    # 4 Result

    def show_editor(self, editing: Editing) -> dict:
        """
        Puts the editor on the page again; a picture that came along with it would not be shown. Frees the buttons as
        well: a run that was broken off has not.
        """
        if editing.is_running:
            return gr.skip()
        return {self.ui.editor: gr.update(visible=True), self.ui.resting: "", **self._idle()}

    def _export(self, workspace: Workspace, editing: Editing) -> Iterator[dict]:
        """Writes the downloads; the earlier ones stay until all of the new ones are there."""
        told, saved = 0.0, self._state(workspace)
        with _new_downloads(workspace) as paths:
            for share in write_overlay(workspace, paths[0]):
                if time.monotonic() - told > _INTERVAL:
                    told = time.monotonic()
                    yield {self.ui.run_status: page.progress_bar(share, page.WRITING)}
            with workspace.busy("packing the masks"):
                write_masks_zip(workspace, paths[1])
                write_json(workspace, paths[2], editing.facts)
        self._offer(editing, paths, saved)
        editing.has_news = True

    @staticmethod
    def _state(workspace: Workspace) -> tuple:
        """What masks and record depend on."""
        return workspace.version, workspace.labels()

    @staticmethod
    def _offer(editing: Editing, paths: tuple[Path, ...], saved: tuple):
        """Takes new downloads in the place of earlier ones."""
        earlier, editing.downloads, editing.saved = editing.downloads, paths, saved
        for path in set(earlier) - set(paths):
            with suppress(OSError):
                path.unlink()
                path.parent.rmdir()

    def _unsaved(self, workspace: Workspace, editing: Editing) -> dict:
        """Lets `save` be called, where a mark, a result or a name is another one since the downloads were written."""
        state = self._state(workspace)
        is_saved = state == editing.saved or not editing.downloads or not workspace.num_done
        return {} if is_saved or editing.is_running else {self.ui.unsaved: repr(state)}

    @guarded
    def save(self, editing: Editing, request: gr.Request) -> dict:
        """
        Masks and record anew, where a mark, a result or a name is another one since they were written. The video stays
        as it is: it takes as long as a run, and is written by the next one. Marking goes on meanwhile; what it changes
        is saved after it.
        """
        if not editing.downloads or editing.is_running:
            return gr.skip()
        workspace = self._workspace(request, editing)
        earlier, saved = editing.downloads, self._state(workspace)
        if saved == editing.saved or not workspace.num_done:
            return gr.skip()

        def is_current() -> bool:
            return not editing.is_running and (editing.downloads, self._state(workspace)) == (earlier, saved)

        try:
            with _new_downloads(workspace) as (_, masks, record):
                write_masks_zip(workspace, masks)
                write_json(workspace, record, editing.facts)
                if not is_current():
                    raise DemoError("There was another change meanwhile, which is saved after this one.")
        except DemoError as error:
            if is_current():
                gr.Warning(f"{page.NOT_SAVED} {error}", title="Not yet")
            return gr.skip()
        self._offer(editing, (earlier[0], masks, record), saved)
        return {self.ui.get_masks: str(masks), self.ui.get_record: str(record)}

    @guarded
    def show_result(self, editing: Editing, request: gr.Request) -> dict:
        """Opens the last step after a run, and shows in step 2 what was found."""
        has_result = editing.has_news and bool(editing.downloads)
        if editing.is_running or not (has_result or editing.is_hidden):
            return gr.skip()
        workspace, ui = self._workspace(request, editing), self.ui
        if not has_result:
            return self._show_frame(workspace, editing)
        editing.has_news = False
        shown = self._show_frame(workspace, editing)
        overlay, masks, record = map(str, editing.downloads)
        return {
            **shown,
            ui.result_empty: gr.update(visible=False),
            ui.result_panel: gr.update(visible=True),
            ui.player: overlay,
            ui.scrub: self._slider(workspace, editing.frame),
            ui.scrubbed: self._scrubbed(workspace, editing.frame),
            ui.plot: self._plot(workspace),
            ui.get_overlay: overlay,
            ui.get_masks: masks,
            ui.get_record: record,
        }

    @staticmethod
    def _plot(workspace: Workspace) -> gr.LinePlot:
        areas = pd.DataFrame(workspace.areas(), columns=["frame", "seconds", "object", "area"])
        colours = {label: page.colour(obj_id) for obj_id, label in workspace.labels().items()}
        return gr.LinePlot(value=areas, color_map=colours)

    def _scrubbed(self, workspace: Workspace, frame_idx: int) -> str:
        text = self._caption(workspace, frame_idx)
        if workspace.mask(frame_idx) is None:
            text += " (not followed)"
        return page.picture(workspace.overlay(frame_idx), text)

    @guarded
    def scrub(self, frame: float, editing: Editing, request: gr.Request) -> dict:
        """Another frame of the result."""
        workspace, frame_idx = self._workspace(request, editing), int(frame or 0)
        if workspace.facts is None or frame_idx >= workspace.facts.num_frames:
            return gr.skip()
        return {self.ui.scrubbed: self._scrubbed(workspace, frame_idx)}

    @guarded
    def correct(self, frame: float, editor_value: dict, editing: Editing, request: gr.Request) -> dict:
        """Takes a frame of the result back to step 2."""
        workspace, frame_idx = self._workspace(request, editing), int(frame or 0)
        self._size(workspace)
        self._commit(workspace, editing, editor_value)
        editing.frame, editing.tool = frame_idx, "brush"
        return {
            **self._show_frame(workspace, editing),
            self.ui.frame: frame_idx,
            self.ui.tools: gr.update(selected="brush"),
            self.ui.run_status: page.note(
                f"Correct frame {frame_idx} in step 2, then follow from there: frames on that side are found anew."
            ),
        }

    # For programs

    def segment(
        self,
        video: str,
        mask: str,
        frame: int = 0,
        direction: str = "both",
        model: str | None = None,
        quality: str = "Standard",
    ) -> Iterator[tuple[str | None, str | None, str | None]]:
        """
        The whole job in one call, for programs; the visitor's page has no part in it. Nothing is given again and
        again until all is done: that is when Gradio ends the job of a program that does not wait any more.
        """
        key = f"program-{secrets.token_hex(16)}"
        yield None, None, None  # Gradio ends only what it has had something of
        try:
            if video is None or mask is None:
                raise DemoError("A video and a mask are needed.")
            if frame is None:
                raise DemoError("`frame` must be the number of the mask's frame, counted from 0; got nothing.")
            workspace, start = self.workspaces.get(key), int(frame)
            for _ in _now_and_then(workspace.import_video(video)):
                yield None, None, None
            workspace.set_marks(start, mask_file_to_id_map(mask, self._size(workspace)))
            started = time.monotonic()
            with closing(follow(workspace, self.models, model, quality, start, direction)) as reports:
                for report in reports:
                    progress = report
                    yield None, None, None
            facts = run_facts(model, quality, direction, start, progress, started)
            with _new_downloads(workspace) as paths:
                for _ in _now_and_then(write_overlay(workspace, paths[0])):
                    yield None, None, None
                write_masks_zip(workspace, paths[1])
                write_json(workspace, paths[2], facts)
            # The workspace goes now; Gradio removes these in its own time.
            folder = Path(get_upload_folder()) / secrets.token_hex(16)
            shutil.move(paths[0].parent, folder)
            try:
                yield tuple(str(folder / path.name) for path in paths)
            except GeneratorExit:  # nobody took them
                shutil.rmtree(folder, ignore_errors=True)
                raise
        except DemoError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            self.workspaces.close(key)


@contextmanager
def _new_downloads(workspace: Workspace) -> Iterator[tuple[Path, Path, Path]]:
    """
    Where video, masks and record go; all or nothing. Never the same names again: browsers keep what they have seen.
    """
    folder = workspace.folder / "downloads" / secrets.token_hex(8)
    stem = Path(workspace.facts.name).stem[:60] or "video"
    try:
        with on_disk():
            folder.mkdir(parents=True)
            yield folder / f"{stem}_followed.mp4", folder / f"{stem}_masks.zip", folder / f"{stem}_results.json"
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _now_and_then(steps: Iterator) -> Iterator[None]:
    """Goes through steps, and stops by once in a while; closes them if nobody goes on."""
    told = time.monotonic()
    with closing(steps):
        for _ in steps:
            if time.monotonic() - told > _LOOK:
                told = time.monotonic()
                yield


def run_facts(model: str, quality: str, direction: str, start: int, progress: Progress, started: float) -> dict:
    """What the record says of a run."""
    return {
        "model": model,
        "quality": quality,
        "direction": direction,
        "start_frame": start,
        "frames": progress.done,
        "stopped": progress.stopped,
        "seconds": round(time.monotonic() - started, 3),
    }


def brush(obj_id: int, radius: int = 15) -> gr.Brush:
    """The brush of an object: its colour and no other, so that nothing is painted that belongs to no object."""
    paint = (page.colour(int(obj_id)), _ALPHA / 255)
    return gr.Brush(default_size=radius, colors=[paint], default_color=paint, color_mode="fixed")
