"""Photographs the demo's page, in the states that its visitors see, to docs/images/demo: make env, then run this."""

import argparse
import io
import sys
from pathlib import Path

from PIL import Image


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from demo_page import DemoPage, expect, open_browser  # noqa: E402
from demo_server import serve  # noqa: E402


DESKTOP = {"viewport": {"width": 1280, "height": 1000}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 1.5, "is_mobile": True, "has_touch": True}


def take(page: DemoPage, path: Path):
    """The whole page as JPEG."""
    image = Image.open(io.BytesIO(page.page.screenshot(full_page=True))).convert("RGB")
    image.save(path, quality=82, optimize=True)
    print(f"{path}: {image.width}x{image.height}, {path.stat().st_size // 1000} kB")


def open_example(page: DemoPage):
    """The example with its marks."""
    page.find("#example").click()
    expect(page.find("#video_status .note")).to_contain_text("bunny.mp4")
    page.wait_for_editor()
    expect(page.find("#video video")).to_be_visible()
    # Orange on the rabbit: the marks are in the editor.
    if not page.shows((230, 200), (640, 360), (206, 158, 62), seconds=60):
        raise SystemExit("error: the example's marks do not come into the editor")
    page.page.evaluate("window.scrollTo(0, 0)")


def visit_with_mouse(browser, url: str, folder: Path):
    """From the empty page to the result, light."""
    page = DemoPage(browser, url, **DESKTOP)
    take(page, folder / "empty.jpg")
    open_example(page)
    page.choose("quality", "Fast")
    page.follow()
    page.wait_for_progress(9)
    take(page, folder / "running.jpg")
    page.wait_for_result()
    page.scrub_to(20)
    take(page, folder / "result.jpg")
    page.close()


def main():
    """Starts the demo, visits it three times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "demo")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    with open_browser() as browser, serve() as server:
        visit_with_mouse(browser, server.url, folder)
        page = DemoPage(browser, server.url, **DESKTOP, color_scheme="dark")
        open_example(page)
        page.choose("quality", "Fast")
        page.choose("direction", "To the end")
        page.follow()
        page.wait_for_result()
        take(page, folder / "dark-done.jpg")
        page.close()
        page = DemoPage(browser, server.url, **PHONE)
        open_example(page)
        take(page, folder / "phone-marked.jpg")
        page.close()


if __name__ == "__main__":
    main()
