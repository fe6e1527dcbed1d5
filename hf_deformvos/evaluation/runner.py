"""Runs a model over a benchmark, a frame at a time, and measures accuracy, speed and memory together."""

import json
import os
import platform
import statistics as stdlib_statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import logging

from ..inference import (
    describe_device,
    hash_weights,
    is_exported,
    load_checkpoint,
    load_for_inference,
    prepare_for_inference,
    resolve_device,
    size_option,
    synchronize,
)
from ..masks_deformvos import overrule
from ..video.writer import write_palette_png
from ..writable import check_folder
from .layouts import EvaluationDataset, EvaluationSequence, limit_short_side, read_picture
from .macs import count_macs as counting_macs
from .scoring import SequenceScore, SequenceScorer, map_in_processes, score_folder


logger = logging.get_logger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
RUN_FILE = "run.json"
# The first steps of a stream allocate and pick kernels; the median is taken after them.
_WARM_UP_FRAMES = 5


class Adapter(Protocol):
    """
    What adapts a model to given frames: a dataclass, whose values are recorded with the results.

    Attributes:
        check_frames (`int`): Frames of the video that it looks at beside those that are given.
    """

    check_frames: int

    def adapt_to_video(
        self, model, processor, frames: Sequence[Image.Image], masks: dict[int, np.ndarray], size: dict
    ) -> tuple:
        """A model that has learned the objects, and the share of that in it; see `hf_deformvos.adaptation`."""


