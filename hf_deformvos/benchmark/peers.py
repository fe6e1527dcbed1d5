"""Other models beside ours in the same run: in turn, all warm, never two at once."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch

from .clip import Clip
from .engine import Engine
from .processes import last_error
from .stages import SteadyStream, summarize


PEERS = {"edgetam": "EdgeTAM", "sam2_tiny": "SAM 2.1 tiny"}
OURS = "deformvos"
DEFAULT_PYTHON = ".venv-peers/bin/python"
# A peer's memory holds seven frames.
NUM_WARMUP_FRAMES = 8
# Threads that wait for work spin for a while before they sleep; the next model must not share its cores with them.
_SETTLE_SECONDS = 0.05
# A turn is a stream for a moment. Of a single frame, a fast model would spend much on what the model before it has
# driven out of the processor's caches, and a slow one next to nothing.
_TURN_SECONDS = 0.5
_WORKER = Path(__file__).with_name("peer_process.py")


class PeerError(ValueError):
    """A peer's process that did not start or ended; the message has its last words."""


class PeerProcess:
    """
    A process that does one frame when it is asked to. Closing it ends it.

    Args:
        name (`str`): of the peer, for messages.
        command (`list[str]`): what to start; it writes a line of JSON about itself, then one for each line it reads.

    Attributes:
        facts (`dict`): what it said about itself.

    Raises:
        PeerError: if it cannot be started or ends at once.
    """

    def __init__(self, name: str, command: list[str]):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"{name} cannot be started: {error}.") from error
        try:
            self.facts = self._answer()
        except PeerError:
            self.close()
            raise

    def step(self) -> float:
        """One frame; its seconds, as the process itself took them."""
        try:
            self._process.stdin.write("frame\n")
        except BrokenPipeError:
            pass  # `_answer` says why
        answer = self._answer()
        self.facts["masks"] = answer.get("masks")
        return answer["seconds"]

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        words = last_error(self._errors.read())
        raise PeerError(
            f"{self.name} ended with exit code {code}: {words}. Its environment needs torch, torchvision, timm, "
            "transformers and av: scripts/make_peers_env.sh makes one."
        )

    def close(self):
        """Ends the process."""
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def time_alternately(
    steps: dict[str, Callable[[], float]],
    num_rounds: int,
    num_warmup: int,
    settle_seconds: float = _SETTLE_SECONDS,
    turn_seconds: float = _TURN_SECONDS,
) -> dict[str, list[float]]:
    """
    Rounds in which each has a turn of one frame after the other, until `turn_seconds` are over.

    Args:
        steps (`dict[str, Callable[[], float]]`): by name, a function that does a frame and returns its seconds.
        num_rounds (`int`): rounds that count.
        num_warmup (`int`): rounds before them.
        settle_seconds (`float`): pause before each turn.
        turn_seconds (`float`): least length of a turn; a turn has one frame at least.

    Returns:
        `dict[str, list[float]]`: seconds of every frame by name, from `num_rounds` turns each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(num_warmup + num_rounds):
        for name, step in steps.items():
            time.sleep(settle_seconds)
            turn = [step()]
            while sum(turn) < turn_seconds:
                turn.append(step())
            if index >= num_warmup:
                seconds[name] += turn
    return seconds


def compare_with_peers(
    engine: Engine,
    clip: Clip,
    num_objects: int,
    num_rounds: int,
    python: str,
    dtype: str = "float32",
    peers: tuple[str, ...] = tuple(PEERS),
    worker: Path = _WORKER,
    turn_seconds: float = _TURN_SECONDS,
) -> dict:
    """
    Time frames of ours and of each peer in turn: from the file to masks of the frame's size, no stage beside another.

    Args:
        engine ([`Engine`]): ours.
        clip ([`Clip`]): what all of them read.
        num_objects (`int`): how many of its objects are followed.
        num_rounds (`int`): rounds that count.
        python (`str`): the interpreter of the peers' environment.
        dtype (`str`, defaults to `"float32"`): the peers' precision.
        peers (`tuple[str, ...]`): which of `PEERS`.
        worker (`Path`): the program that runs a peer.
        turn_seconds (`float`): see [`time_alternately`].

    Returns:
        `dict`: `size`, `objects`, `rounds`, and `models`: by name, times of a frame, `fps`, `parameters`,
        `dtype`, and for peers `versions`, `masks` (the shape of theirs) and `ratio`, the median of ours into theirs.

    Raises:
        PeerError: if a peer cannot be run.
    """
    stream = SteadyStream(engine, clip, num_objects)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        mask = Path(folder) / "mask.npy"
        np.save(mask, clip.mask_of(num_objects))
        request = {"clip": str(clip.path), "mask": str(mask), "device": str(engine.device), "dtype": dtype}
        request["threads"] = torch.get_num_threads()
        processes = {}
        for name in peers:
            command = [python, str(worker), json.dumps({"peer": name, **request})]
            processes[name] = stack.enter_context(closing(PeerProcess(PEERS.get(name, name), command)))
        steps = {OURS: stack.enter_context(stream.stepping()), **{n: p.step for n, p in processes.items()}}
        seconds = time_alternately(steps, num_rounds, NUM_WARMUP_FRAMES, turn_seconds=turn_seconds)
        models = {name: _times(taken) for name, taken in seconds.items()}
        models[OURS] |= {"title": "DeformVOS", "dtype": engine.config.dtype, "parameters": engine.num_parameters}
        for name, process in processes.items():
            models[name] |= {"title": PEERS.get(name, name), "dtype": dtype, **process.facts}
            models[name]["ratio"] = round(models[name]["median_ms"] / models[OURS]["median_ms"], 2)
    return {"size": list(clip.first_mask.shape), "objects": num_objects, "rounds": num_rounds, "models": models}


def _times(seconds: list[float]) -> dict:
    return {**summarize(seconds), "fps": round(len(seconds) / sum(seconds), 4)}


__all__ = ["DEFAULT_PYTHON", "OURS", "PEERS", "PeerError", "PeerProcess", "compare_with_peers", "time_alternately"]
