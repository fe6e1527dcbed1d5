"""What the page says and how it looks: texts, pieces of HTML, the theme."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

import cv2
import gradio as gr
import numpy as np
from following import Progress
from workspace import LIMITS, PALETTE, VideoFacts, Workspace, duration_in_words

from hf_deformvos.video import VideoReader, draw_overlay, read_mask


TITLE = "Follow objects through a video"
STYLE = Path(__file__).resolve().parent / "style.css"

# Pictures in the page itself are for looking only; more pixels than this cost time on the way.
_SHOWN_SIDE = 960
_JPEG_QUALITY = 82
# Seconds: how often Gradio looks for files that nothing else has removed, and how old they get. A program's files may
# have to wait for their turn.
LEFT_OVER = (1800, 7200)

HEADER = f"""<header class="lead">
<h1>{TITLE}</h1>
<p>Mark something in one picture of a video. It is found in all the others: outlined, measured, ready to
download.</p></header>"""

_KEPT = f"""The server keeps your video, and what comes of it, while this page is in use. All that is removed some
{duration_in_words(LIMITS.left_seconds)} after you leave, or when nothing has happened here for
{duration_in_words(LIMITS.idle_seconds)}; single pictures that you paint on may stay for up to
{duration_in_words(sum(LEFT_OVER))}."""

LIMITS_TEXT = f"""<p class="hint" id="limits">{LIMITS.sentence()} {_KEPT}</p>"""

_EXAMPLE_CREDIT = """<p class="hint">With a rabbit and a ruin marked already: the quickest way to see what happens.
From <em>Big Buck Bunny</em>, © Blender Foundation,
<a href="https://creativecommons.org/licenses/by/3.0/">CC BY 3.0</a>.
</p>"""

FOOTER = """<p class="hint foot">The model runs on the server. Things that look alike and pass close to
each other can be confused: go to the picture where it happens, correct it, and follow on from there.</p>"""

EMPTY_MARK = "Choose a video above. Its pictures appear here, and you mark in one of them what is to be followed."
EMPTY_FOLLOW = "Once something is marked, it is followed from here, and you watch it happen."
EMPTY_RESULT = "The finished video, the size of each object over time, and the downloads come here."

BRUSH_HINT = "Paint over the whole object, and rub out what is too much. Each object has its own colour."
BOX_HINT = "Click two opposite corners of a box around the object. Its outline is looked for inside."
BOX_SECOND = "Now click the opposite corner."
FILE_HINT = "An image of the video's proportions: black is background, every other value or colour is an object."

WAITING = "Waiting for its turn …"
LOADING = "Getting ready …"
LEARNING = "Learning your objects …"
WRITING = "Writing the video …"
STOPPED_EARLY = "Stopped before it began."
NOT_SAVED = "Masks and record to download do not have your last change yet."
GONE = "Nothing had happened here for a long time, so the server has removed your video. Upload it again to go on."
UNEXPECTED = "Something went wrong here, and it has been noted. Try again; if it happens again, load the page anew."
API_DESCRIPTION = """Follow the objects of a mask through a video, as the page does it.

video: a video file. mask: an image of the video's proportions whose values are objects (palette or grey PNG; 0 is
background). frame: the frame that the mask belongs to, counted from 0. direction: from that frame forwards,
backwards, or both. model, quality: as on the page. Returns the video with the objects coloured (mp4), the masks (zip
of PNG files as DAVIS has them) and a record with the area and box of every object in every frame (JSON)."""


def heading(number: int, text: str) -> str:
    """The title of a step, which links can jump to."""
    return f'<h2 id="step-{number}"><span class="number" aria-hidden="true">{number}</span>{escape(text)}</h2>'


def empty(text: str) -> str:
    """What stands where something will be."""
    return f'<p class="empty">{escape(text)}</p>'


def hint(text: str) -> str:
    """A line that explains."""
    return f'<p class="hint">{escape(text)}</p>'


def note(text: str) -> str:
    """A line on how things are, read out when it changes."""
    return f'<p class="note" role="status">{escape(text)}</p>' if text else ""


def alert(text: str) -> str:
    """A line on what is wrong and what to do."""
    return f'<p class="alert" role="alert">{escape(text)}</p>'


def colour(obj_id: int) -> str:
    """An object's colour as CSS has it."""
    return "#{:02x}{:02x}{:02x}".format(*PALETTE[obj_id])