@dataclass(frozen=True)
class RunnerConfig:
    """
    How a model is run.

    Args:
        model (`str`): Folder or Hub repository of the weights.
        device (`str`, *optional*): Such as `"cpu"` or `"cuda:0"`; by default CUDA, then MPS, then the CPU.
        dtype (`str`, *optional*, defaults to `"float32"`): One of `DTYPES`.
        num_threads (`int`, *optional*): CPU threads of all processes together; by default what torch takes.
        short_side (`int`, *optional*): Short side of the network's input in pixels, instead of the processor's.
        memory_interval (`int`, *optional*): Instead of the configuration's.
        overrides (`dict`, *optional*): Values for other fields of the model's configuration, such as `use_offsets`.
        adaptation ([`Adapter`], *optional*):
            Such as an [`~hf_deformvos.adaptation.AdaptationConfig`]: how a copy of the model is adapted to each
            sequence's first given masks, before it follows them. By default it is not.
        save_masks (`str`, *optional*): Folder for palette PNGs, `<folder>/<sequence>/<frame>.png`.
        resume (`bool`, *optional*, defaults to `False`):
            Whether a sequence whose masks all lie in `save_masks`, of the same weights and settings, is not run again.

    Raises:
        ValueError: If a value is out of its range.
    """

    model: str
    device: str | None = None
    dtype: str = "float32"
    num_threads: int | None = None
    short_side: int | None = None
    memory_interval: int | None = None
    overrides: dict = field(default_factory=dict)
    adaptation: Adapter | None = None
    save_masks: str | None = None
    resume: bool = False

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        for name in ("num_threads", "short_side", "memory_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.resume and not self.save_masks:
            raise ValueError("`resume` takes up the masks in `save_masks`, which is not set; name the folder.")


@dataclass(frozen=True)
class StreamTiming:
    """
    Speed and memory of one sequence.

    Attributes:
        num_frames (`int`): Frames streamed.
        stream_seconds (`float`): Decoding, resizing, network, masks at full size and their files, one after the other.
        network_ms (`float`, *optional*): Median of the network's time a frame, first frames and new objects left out.
        network_size (`tuple[int, int]`): Height and width of the network's input.
        adaptation_seconds (`float`, *optional*): Of adapting the model to the given masks, which is no part of
            `stream_seconds`; `None` where it is not adapted.
        adapted_share (`float`, *optional*): Of the adapted weights in those that followed the sequence.
        peak_memory_bytes (`int`, *optional*): Peak resident memory of the process so far.
        peak_device_memory_bytes (`int`, *optional*): Peak memory allocated on a CUDA device so far.
    """

    num_frames: int
    stream_seconds: float
    network_ms: float | None
    network_size: tuple[int, int]
    peak_memory_bytes: int | None
    peak_device_memory_bytes: int | None
    adaptation_seconds: float | None = None
    adapted_share: float | None = None

    @property
    def frames_per_second(self) -> float:
        """Speed of the whole stream."""
        return self.num_frames / self.stream_seconds


@dataclass(frozen=True)
class ModelFacts:
    """
    Size of the model.

    Attributes:
        num_parameters (`int`): All parameters, see [`count_parameters`].
        macs (`int`, *optional*): Multiply-accumulates of one step, that of the last frame of the first sequence.
        macs_network_size (`tuple[int, int]`, *optional*): Height and width of the network's input in that step.
        macs_num_objects (`int`, *optional*): Objects followed in that step.
    """

    num_parameters: int
    macs: int | None = None
    macs_network_size: tuple[int, int] | None = None
    macs_num_objects: int | None = None


@dataclass(frozen=True)
class SequenceResult:
    """What a run yields of one sequence; `timing` and `facts` are missing where saved masks were taken up."""

    score: SequenceScore
    timing: StreamTiming | None = None
    facts: ModelFacts | None = None


@dataclass(frozen=True)
class EvaluationRun:
    """A whole run: what was run, on what, and the result of every sequence."""

    dataset: EvaluationDataset
    config: RunnerConfig
    num_workers: int
    results: tuple[SequenceResult, ...]
    weights_sha256: str | None
    hardware: dict
    versions: dict = field(default_factory=dict)

    @property
    def facts(self) -> ModelFacts | None:
        """Size of the model; `None` where every sequence was taken up from saved masks."""
        known = [result.facts for result in self.results if result.facts is not None]
        return max(known, key=lambda facts: facts.macs is not None, default=None)


def count_parameters(model) -> int:
    """The parameters of a model as its checkpoint holds them: folding takes those of the batch norms away."""
    if getattr(getattr(model, "backbone", None), "is_folded", False):
        with torch.device("meta"):
            model = type(model)(model.config)
    return model.num_parameters()


class SequenceRunner:
    """
    Streams sequences through a model and its processor.

    Args:
        model: A model with the streaming session interface, in evaluation mode.
        processor: Its processor.
        device (`torch.device`): Where the model is.
        dtype (`torch.dtype`): Of the frames given to it.
        short_side (`int`, *optional*): Short side of the network's input in pixels, instead of the processor's.
        save_masks (`Path`, *optional*): Folder for palette PNGs.
        adapt (callable, *optional*): Makes the model that follows a sequence, from `model`, its frames from the first
            given one on, and the id map of that; also tells the share of the adapted weights in it.
    """

    def __init__(
        self,
        model,
        processor,
        device: torch.device,
        dtype: torch.dtype,
        short_side: int | None = None,
        save_masks: Path | None = None,
        adapt: Callable[[object, Sequence[Image.Image], np.ndarray], tuple] | None = None,
    ):
        self.model = model
        self.adapt = adapt
        self.processor = processor
        self.device = device
        self.dtype = dtype
        self.size = size_option(processor, short_side)
        self.save_masks = save_masks
        self.num_parameters = count_parameters(model)

    def run(self, sequence: EvaluationSequence, count_macs: bool = False) -> SequenceResult:
        """
        Follows the objects of a sequence from their first frames on, and scores the masks where there is ground truth.

        Args:
            sequence ([`EvaluationSequence`]): What to follow.
            count_macs (`bool`, *optional*, defaults to `False`): Whether to count those of the last step.

        Returns:
            [`SequenceResult`]
        """
        scorer = SequenceScorer(sequence)
        outputs = set(sequence.output_frames)
        stream = SequenceStream(self, sequence.name, sequence.max_short_side, sequence.images)
        last = sequence.images[-1].stem
        for path in sequence.images:
            ids = stream.step(
                _FileFrame(sequence, path), count_macs=count_macs and path.stem == last, save=path.stem in outputs
            )
            if path.stem in outputs:
                # Here the clock stands still: scoring is no part of the stream.
                scorer.update(path.stem, ids)
        return stream.result(scorer.result(), len(sequence.objects))


class StreamFrame(Protocol):
    """
    What a [`SequenceStream`] steps on.

    Attributes:
        name (`str`): Its name in the sequence.
        label (`str`): What messages call it.
    """

    name: str
    label: str

    def read_image(self) -> Image.Image:
        """The picture, RGB."""

    def read_given(self) -> tuple[list[int], np.ndarray] | None:
        """The objects that start here, and their ids' map, all else 0; `None` where none starts."""


class _Pictures(Sequence):
    """Image files, read when they are asked for."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: int) -> Image.Image:
        return read_picture(self._paths[position])


class _FileFrame:
    """A frame of a sequence of files."""

    def __init__(self, sequence: EvaluationSequence, path: Path):
        self._sequence, self._path = sequence, path
        self.name, self.label = path.stem, str(path)

    def read_image(self) -> Image.Image:
        return read_picture(self._path)

    def read_given(self) -> tuple[list[int], np.ndarray] | None:
        ids = self._sequence.given_mask(self.name)
        objects = [item.object_id for item in self._sequence.objects if item.first_frame == self.name]
        return None if ids is None else (objects, ids)


class SequenceStream:
    """
    One sequence on its way through the model: the session and the clock; only numbers are kept of a frame.

    Args:
        runner ([`SequenceRunner`]): The model.
        name (`str`): The sequence.
        max_short_side (`int`, *optional*): Frames with a larger short side are scaled down to it for the model.
        images (sequence of `Path`, *optional*): Files of all frames, where they are known beforehand: for adaptation.
    """

    def __init__(
        self, runner: SequenceRunner, name: str, max_short_side: int | None = None, images: Sequence[Path] = ()
    ):
        self.runner = runner
        # Adapted at the first given mask, if the runner does that.
        self.model = None if runner.adapt else runner.model
        self.adaptation_seconds: float | None = None
        self.adapted_share: float | None = None
        self.name = name
        self.max_short_side = max_short_side
        self.images = images
        self.session = runner.processor.init_video_session(video=None, device=runner.device, dtype=runner.dtype)
        self.next_index = 0
        self.num_frames = 0
        self.seconds = 0.0
        self.step_times: list[float] = []
        self.macs: int | None = None
        self.network_size: tuple[int, int] | None = None

    def step(self, frame: StreamFrame, count_macs: bool, save: bool = True) -> np.ndarray:
        """Reads, segments and saves one frame; returns its ids, `uint8` of shape `(height, width)`."""
        start = time.perf_counter()
        image, given = frame.read_image(), frame.read_given()
        size = (image.height, image.width)
        if given is not None and given[1].shape != size:
            raise ValueError(f"The mask of {frame.label} must have its size {size}, got {given[1].shape}.")
        if given is not None and self.model is None:
            start += self._adapt(image, frame.name, given[1])
        if given is None and self.next_index == 0:
            ids = np.zeros(size, dtype=np.uint8)
        else:
            if given is not None:
                self._add_objects(*given)
            ids = self._segment(image, size, count_macs, timed=given is None)
            if given is not None:
                ids = overrule(ids, given[1])
        if save and self.runner.save_masks is not None:
            target = mask_path(self.runner.save_masks, self.name, frame.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_palette_png(target, ids)
        # Counting takes several times as long as running.
        if not count_macs:
            self.seconds += time.perf_counter() - start
            self.num_frames += 1
        return ids

    def _adapt(self, image: Image.Image, name: str, given: np.ndarray) -> float:
        """Makes the model of this sequence; returns the seconds that took."""
        start = time.perf_counter()
        first = next((index for index, path in enumerate(self.images) if path.stem == name), None)
        ahead = [image] if first is None else _Pictures(self.images[first:])
        self.model, self.adapted_share = self.runner.adapt(self.runner.model, ahead, given)
        self.adaptation_seconds = time.perf_counter() - start
        return self.adaptation_seconds

    def _add_objects(self, object_ids: list[int], given: np.ndarray) -> None:
        """Gives the session the objects that start in this frame."""
        self.runner.processor.add_inputs_to_inference_session(
            self.session,
            frame_idx=self.next_index,
            obj_ids=object_ids,
            input_masks=np.stack([given == object_id for object_id in object_ids]),
            original_size=given.shape,
        )

    def _segment(self, image: Image.Image, size: tuple[int, int], count_macs: bool, timed: bool) -> np.ndarray:
        """The ids that the model sees in one frame."""
        runner = self.runner
        image = limit_short_side(image, self.max_short_side)
        pixel_values = runner.processor(images=image, return_tensors="pt", **runner.size).pixel_values[0]
        pixel_values = pixel_values.to(runner.device, runner.dtype)
        self.network_size = tuple(pixel_values.shape[-2:])
        output = self._network(pixel_values, timed, count_macs)
        self.next_index += 1
        return runner.processor.post_process_id_map(output, original_size=size).astype(np.uint8)

    def _network(self, pixel_values: torch.Tensor, timed: bool, count_macs: bool):
        """One step of the model, timed or counted."""
        if count_macs:
            with counting_macs() as macs, torch.no_grad():
                output = self.model(inference_session=self.session, frame=pixel_values)
            # Nothing is counted of an exported model: its products are not PyTorch's.
            self.macs = macs.value or None
            return output
        synchronize(self.runner.device)
        start = time.perf_counter()
        with torch.no_grad():
            output = self.model(inference_session=self.session, frame=pixel_values)
        synchronize(self.runner.device)
        if timed:
            self.step_times.append(time.perf_counter() - start)
        return output

    def result(self, score: SequenceScore, num_objects: int) -> SequenceResult:
        """Everything about the sequence, which has `num_objects` objects."""
        num_parameters = self.runner.num_parameters
        facts = ModelFacts(num_parameters)
        if self.macs is not None:
            facts = ModelFacts(num_parameters, self.macs, self.network_size, num_objects)
        return SequenceResult(score, self.timing(), facts)

    def timing(self) -> StreamTiming | None:
        """Speed and memory so far; `None` where no frame was timed."""
        if self.num_frames == 0:
            return None
        steady = self.step_times[_WARM_UP_FRAMES:] or self.step_times
        on_cuda = self.runner.device.type == "cuda"
        return StreamTiming(
            num_frames=self.num_frames,
            stream_seconds=self.seconds,
            network_ms=1e3 * stdlib_statistics.median(steady) if steady else None,
            network_size=self.network_size or (0, 0),
            peak_memory_bytes=peak_memory(),
            peak_device_memory_bytes=torch.cuda.max_memory_allocated(self.runner.device) if on_cuda else None,
            adaptation_seconds=self.adaptation_seconds,
            adapted_share=self.adapted_share,
        )


def load_pretrained(config: RunnerConfig) -> tuple:
    """Loads the model and the processor that a [`RunnerConfig`] names; the model to be adapted as it was trained."""
    overrides = {} if config.memory_interval is None else {"memory_interval": config.memory_interval}
    overrides |= config.overrides
    if config.adaptation is None:
        return load_for_inference(config.model, config.device, config.dtype, overrides)
    return load_checkpoint(config.model, config.device, overrides), AutoProcessor.from_pretrained(config.model)


def device_of(config: RunnerConfig) -> torch.device:
    """Where a [`RunnerConfig`] runs: an exported model on the CPU, whatever there is."""
    return torch.device("cpu") if is_exported(config.model) else resolve_device(config.device)


def load_runner(config: RunnerConfig, loader: Callable[[RunnerConfig], tuple] = load_pretrained) -> SequenceRunner:
    """The model that a [`RunnerConfig`] names, ready to run."""
    model, processor = loader(config)
    folder = Path(config.save_masks) if config.save_masks else None
    device, dtype = device_of(config), getattr(torch, config.dtype)

    def adapted(model, frames: Sequence[Image.Image], given: np.ndarray) -> tuple:
        size = size_option(processor, config.short_side)
        made, share = config.adaptation.adapt_to_video(model, processor, frames, {0: given}, size)
        return prepare_for_inference(made, config.dtype), share

    options = {"adapt": adapted} if config.adaptation else {}
    return SequenceRunner(model, processor, device, dtype, config.short_side, folder, **options)


def evaluate(
    dataset: EvaluationDataset,
    config: RunnerConfig,
    num_workers: int = 1,
    progress: Callable[[SequenceResult], None] | None = None,
    loader: Callable[[RunnerConfig], tuple] = load_pretrained,
) -> EvaluationRun:
    """
    Runs a model over a benchmark.

    Args:
        dataset ([`EvaluationDataset`]): What to run on.
        config ([`RunnerConfig`]): What to run, and how.
        num_workers (`int`, *optional*, defaults to 1): Processes; each takes whole sequences and its share of threads.
        progress (callable, *optional*): Called with each [`SequenceResult`], in the order of the data set.
        loader (callable, *optional*): Makes `(model, processor)` from `config` in each process.

    Returns:
        [`EvaluationRun`]

    Raises:
        ValueError: If a setting is out of range, or the folder to resume belongs to another run.
        OSError: If there are no weights under that name.
    """
    if num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")
    device = device_of(config)
    weights_sha256 = hash_weights(config.model)
    finished = _prepare_folder(dataset, config, weights_sha256)
    num_workers = min(num_workers, len(dataset.sequences))
    num_threads = config.num_threads or torch.get_num_threads()
    per_process = max(num_threads // num_workers, 1)
    pending = [sequence.name for sequence in dataset.sequences if sequence.name not in finished]
    tasks = [
        (sequence, config, sequence.name in finished, sequence.name == pending[0] if pending else False)
        for sequence in dataset.sequences
    ]
    results = []
    initargs = (config, loader, per_process)
    for result in map_in_processes(_run_task, tasks, num_workers, _Worker.start, initargs):
        results.append(result)
        if progress is not None:
            progress(result)
    return EvaluationRun(
        dataset=dataset,
        config=config,
        num_workers=num_workers,
        results=tuple(results),
        weights_sha256=weights_sha256,
        hardware=describe_hardware(device, config.dtype, per_process, num_workers),
        versions=describe_versions(),
    )


class _Worker:
    """What a process keeps between sequences: the model, loaded when the first sequence needs it."""

    config: RunnerConfig
    loader: Callable
    runner: SequenceRunner | None = None

    @classmethod
    def start(cls, config: RunnerConfig, loader: Callable, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        cls.config, cls.loader, cls.runner = config, staticmethod(loader), None

    @classmethod
    def get(cls) -> SequenceRunner:
        if cls.runner is None:
            cls.runner = load_runner(cls.config, cls.loader)
        return cls.runner


def _run_task(sequence: EvaluationSequence, config: RunnerConfig, finished: bool, count_macs: bool) -> SequenceResult:
    """Runs a sequence in this process, or scores the masks it has already."""
    if finished:
        return SequenceResult(score_folder(sequence, Path(config.save_masks) / sequence.name))
    return _Worker.get().run(sequence, count_macs)


def mask_path(folder: str | os.PathLike, sequence: str, frame: str) -> Path:
    """Where the mask of a frame of a sequence is saved."""
    return Path(folder) / sequence / f"{frame}.png"


def _prepare_folder(dataset: EvaluationDataset, config: RunnerConfig, weights_sha256: str | None) -> set[str]:
    """Readies the folder of masks; returns the sequences that need not be run again."""
    if config.save_masks is None:
        return set()
    folder = Path(config.save_masks)
    check_folder(folder, f"`save_masks` must be a folder that can be written to, got {folder}")
    _keep_inputs(dataset, folder)
    folder.mkdir(parents=True, exist_ok=True)
    # What the masks depend on: a later run may take them up only if it would write the same.
    identity = {
        "dataset": dataset.name,
        "weights": weights_sha256 or config.model,
        "dtype": config.dtype,
        "short_side": config.short_side,
        "memory_interval": config.memory_interval,
        "overrides": config.overrides,
        "adaptation": asdict(config.adaptation) if config.adaptation else None,
        "frames": {sequence.name: _fingerprint(sequence) for sequence in dataset.sequences},
    }
    identity = json.loads(json.dumps(identity))  # as it will be read again: JSON knows no tuples
    finished = _finished_sequences(dataset, folder, identity) if config.resume else set()
    for sequence in dataset.sequences:
        if sequence.name not in finished:
            # Masks of an earlier run must not pass for this one's if it is interrupted and resumed.
            for frame in sequence.output_frames:
                mask_path(folder, sequence.name, frame).unlink(missing_ok=True)
    previous = _read_identity(folder) if config.resume else {}
    identity["frames"] = previous.get("frames", {}) | identity["frames"]
    write_json(folder / RUN_FILE, identity)
    return finished


def _keep_inputs(dataset: EvaluationDataset, folder: Path) -> None:
    """An error where masks would take the places of the frames or masks that are read."""
    for sequence in dataset.sequences:
        target = (folder / sequence.name).resolve()
        sources = {path.parent for path in (*sequence.images, *sequence.annotations.values())}
        if target in {source.resolve() for source in sources}:
            raise ValueError(
                f"`save_masks` must not be where the data set is, got {folder}: masks would take the places of files "
                f"in {target}. Choose another folder."
            )


def _fingerprint(sequence: EvaluationSequence) -> str:
    """What tells a sequence from another of its name: its frames and given masks, by name and size."""
    given = {item.first_frame for item in sequence.objects}
    files = [*sequence.images, *(path for frame, path in sorted(sequence.annotations.items()) if frame in given)]
    listed = "".join(f"{path.name} {path.stat().st_size if path.is_file() else 0}\n" for path in files)
    return f"{len(sequence.images)} {sha256(listed.encode()).hexdigest()[:16]}"


def _read_identity(folder: Path) -> dict:
    """What the masks in a folder were made with; empty where that is not recorded."""
    path = folder / RUN_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be the JSON that an evaluation wrote, got something else ({error}).") from error


def _finished_sequences(dataset: EvaluationDataset, folder: Path, identity: dict) -> set[str]:
    """Sequences whose masks are all there, made by the same weights and settings."""
    previous = _read_identity(folder)
    if not previous:
        logger.warning(f"{folder} records no earlier run ({RUN_FILE}); every sequence is run.")
        return set()
    for key, value in identity.items():
        if key != "frames" and previous.get(key) != value:
            raise ValueError(
                f"`resume` takes up masks of the same weights and settings: {folder} was written with {key} "
                f"{previous.get(key)!r}, got {value!r}. Use another folder or leave `resume` out."
            )
    return {
        sequence.name
        for sequence in dataset.sequences
        if previous["frames"].get(sequence.name) == identity["frames"][sequence.name]
        and all(mask_path(folder, sequence.name, frame).is_file() for frame in sequence.output_frames)
    }


def peak_memory() -> int | None:
    """Peak resident memory of this process in bytes; `None` where the system does not tell."""
    # A process inherits `ru_maxrss` from the one that spawned it, on Linux; the status file starts afresh.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_hardware(device: torch.device, dtype: str, num_threads: int, num_workers: int) -> dict:
    """What the times were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "logical_cpus": os.cpu_count(),
        "threads_per_process": num_threads,
        "processes": num_workers,
        "device": str(device),
        "device_name": cpu if device.type == "cpu" else describe_device(device),
        "dtype": dtype,
    }


def describe_versions() -> dict:
    """Versions that a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("hf_deformvos", "torch", "transformers", "numpy", "pillow"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Writes JSON whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


__all__ = [
    "Adapter",
    "DTYPES",
    "EvaluationRun",
    "ModelFacts",
    "RunnerConfig",
    "SequenceResult",
    "SequenceRunner",
    "SequenceStream",
    "StreamFrame",
    "StreamTiming",
    "count_parameters",
    "device_of",
    "describe_hardware",
    "describe_versions",
    "evaluate",
    "load_pretrained",
    "load_runner",
    "mask_path",
    "peak_memory",
    "write_json",
]
