"""The demo's page in a real browser, driven as a visitor does; for tests and for pictures of the page."""

import io
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image


_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
_FOLDERS = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
# Milliseconds that the page has for what it does; only a hang takes so long, or a machine that does much else.
PATIENCE = 120_000
# What Gradio's editor and the software renderer say of themselves, and nobody can see on the page.
_HARMLESS = re.compile(r"WebGL|GPU stall|swiftshader|No draw texture found for layer", re.IGNORECASE)


def find_browser() -> str | None:
    """The program to test with: `CHROMIUM` names it, else one that is installed."""
    named = os.environ.get("CHROMIUM")
    found = [named] if named else [shutil.which(name) for name in _NAMES] + list(_FOLDERS)
    return next((path for path in found if path and Path(path).is_file()), None)


@contextmanager
def open_browser() -> Iterator:
    """A headless browser of Playwright's kind; skips the test, saying what is missing, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make env")
    program = find_browser()
    if program is None:
        pytest.skip(
            "no Chromium or Chrome: install it (Debian: apt-get install chromium) or name it with CHROMIUM=..."
        )
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=_FLAGS)
        yield browser
        browser.close()


def expect(locator):
    """Playwright's `expect`; imported late, since it may not be installed."""
    from playwright.sync_api import expect

    return expect(locator)