def duration(seconds: float) -> str:
    """Seconds as people say them: `3.7 s`, `18 s`, `2 min 05 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60:02d} s"


def progress_bar(share: float | None, text: str) -> str:
    """A bar with a line of text; without a share it only moves."""
    value = "" if share is None else f' aria-valuenow="{100 * share:.0f}"'
    width = "" if share is None else f' style="width:{100 * share:.1f}%"'
    moving = " moving" if share is None else ""
    return (
        f'<div class="progress{moving}" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100"'
        f'{value}><span{width}></span></div><p class="note">{escape(text)}</p>'
    )


def run_progress(progress: Progress) -> str:
    """How far a run is: learning, then frames, speed, time left."""
    if progress.learned is not None:
        return progress_bar(progress.learned, LEARNING)
    if not progress.done:
        return progress_bar(None, LOADING)
    text = f"{progress.done} of {progress.total} frames"
    if progress.fps:
        text += f" · {progress.fps:.1f} frames a second"
    if progress.seconds_left is not None and not progress.finished:
        text += f" · {duration(progress.seconds_left)} left"
    return progress_bar(progress.done / progress.total, text)


def run_summary(facts: dict) -> str:
    """What a run did."""
    rate = facts["frames"] / max(facts["seconds"], 1e-6)
    text = f"{facts['frames']} frames in {duration(facts['seconds'])}, {rate:.1f} a second. The result is in step 4."
    return f"Stopped, and what is done is kept: {text}" if facts["stopped"] else text


def facts_line(facts: VideoFacts, is_playable: bool = True) -> str:
    """What is known of a video, and what happened to it on the way in."""
    line = (
        f"{facts.name}: {facts.num_frames} frames, {duration(facts.seconds)}, {facts.width} × {facts.height} pixels, "
        f"{facts.fps:.4g} frames a second."
    )
    unseen = (
        []
        if is_playable
        else ["Browsers do not play this kind of file, so there is no preview; it works all the same."]
    )
    return note(" ".join([line, *facts.notes, *unseen]))


def frame_label(workspace: Workspace, frame_idx: int) -> str:
    """A frame by number and time."""
    return f"frame {frame_idx}, at {workspace.timestamp(frame_idx):.2f} s"


def picture(image: np.ndarray | None, text: str) -> str:
    """
    An image that is part of the page: no file is left behind, however many are shown.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`, uint8, *optional*): RGB.
        text (`str`): what is to be seen, for those who cannot see it, and as a caption.
    """
    if image is None:
        return ""
    scale = _SHOWN_SIDE / max(image.shape[:2])
    if scale < 1:
        size = [max(round(side * scale), 1) for side in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
    source = "data:image/jpeg;base64," + base64.b64encode(encoded).decode()
    caption = f"<figcaption>{escape(text)}</figcaption>" if text else ""
    return f'<figure><img src="{source}" alt="{escape(text)}">{caption}</figure>'


def marked_table(workspace: Workspace, names: list[str], frame_idx: int, ids: np.ndarray | None) -> str:
    """Which objects there are, how much of this picture each covers, and which frames are marked."""
    total = workspace.facts.width * workspace.facts.height
    rows = []
    for obj_id, name in enumerate(names, start=1):
        pixels = 0 if ids is None else int((ids == obj_id).sum())
        share = f"{100 * pixels / total:.1f} %" if pixels else "–"
        rows.append(
            f'<tr><td><span class="chip" style="background:{colour(obj_id)}"></span></td>'
            f"<th scope=row>{escape(name)}</th><td>{share}</td></tr>"
        )
    marked = list(workspace.marks)
    frames = ", ".join(map(str, marked[:8])) + (" …" if len(marked) > 8 else "")
    where = f"Marked: frame {frames}." if marked else "Nothing is marked yet."
    return (
        f'<table class="objects"><thead><tr><td></td><th scope=col>Object</th><th scope=col>of frame {frame_idx}</th>'
        f'</tr></thead><tbody>{"".join(rows)}</tbody></table><p class="hint" id="marked">{where}</p>'
    )


def example_card(video: Path, mask: Path) -> str:
    """What the example looks like with its marks, and whose it is."""
    with VideoReader(video, max_frames=1) as reader:
        image = next(iter(reader)).image
    return picture(draw_overlay(image, read_mask(mask, image.shape[:2]), PALETTE), "") + _EXAMPLE_CREDIT


def theme() -> gr.themes.Base:
    """Calm colours, the system's own fonts, nothing fetched from elsewhere."""
    system = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    blue = gr.themes.Color(
        name="deformvos",
        c50="#eef6fb",
        c100="#d6e9f5",
        c200="#acd3ea",
        c300="#7ab8dc",
        c400="#3f97c9",
        c500="#0b7bb8",
        c600="#0069a3",
        c700="#005687",
        c800="#06466d",
        c900="#0a3a59",
        c950="#06263c",
    )
    return gr.themes.Base(
        primary_hue=blue,
        secondary_hue=blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=system,
        font_mono=mono,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        link_text_color_dark="*primary_300",
        link_text_color_hover_dark="*primary_200",
        link_text_color_visited_dark="*primary_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_label_text_weight="500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_400",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
    )
