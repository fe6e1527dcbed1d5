"""
The Space: mark an object in one frame of a video in the browser, and watch it being followed.

`python app.py` serves it on port 7860. See README.md beside this file.
"""

from __future__ import annotations

import logging
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import page
from following import DIRECTIONS, QUALITIES, Models, available_models
from gradio.utils import get_upload_folder
from steps import EXAMPLE_MASK, EXAMPLE_VIDEO, Editing, Steps, brush
from workspace import LIMITS, Workspaces, new_root, whole_number


# Runs at once; each takes the whole processor.
CONCURRENCY = whole_number("DEFORMVOS_CONCURRENCY", 1)
_DIRECTIONS = [
    ("To the end and to the beginning", "both"),
    ("To the end", "forwards"),
    ("To the beginning", "backwards"),
]
# Which tool is open when the event is sent: reading the editor takes a while, and another tab may be open by then.
_OPEN_TOOL = """(tool, ...others) => {
    const tab = document.querySelector('#tools [role="tab"][aria-selected="true"]');
    return [tab ? tab.dataset.tabId : tool, ...others];
}"""
# Marking is done and shown in the order in which it was asked for: an answer out of its turn would put back what a
# newer one has changed. Visitors wait for one another, but only for fractions of a second.
_IN_TURN = {"concurrency_id": "marking", "concurrency_limit": 1}
# Masks and record are written beside the marking, which must not wait for them: seconds where the video is long.
_SAVING = {"concurrency_id": "saving", "concurrency_limit": 1, "trigger_mode": "always_last"}
_TO_STEP = "() => {{ document.getElementById('step-{}').scrollIntoView({{behavior: 'smooth'}}); }}"


def build(workspaces: Workspaces) -> gr.Blocks:
    """The page with its events."""
    ui = SimpleNamespace()
    steps = Steps(ui, workspaces, Models())
    with gr.Blocks(title=page.TITLE, analytics_enabled=False, delete_cache=page.LEFT_OVER, fill_width=False) as demo:
        ui.editing, ui.unsaved = gr.State(Editing()), gr.State("")
        gr.HTML(page.HEADER)
        _build_video(ui)
        _build_mark(ui)
        _build_follow(ui)
        _build_result(ui)
        ui.footer = gr.HTML(page.FOOTER)
        _connect_video(ui, steps)
        _connect_mark(ui, steps)
        _connect_follow(ui, steps)
        _connect_result(ui, steps)
        _publish(ui, steps)
        demo.unload(steps.leave)
    demo.queue(default_concurrency_limit=8, max_size=64)
    return demo


def _build_video(ui: SimpleNamespace):
    with gr.Column(elem_classes="card"):
        gr.HTML(page.heading(1, "Video"))
        gr.HTML(page.LIMITS_TEXT)
        with gr.Row(elem_classes="split"):
            with gr.Column(scale=3):
                ui.video = gr.Video(
                    label="Your video",
                    sources=["upload", "webcam"],
                    webcam_options=gr.WebcamOptions(mirror=False),
                    include_audio=True,
                    height=400,
                    buttons=[],
                    elem_id="video",
                )
            with gr.Column(scale=2, min_width=240):
                ui.example = gr.Button("Try the example", elem_id="example", variant="secondary")
                gr.HTML(page.example_card(EXAMPLE_VIDEO, EXAMPLE_MASK), elem_id="example_card")
        ui.video_status = gr.HTML(elem_id="video_status")


def _build_mark(ui: SimpleNamespace):
    with gr.Column(elem_classes="card"):
        gr.HTML(page.heading(2, "Mark"))
        ui.mark_empty = gr.HTML(page.empty(page.EMPTY_MARK))
        with gr.Column(visible=False, elem_id="mark") as ui.mark_panel:
            ui.frame = gr.Slider(
                0, 1, 0, step=1, label="Frame", info="Where the objects are easy to see", elem_id="frame", buttons=[]
            )
            with gr.Row(elem_classes="split"):
                with gr.Column(scale=3, min_width=320):
                    _build_tools(ui)
                with gr.Column(scale=1, min_width=240):
                    ui.objects = gr.Radio([("Object 1", 1)], value=1, label="Objects", elem_id="objects")
                    ui.name = gr.Textbox("Object 1", label="Name of this object", max_length=40, elem_id="name")
                    # Whose name is in the box: another object may be chosen by the time that the name is read.
                    ui.named = gr.Number(1, precision=0, visible=False)
                    ui.add = gr.Button("Add an object", size="sm", elem_id="add")
                    ui.clear = gr.Button("Clear this frame", size="sm", elem_id="clear")
                    ui.marked = gr.HTML(elem_id="marked_table")