class DemoPage:
    """
    One visitor's page.

    Args:
        browser: of `open_browser`.
        url (`str`): of the demo.
        options: of Playwright's `new_context`, such as `viewport`.

    Attributes:
        page: Playwright's.
        problems (`list[str]`): errors on the browser's console and in the page's scripts.
    """

    def __init__(self, browser, url: str, **options):
        self.url = url
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **options})
        self.context.set_default_timeout(PATIENCE)
        self.problems: list[str] = []
        self._earlier: str | None = None
        self.page = self.context.new_page()
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.load()

    def _note(self, message):
        if message.type == "error" and not _HARMLESS.search(message.text):
            self.problems.append(f"console: {message.text} ({message.location.get('url')})")

    def close(self):
        """The visitor leaves."""
        self.context.close()

    def load(self):
        """Loads the page, or loads it anew."""
        self.page.goto(self.url)
        expect(self.find("#video input[type=file]")).to_be_attached()

    def find(self, selector: str):
        """Playwright's locator."""
        return self.page.locator(selector)

    # 1 Video

    def upload(self, path: Path):
        """Chooses a video file; does not wait."""
        self.find("#video input[type=file]").set_input_files(path)

    def open_video(self, path: Path):
        """Uploads a video and waits until it can be marked."""
        self.upload(path)
        expect(self.find("#video_status .note")).to_contain_text(f"{path.name}: ")
        self.wait_for_editor()

    def remove_video(self):
        """Takes the video away."""
        self.find("#video").get_by_label("Clear").click()
        expect(self.find("#video input[type=file]")).to_be_attached()

    def be_ready_for_another_video(self):
        """After a file that was refused: the place to upload is there again, and old messages are not."""
        expect(self.find("#video input[type=file]")).to_be_attached()
        self.page.evaluate("document.querySelectorAll('.toast-close').forEach(button => button.click())")
        expect(self.find(".toast-body")).to_have_count(0)

    # 2 Mark

    def wait_for_editor(self):
        """Until the picture is in the editor, which then fits it to its room."""
        expect(self.find("#editor canvas").first).to_be_visible()
        expect(self.find("#editor .zoom-number")).not_to_have_text("100%")

    def open_tool(self, name: str):
        """One of Brush, Box and Mask file."""
        self.find("#tools").get_by_role("tab", name=name).click()

    def go_to_frame(self, frame_idx: int):
        """Another frame to mark."""
        self._number("frame", frame_idx)
        expect(self.find("#start")).to_contain_text(f"frame {frame_idx},")

    def _place_in_editor(self, size: tuple[int, int]) -> tuple[float, float, float]:
        """Where the picture of that (width, height) is on the page: left, top, zoom."""
        canvas = self.find("#editor canvas").first
        canvas.scroll_into_view_if_needed()
        around = canvas.bounding_box()
        zoom = float(self.find("#editor .zoom-number").inner_text().rstrip("%")) / 100
        left = around["x"] + around["width"] / 2 - zoom * size[0] / 2
        return left, around["y"] + around["height"] / 2 - zoom * size[1] / 2, zoom

    def shows(self, pixel: tuple, size: tuple[int, int], colour: tuple[int, int, int], seconds: float = 120) -> bool:
        """Whether the editor comes to show a colour at a pixel of the video of that (width, height)."""
        deadline = time.monotonic() + seconds
        while True:
            left, top, zoom = self._place_in_editor(size)
            x, y = left + zoom * (pixel[0] + 0.5), top + zoom * (pixel[1] + 0.5)
            # Two wide: where a pixel of the screen is as large as that, one would be half of it.
            seen = self.page.screenshot(clip={"x": x, "y": y, "width": 2, "height": 2})
            found = Image.open(io.BytesIO(seen)).convert("RGB").getpixel((0, 0))
            if max(abs(a - b) for a, b in zip(found, colour, strict=True)) < 30:
                return True
            if time.monotonic() > deadline:
                return False

    def paint(self, box: tuple, size: tuple[int, int]):
        """
        Paints over a box.

        Args:
            box: x0, y0, x1, y1 in pixels of the video.
            size (`tuple[int, int]`): width and height of the video.
        """
        left, top, zoom = self._place_in_editor(size)
        x0, y0, x1, y1 = (left + zoom * box[0], top + zoom * box[1], left + zoom * box[2], top + zoom * box[3])
        # The brush's radius is a 24th of the shorter side. Few movements: each one costs a drawing of the page.
        radius = zoom * min(size) / 24
        rows = max(math.ceil((y1 - y0 - 2 * radius) / (1.7 * radius)), 1)
        mouse = self.page.mouse
        mouse.move(x0 + radius, y0 + radius)
        mouse.down()
        for row in range(rows + 1):
            y = y0 + radius + (y1 - y0 - 2 * radius) * row / rows
            ends = (x0 + radius, x1 - radius) if row % 2 == 0 else (x1 - radius, x0 + radius)
            mouse.move(ends[0], y)
            mouse.move(ends[1], y)
        mouse.up()

    def click_corner(self, x: int, y: int, width: int):
        """Clicks the picture of the box tool at a pixel of the video, which is `width` pixels wide."""
        picture = self.find("#box_picture img")
        picture.scroll_into_view_if_needed()
        around = picture.bounding_box()
        across, down = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
        # It is shown whole and in the middle, at its own size at most.
        zoom = min(around["width"] / across, around["height"] / down, 1)
        left, top = (around["width"] - zoom * across) / 2, (around["height"] - zoom * down) / 2
        pixel = zoom * across / width
        picture.click(position={"x": left + pixel * (x + 0.5), "y": top + pixel * (y + 0.5)})

    def add_object(self, number: int):
        """One more object to paint, the `number`th."""
        self.find("#add").click()
        expect(self.find("#name textarea")).to_have_value(f"Object {number}")

    def mark_file(self, path: Path):
        """Takes the marks from a file and waits until they are shown."""
        self.open_tool("Mask file")
        # The page has settled: before, Gradio may lose a file that it is given.
        expect(self.find("#file_picture img")).to_be_visible()
        self.find("#mask input[type=file]").set_input_files(path)
        expect(self.find("#marked")).to_contain_text("Marked: frame")

    # 3 Follow

    def choose(self, setting: str, label: str):
        """One of the choices of model, quality or direction."""
        self.find(f"#{setting}").get_by_label(label, exact=True).check()

    def follow(self):
        """Starts; does not wait."""
        player = self.find("#player video")
        self._earlier = player.get_attribute("src") if player.count() else None
        self.find("#follow").click()

    def wait_for_progress(self, frames: int = 1):
        """Until so many frames are done, nine at most."""
        counts = "|".join([*map(str, range(frames, 10)), r"\d{2,}"])
        expect(self.find("#run_status")).to_contain_text(re.compile(rf"(?<!\d)({counts}) of \d+ frames"))

    def stop(self):
        """Ends the run and waits until what is done is there."""
        self.find("#stop").click()
        self.wait_for_result("Stopped, and what is done is kept")

    def wait_for_result(self, text: str = "The result is in step 4."):
        """Until the run is over and the result is shown."""
        expect(self.find("#run_status .note")).to_contain_text(text)
        expect(self.find("#follow")).to_be_enabled()
        expect(self.find("#scrubbed img")).to_be_visible()
        expect(self.find("#player video")).to_be_visible()
        expect(self.find("#player video")).not_to_have_attribute("src", self._earlier or "")
        # Taken away while the browser still fetches it, a video would be refused, which the console notes as an error.
        self.page.wait_for_function(
            "document.querySelector('#player video').networkState === HTMLMediaElement.NETWORK_IDLE"
        )

    # 4 Result

    def scrub_to(self, frame_idx: int):
        """Another frame of the result."""
        self._number("scrub", frame_idx)
        expect(self.find("#scrubbed figcaption")).to_contain_text(f"Frame {frame_idx},")

    def correct(self, frame_idx: int):
        """Takes a frame of the result to the editor."""
        self.scrub_to(frame_idx)
        self.find("#correct").click()
        expect(self.find("#run_status")).to_contain_text(f"Correct frame {frame_idx}")
        self.wait_for_editor()

    def download(self, name: str, folder: Path) -> Path:
        """
        The file behind one of the buttons get_overlay, get_masks and get_record; once more where it was replaced by a
        newer one while it was fetched.
        """
        for _ in range(5):
            with self.page.expect_download() as waiting:
                self.find(f"#{name}").click()
            if waiting.value.failure() is None:
                break
        path = folder / waiting.value.suggested_filename
        waiting.value.save_as(path)
        return path

    def _number(self, name: str, value: int):
        field = self.find(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Enter")
