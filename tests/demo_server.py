"""The demo in a process of its own on loopback, as a Space runs it, for tests and for pictures of its page."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
# What the tests' server allows: small enough to be exceeded by files that are made in a moment.
SMALL_LIMITS = {
    "DEFORMVOS_MAX_SECONDS": "20",
    "DEFORMVOS_MAX_BYTES": "2000000",
    "DEFORMVOS_MIN_FREE_DISK": "1",
    # Shorter than tests wait for files to go, longer than they let a page be offline.
    "DEFORMVOS_LEFT_SECONDS": "6",
}
# Importing PyTorch takes most of it, on a busy machine minutes.
_EXAMPLE = "bunny.mp4"
_START_SECONDS = 240


@dataclass(frozen=True)
class DemoServer:
    """
    A running demo.

    Attributes:
        url (`str`): where its page is.
        log_file (`Path`): what it wrote to its terminal.
        files (`Path`): where it keeps uploads and visitors' videos.
    """

    url: str
    log_file: Path
    files: Path

    @property
    def log(self) -> str:
        """What it wrote to its terminal so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def failures(self, since: int = 0) -> list[str]:
        """Exceptions that it wrote of after so many characters; refusals that Gradio words are none."""
        return re.findall(
            r"^(?!gradio\.exceptions\.Error)[\w.]*(?:Error|Exception)\b.*", self.log[since:], re.MULTILINE
        )

    def videos(self) -> list[Path]:
        """The folders of the visitors that are there now."""
        return sorted(self.files.glob("deformvos-*/video-*"))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serve(**environment: str) -> Iterator[DemoServer]:
    """
    Starts `python demo/app.py` with the models in `hub_cards`, waits until it answers, and stops it in the end.

    Args:
        environment (`str`): variables that it gets on top of those of this process.

    Raises:
        RuntimeError: if it ends or does not answer; the message has what it wrote. And if, told to end, it does not
            do so in order, or leaves files.
    """
    folder = Path(tempfile.mkdtemp(prefix="deformvos-server-"))
    port = free_port()
    variables = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "files"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        # The same sums on every machine, so that masks can be compared.
        "DEFORMVOS_DTYPE": "float32",
        # A proxy of the machine is not to be asked for loopback.
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        **environment,
    }
    server = DemoServer(f"http://127.0.0.1:{port}", folder / "log.txt", folder / "files")
    with open(server.log_file, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "demo/app.py"], cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait(process, server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # Of every upload, Gradio leaves an empty file, and of the example sometimes its copy, which is nobody's.
        kept = [path for path in server.files.rglob("*") if path.is_file() and path.stat().st_size]
        left = [path for path in kept if path.name != _EXAMPLE]
        shutil.rmtree(folder, ignore_errors=True)
    if process.returncode or left:
        raise RuntimeError(f"The demo ended with code {process.returncode} and left {left}.")


def _wait(process: subprocess.Popen, server: DemoServer):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"The demo ended with code {process.returncode}:\n{server.log}")
        try:
            with direct.open(server.url, timeout=10):
                return
        except OSError:  # not yet
            time.sleep(0.2)
    raise RuntimeError(f"The demo did not answer within {_START_SECONDS} seconds:\n{server.log}")


@pytest.fixture(scope="session")
def demo_server():
    """One server for all tests of the page and of its API, with limits that small files exceed."""
    pytest.importorskip("gradio", reason="the demo's packages are not installed: pip install -e .[demo]")
    with serve(**SMALL_LIMITS) as server:
        yield server