def _build_tools(ui: SimpleNamespace):
    ui.tool = gr.Textbox("brush", visible=False)
    with gr.Tabs(selected="brush", elem_id="tools") as ui.tools:
        with gr.Tab("Brush", id="brush") as ui.brush_tab:
            gr.HTML(page.hint(page.BRUSH_HINT))
            ui.editor = gr.ImageEditor(
                type="numpy",
                format="png",  # colours tell the objects apart, and must come back as they were
                show_label=False,
                sources=(),
                transforms=(),
                layers=False,
                brush=brush(1),
                eraser=gr.Eraser(),
                canvas_size=(16, 16),  # of pictures that are smaller, Gradio puts the layers elsewhere
                height=440,
                buttons=[],
                elem_id="editor",
            )
            ui.resting = gr.HTML(elem_id="resting")
        with gr.Tab("Box", id="box") as ui.box_tab:
            ui.box_hint = gr.HTML(page.hint(page.BOX_HINT), elem_id="box_hint")
            ui.box_picture = gr.Image(
                show_label=False, interactive=False, format="jpeg", buttons=[], height=440, elem_id="box_picture"
            )
            with gr.Row(elem_id="corners"):
                ui.left = gr.Number(label="Left", precision=0, minimum=0, min_width=60, elem_id="left")
                ui.top = gr.Number(label="Top", precision=0, minimum=0, min_width=60, elem_id="top")
                ui.right = gr.Number(label="Right", precision=0, minimum=0, min_width=60, elem_id="right")
                ui.bottom = gr.Number(label="Bottom", precision=0, minimum=0, min_width=60, elem_id="bottom")
            ui.mark_box = gr.Button("Mark what is in the box", size="sm", elem_id="mark_box")
        with gr.Tab("Mask file", id="file") as ui.file_tab:
            gr.HTML(page.hint(page.FILE_HINT))
            ui.mask = gr.File(label="Mask image", file_types=["image"], type="filepath", height=120, elem_id="mask")
            ui.file_picture = gr.HTML(elem_id="file_picture")


def _build_follow(ui: SimpleNamespace):
    models = list(available_models())
    with gr.Column(elem_classes="card"):
        gr.HTML(page.heading(3, "Follow"))
        ui.follow_empty = gr.HTML(page.empty(page.EMPTY_FOLLOW))
        with gr.Column(visible=False, elem_id="following") as ui.follow_panel:
            with gr.Row():
                ui.model = gr.Radio(
                    models,
                    value=next((name for name in models if name == "Student"), models[0] if models else None),
                    label="Model",
                    info="The student is the faster",
                    elem_id="model",
                )
                ui.quality = gr.Radio(
                    list(QUALITIES),
                    value="Standard",
                    label="Quality",
                    info="Fast is less exact; adapted learns your objects first, which takes a while",
                    elem_id="quality",
                )
                ui.direction = gr.Radio(_DIRECTIONS, value="both", label="Direction", elem_id="direction")
            ui.start = gr.HTML(elem_id="start")
            # The number of the run: one that was called off while it waited for its turn is told from the next one.
            ui.ticket = gr.Number(0, precision=0, visible=False)
            with gr.Row():
                ui.follow = gr.Button("Follow", variant="primary", elem_id="follow", scale=3)
                ui.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", scale=1)
            ui.run_status = gr.HTML(elem_id="run_status")
            ui.live = gr.HTML(elem_id="live")


def _build_result(ui: SimpleNamespace):
    with gr.Column(elem_classes="card"):
        gr.HTML(page.heading(4, "Result"))
        ui.result_empty = gr.HTML(page.empty(page.EMPTY_RESULT))
        with gr.Column(visible=False, elem_id="result") as ui.result_panel:
            with gr.Row(elem_classes="split"):
                with gr.Column(scale=1, min_width=320):
                    ui.player = gr.Video(
                        label="The video, objects coloured", interactive=False, buttons=[], loop=True, elem_id="player"
                    )
                with gr.Column(scale=1, min_width=320):
                    ui.scrubbed = gr.HTML(elem_id="scrubbed")
                    ui.scrub = gr.Slider(0, 1, 0, step=1, label="Frame by frame", elem_id="scrub", buttons=[])
                    ui.correct = gr.Button("Correct this frame", size="sm", elem_id="correct")
            ui.plot = gr.LinePlot(
                x="seconds",
                y="area",
                color="object",
                title="Size of each object",
                x_title="seconds",
                y_title="% of the picture",
                height=260,
                buttons=[],
                elem_id="plot",
            )
            with gr.Row(elem_id="downloads"):
                ui.get_overlay = gr.DownloadButton("Video (mp4)", elem_id="get_overlay")
                ui.get_masks = gr.DownloadButton("Masks (zip)", elem_id="get_masks")
                ui.get_record = gr.DownloadButton("Record (JSON)", elem_id="get_record")


def _quiet(ui: SimpleNamespace) -> dict:
    """
    Settings of events of the page itself: not for programs, and no veil over the page. Progress is "shown" on a line
    of text and never on the editor: Gradio reads the value of every component that it shows progress on, and the
    editor's is several uploads.
    """
    return {"api_visibility": "private", "show_progress": "hidden", "show_progress_on": ui.footer}


def _panels(ui: SimpleNamespace) -> list:
    """What opens and closes the steps."""
    return [ui.mark_empty, ui.mark_panel, ui.follow_empty, ui.follow_panel, ui.result_empty, ui.result_panel]


def _closing_outputs(ui: SimpleNamespace) -> list:
    """What says that there is no video any more: every event may find that out."""
    return [*_panels(ui), ui.video, ui.video_status]


def _frame_outputs(ui: SimpleNamespace) -> list:
    """What shows a frame in step 2."""
    texts = [ui.objects, ui.add, ui.marked, ui.start, ui.box_hint, ui.file_picture]
    return [*texts, ui.box_picture, ui.editor, ui.resting, ui.unsaved, *_closing_outputs(ui)]


def _run_outputs(ui: SimpleNamespace) -> list:
    """What shows how a run is getting on."""
    return [ui.follow, ui.stop, ui.run_status, ui.live]


def _connect_video(ui: SimpleNamespace, steps: Steps):
    quiet = _quiet(ui)
    panels = _panels(ui)
    shown = [*_run_outputs(ui), ui.frame, ui.tools, ui.mask, ui.name, ui.named, *_frame_outputs(ui)]
    reading = {**quiet, "concurrency_id": "reading", "concurrency_limit": 2}
    uploaded = gr.on([ui.video.upload, ui.video.stop_recording], steps.hide_steps, None, panels, **quiet)
    chosen = ui.example.click(steps.hide_steps, None, panels, **quiet)
    for event, opening, inputs in (
        (uploaded, steps.open_video, [ui.video, ui.editing]),
        (chosen, steps.open_example, ui.editing),
    ):
        event.then(opening, inputs, [ui.video, ui.video_status], **reading).then(
            steps.show_video, ui.editing, shown, **quiet, **_IN_TURN
        )
    ui.video.clear(steps.close_video, ui.editing, [ui.video_status, *panels, *_run_outputs(ui)], **quiet)


def _connect_mark(ui: SimpleNamespace, steps: Steps):
    quiet = {**_quiet(ui), **_IN_TURN}
    frame, painted = _frame_outputs(ui), [ui.editor, ui.editing]
    ui.frame.change(steps.go_to_frame, [ui.frame, *painted], frame, trigger_mode="always_last", **quiet).then(
        steps.settle, [ui.frame, ui.editing], frame, **quiet
    )
    tabs = [tab.select for tab in (ui.brush_tab, ui.box_tab, ui.file_tab)]
    gr.on(tabs, steps.use_tool, [ui.tool, *painted], frame, js=_OPEN_TOOL, trigger_mode="always_last", **quiet)
    # "multiple": by default, what is clicked or typed before the last answer has come is lost.
    chosen = [ui.objects, ui.name, ui.named, ui.editor]
    ui.objects.input(steps.choose_object, [ui.objects, ui.editing], chosen, trigger_mode="multiple", **quiet)
    ui.add.click(steps.add_object, ui.editing, [*chosen, ui.add], **quiet)
    named, renamed = [ui.name, ui.named, ui.editing], [ui.objects, ui.marked, ui.plot, ui.unsaved]
    renamed += _closing_outputs(ui)
    gr.on([ui.name.blur, ui.name.submit], steps.rename_object, named, renamed, trigger_mode="multiple", **quiet)
    ui.clear.click(steps.clear_frame, ui.editing, frame, **quiet)
    corners = [ui.left, ui.top, ui.right, ui.bottom]
    ui.box_picture.select(steps.click_corner, ui.editing, [*frame, *corners], trigger_mode="multiple", **quiet)
    ui.mark_box.click(steps.enter_box, [*corners, ui.editing], frame, **quiet)
    ui.mask.upload(steps.take_mask, [ui.mask, ui.editing], frame, **quiet)


def _connect_follow(ui: SimpleNamespace, steps: Steps):
    quiet = _quiet(ui)
    running = [*_run_outputs(ui), *_closing_outputs(ui)]
    settings = [ui.model, ui.quality, ui.direction, ui.ticket, ui.editing]
    downloads = [ui.get_overlay, ui.get_masks, ui.get_record]
    result = [ui.player, ui.scrub, ui.scrubbed, ui.plot, *downloads, *_frame_outputs(ui)]
    begun = [*running, ui.ticket, ui.editor, ui.resting, ui.marked]
    followed = ui.follow.click(steps.begin, [ui.editor, ui.editing], begun, **quiet, **_IN_TURN).then(
        steps.run, settings, running, concurrency_id="model", concurrency_limit=CONCURRENCY, **quiet
    )
    # A run that waits for its turn is over when it is stopped, not when its turn comes.
    stopped = ui.stop.click(steps.stop, ui.editing, running, queue=False, **quiet)
    for ended in (followed, stopped):
        ended.then(
            steps.show_editor, ui.editing, [ui.editor, ui.resting, ui.follow, ui.stop], **quiet, **_IN_TURN
        ).then(steps.show_result, ui.editing, result, **quiet, **_IN_TURN)


def _connect_result(ui: SimpleNamespace, steps: Steps):
    quiet = _quiet(ui)
    scrubbed = [ui.scrubbed, *_closing_outputs(ui)]
    ui.scrub.change(steps.scrub, [ui.scrub, ui.editing], scrubbed, trigger_mode="always_last", queue=False, **quiet)
    marking = [ui.frame, ui.tools, ui.run_status, *_frame_outputs(ui)]
    ui.correct.click(steps.correct, [ui.scrub, ui.editor, ui.editing], marking, **quiet, **_IN_TURN).success(
        None, js=_TO_STEP.format(2)
    )
    ui.unsaved.change(steps.save, ui.editing, [ui.get_masks, ui.get_record, *_closing_outputs(ui)], **quiet, **_SAVING)


def _publish(ui: SimpleNamespace, steps: Steps):
    """The same job for programs, as `/segment`."""
    with gr.Row(visible=False):
        inputs = [
            gr.Video(label="Video", sources=["upload"], include_audio=True),
            gr.File(label="Mask", type="filepath"),
            gr.Number(0, label="Frame of the mask", precision=0, minimum=0),
            gr.Radio(list(DIRECTIONS), value="both", label="Direction"),
            gr.Radio(ui.model.choices, value=ui.model.value, label="Model"),
            gr.Radio(list(QUALITIES), value="Standard", label="Quality"),
        ]
        outputs = [gr.File(label="Video with the objects coloured"), gr.File(label="Masks"), gr.File(label="Record")]
        gr.Button().click(
            steps.segment,
            inputs,
            outputs,
            api_name="segment",
            api_description=page.API_DESCRIPTION,
            concurrency_id="model",
            concurrency_limit=CONCURRENCY,
        )


def main():
    """Serves the page; host and port are Gradio's environment variables GRADIO_SERVER_NAME and GRADIO_SERVER_PORT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Whoever ends it does so in order: visitors' files are not to stay.
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    # In the folder that Gradio serves from, so that results are not copied.
    root = new_root(Path(get_upload_folder()))
    workspaces = Workspaces(root)
    demo = build(workspaces)
    try:
        demo.launch(
            theme=page.theme(),
            css_paths=page.STYLE,
            max_file_size=LIMITS.max_bytes,
            footer_links=["api", "settings"],
            run_history=False,
            ssr_mode=False,
            show_error=True,
            prevent_thread_lock=True,
        )
        while not ended.wait(1.0):
            pass
    finally:
        workspaces.close_all()
        demo.close(verbose=False)  # Gradio's own files go with it
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
