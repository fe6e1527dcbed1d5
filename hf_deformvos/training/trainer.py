"""The training loop: schedule, optimizer, averaged weights, checkpoints that resume exactly, logs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast, broadcast_object_list, gather, is_tensorboard_available
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from ..data.clips import ClipSampler, Prefetcher, RawBatch
from ..data.transforms import augment_clips
from ..inference import describe_device
from ..publishing.hub import Target
from .batches import DrawnBatch, WorkerProcesses
from .checkpoint import (
    BEST_FILE,
    Tensors,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    set_later_aside,
    write_checkpoint,
)
from .config import Stage, TrainingConfig
from .ema import WeightAverage
from .lineage import lineage, total_clips
from .losses import bootstrap_share
from .optimization import FreezeSchedule, learning_rate_factor, load_optimizer, parameter_groups
from .runlog import RunLog, without_nonfinite
from .stopwatch import Stopwatch
from .task import SegmentationTask, StepPlan, step_generator


logger = logging.get_logger(__name__)

RESULTS_FILE = "all_results.json"

_MAX_SKIPPED_STEPS = 20
# Reading data for the first time, which one process does for all, may take hours.
_PATIENCE = timedelta(hours=12)


@contextmanager
def _stop_requests(num_processes: int) -> Iterator[list[int]]:
    """
    The signals that have asked the run to end: Ctrl-C's, and SIGTERM, which whoever lends a machine sends before it
    takes it back. Asked once more, the process ends at once.

    Of several processes each would hear it at a step of its own, and wait for the others for ever; they end at once.
    """
    asked: list[int] = []
    if num_processes > 1 or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hear(number: int, _) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    # A shell's background jobs ignore Ctrl-C.
    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in heard}
    for number in heard:
        signal.signal(number, hear)
    try:
        yield asked
    finally:
        for number in heard:
            signal.signal(number, before[number])


class TrainingDiverged(RuntimeError):
    """A run whose gradients are no numbers any more."""


class Trainer:
    """
    Trains a task's student.

    Args:
        config ([`TrainingConfig`]): Settings.
        task ([`SegmentationTask`]): Holds the student; its `forward` returns named losses.
        sampler ([`ClipSampler`]): Source of raw clips.
        processor (*optional*): Saved beside the model.
        evaluate (`Callable[[nn.Module, torch.device], dict[str, float]]`, *optional*): Called on the averaged weights
            every `config.eval_steps` steps; the checkpoint with the highest `eval_j` is kept in `best/`.
        accelerator (`Accelerator`, *optional*): Default one from the configuration.

    Raises:
        ValueError: If neither steps nor minutes limit the run, supervision needs a teacher that is not there, or
            `config.freeze` names no parameter.
    """

    def __init__(
        self,
        config: TrainingConfig,
        task: SegmentationTask,
        sampler: ClipSampler,
        processor=None,
        evaluate: Callable[[nn.Module, torch.device], dict[str, float]] | None = None,
        accelerator: Accelerator | None = None,
    ):
        if not config.max_train_steps and not config.max_train_minutes:
            raise ValueError("A run needs `max_train_steps` or `max_train_minutes`, got neither.")
        config.check_teacher(task.teacher)
        if config.push_to_hub:
            Target(config.hub_model_id)  # a wrong name is told before the run rather than after it
        self.config, self.task, self.sampler, self.processor, self.evaluate = (
            config,
            task,
            sampler,
            processor,
            evaluate,
        )
        self.output_dir = Path(config.output_dir)
        self.accelerator = accelerator or make_accelerator(config)
        student = task.student
        if config.gradient_checkpointing:
            # The second is its older name, which newer releases of transformers warn of.
            enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
            enable()
        student.to(self.accelerator.device)
        if config.channels_last:
            student.to(memory_format=torch.channels_last)
        groups = parameter_groups(student, config)
        self._freeze = FreezeSchedule(student, config.freeze, config.freeze_until)
        self._on_gpu = self.accelerator.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=self._on_gpu)
        self.student = student
        self.average = WeightAverage(student, config.ema_decay)
        task.student, self.optimizer = self.accelerator.prepare(student, optimizer)
        if task.teacher is not None:
            task.teacher.to(self.accelerator.device)
            if config.channels_last:
                task.teacher.to(memory_format=torch.channels_last)
        task.stopwatch = Stopwatch(self.accelerator.device)
        self.log = RunLog(self.output_dir, self.accelerator, config.with_tracking)
        self.step = 0
        self.elapsed = 0.0
        self.clips = 0
        self.best = -math.inf
        self._saved_step: int | None = None
        self._is_elsewhere = False
        self._skipped = 0
        self._history: list[dict] = []
        self._evaluation: dict[str, float] = {}
        self._evaluated_step = -1
        self._last_line: dict[str, float] = {}
        self._resumed_at, self._resumed_progress = 0.0, 0.0
        self._origins: dict | None = None

    # ---- schedule ---------------------------------------------------------------------------------------------------

    def progress_at(self, step: int, elapsed: float) -> float:
        """Share of the run that is done: by steps or by minutes, whichever is further."""
        shares = [0.0]
        if self.config.max_train_steps:
            shares.append(step / self.config.max_train_steps)
        if self.config.max_train_minutes:
            shares.append(elapsed / (60 * self.config.max_train_minutes))
        return min(1.0, max(shares))

    def _shared_progress(self) -> float:
        """Progress that all processes agree on: the first one's clock counts."""
        if self.config.max_train_minutes and self.accelerator.num_processes > 1:
            tensor = torch.tensor(self.elapsed, dtype=torch.float64, device=self.accelerator.device)
            self.elapsed = float(broadcast(tensor))
        return self.progress_at(self.step, self.elapsed)

    # ---- loop -------------------------------------------------------------------------------------------------------

    def train(self) -> dict:
        """
        Runs until the steps or minutes are used up, then saves the averaged weights and `all_results.json`.

        A single process that is told to end (Ctrl-C, SIGTERM) writes a checkpoint first, and raises `SystemExit`.

        Returns:
            `dict`: the results.

        Raises:
            ValueError: If the folder holds another run's checkpoints or results and this one does not resume, or a
                checkpoint does not fit.
            TrainingDiverged: If too many steps in a row had gradients that are not finite.
        """
        config = self.config
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if config.resume_from_checkpoint:
            self._resume()
        else:
            self._refuse_to_overwrite()
        if self._origins is None:
            # Now, not at the end: by then another model may lie in the folder of the one that this run started from.
            self._origins = lineage(config)
        # Also before a first step of a quick process can write a checkpoint that a slow one would take for another's.
        self._check_that_all_begin_alike()
        finished = self._finished_results()
        if finished is not None:
            return finished
        self._set_later_checkpoints_aside()
        if self._is_elsewhere and config.checkpointing_steps:
            self.save_checkpoint()  # `latest` is this from now on
        self.log.start(self.step, config.to_dict())
        batches = self._batches()
        self.task.train()
        try:
            with _stop_requests(self.accelerator.num_processes) as asked:
                self._loop(batches, asked)
        finally:
            batches.close()
        return self._finish()

    def _check_that_all_begin_alike(self) -> None:
        """A checkpoint that only some processes find would make them train different models as one."""
        steps = gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"All processes must begin at the same step, got {steps}: `output_dir` must be on a disk that all "
                "machines share, or the checkpoint be copied to each."
            )

    def _finished_results(self) -> dict | None:
        """The results of the run, where it was over before it was resumed; its files stay as they are."""
        found = None
        is_over = self.step > 0 and self.progress_at(self.step, self.elapsed) >= 1.0
        if is_over and not self._is_elsewhere:
            try:
                found = json.loads((self.output_dir / RESULTS_FILE).read_text())
                weights = (self.output_dir / "model.safetensors").read_bytes()
                if (found["steps"], found["sha256"]) != (self.step, hashlib.sha256(weights).hexdigest()):
                    found = None
            except (OSError, ValueError, LookupError, TypeError):  # it ended before they were written
                found = None
        # Of several machines the first may be the only one that has them.
        (found,) = broadcast_object_list([found])
        if found is not None:
            logger.info(
                f"{self.output_dir} holds this run, which is over after {self.step} steps; nothing is changed."
            )
            if self.config.push_to_hub and self.accelerator.is_main_process:
                self._push()
        return found

    def _set_later_checkpoints_aside(self) -> None:
        """A run that goes back to an earlier checkpoint leaves the later ones, and `latest` must not find them."""
        if self.accelerator.is_main_process:
            # This step's own checkpoint stays, if it is the one that was taken up.
            moved = set_later_aside(self.output_dir, self.step if self._is_elsewhere else self.step + 1)
            if moved:
                places = ", ".join(path.name for path in moved)
                logger.warning(f"Going back to step {self.step}: what lies beyond it is kept as {places}.")
            if any(path.name.startswith("abandoned-best") for path in moved):
                self.best = -math.inf  # of this step there is no such model any more
        self.accelerator.wait_for_everyone()

    def _refuse_to_overwrite(self) -> None:
        """An earlier run is not lost to a repeated command; one that keeps no checkpoints may be repeated."""
        folder = self.config.output_dir
        if list_checkpoints(self.output_dir):
            raise ValueError(
                f"`output_dir` {folder!r} holds an earlier run's checkpoints; continue it with "
                "`resume_from_checkpoint` latest, or name another folder."
            )
        if self.config.checkpointing_steps and (self.output_dir / RESULTS_FILE).exists():
            raise ValueError(
                f"`output_dir` {folder!r} holds the {RESULTS_FILE} of an earlier run that is over; name another "
                "folder, or remove this one."
            )

    def _loop(self, batches: Prefetcher | WorkerProcesses, asked_to_end: list[int]) -> None:
        """Steps, with what is due after each, until the run is over or shall stop."""
        config = self.config
        self._clock = time.perf_counter()
        progress = self._shared_progress()
        while progress < 1.0:
            if asked_to_end:
                self.save_checkpoint()
                raise SystemExit(128 + asked_to_end[0])
            record = self._train_step(batches, progress)
            progress = self._shared_progress()
            self._record(record, progress)
            if config.eval_steps and self.step % config.eval_steps == 0:
                self._run_evaluation()
            if config.checkpointing_steps and self.step % config.checkpointing_steps == 0:
                self.save_checkpoint()

    def _batches(self) -> Prefetcher | WorkerProcesses:
        """
        Batches from the current step on. On a GPU, processes make them whole, ahead of the step; a CPU has no cores to
        spare: there a thread draws clips ahead, and they are augmented when they are called for.
        """
        world = self.accelerator.num_processes
        first = self.step * self.config.gradient_accumulation_steps * world + self.accelerator.process_index
        workers = self.config.data_workers
        if self._on_gpu and workers:
            keys = ((index, self._stage_of(index)) for index in itertools.count(first, world))
            return WorkerProcesses(self._make, keys, workers, self.accelerator.device)

        def draw(index: int) -> Callable[[], DrawnBatch]:
            stage = self._stage_of(index)
            raw = self.sampler(index, self.config.clip_spec(stage))
            return lambda: self._augment(raw, index, stage, self.accelerator.device)

        return Prefetcher(draw, first=first, stride=world, workers=workers)

    def _stage_of(self, index: int) -> Stage:
        """The stage of batch number `index`, which may be drawn ahead."""
        step = index // (self.config.gradient_accumulation_steps * self.accelerator.num_processes)
        return self.config.stage_at(self.progress_at(step, self.elapsed))

    def _make(self, index: int, stage: Stage) -> DrawnBatch:
        """Batch number `index`, in a process that has no device but the CPU."""
        raw = self.sampler(index, self.config.clip_spec(stage))
        return self._augment(raw, index, stage, torch.device("cpu"))

    def _augment(self, raw: RawBatch, index: int, stage: Stage, device: torch.device) -> DrawnBatch:
        """A batch's clips, and the generator of the rest of its step's draws."""
        generator = step_generator(self.config.seed, index)
        return augment_clips(raw, self.config.augmentation(stage), generator, device), generator

    def _train_step(self, batches: Prefetcher | WorkerProcesses, progress: float) -> dict[str, float]:
        """One optimizer step; returns losses and where the time went, in seconds."""
        config, accelerator = self.config, self.accelerator
        factor = learning_rate_factor(progress, self.step, config.warm_up, config.poly_power)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * group["lr_scale"] * factor
        self._freeze.apply(progress)
        plan = StepPlan(
            own_masks=config.own_mask_probability(progress),
            bootstrap_share=bootstrap_share(progress, config.bootstrap_warm_up, config.bootstrap_share),
        )
        totals: dict[str, torch.Tensor] = {}
        times = {"wait": 0.0, "augment": 0.0}
        clips = 0
        for part in range(config.gradient_accumulation_steps):
            last = part == config.gradient_accumulation_steps - 1
            started = time.perf_counter()
            drawn = batches.get()
            arrived = time.perf_counter()
            batch, generator = drawn()
            times["wait"] += arrived - started
            times["augment"] += time.perf_counter() - arrived
            # Anything in the student that draws from the global generators is tied to the batch number, too.
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            with _sync(accelerator, self.task.student, last):
                with accelerator.autocast():
                    losses = self.task(batch, plan, generator)
                # Under autocast, what the losses compute in float32 would go backward in half precision.
                with self.task.stopwatch.part("backward"):
                    accelerator.backward(losses["loss"] / config.gradient_accumulation_steps)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / config.gradient_accumulation_steps
            clips += len(batch.id_masks) * accelerator.num_processes
        norm = accelerator.clip_grad_norm_(self.task.student.parameters(), config.max_grad_norm)
        self._apply(norm)
        self.clips += clips
        self.step += 1
        now = time.perf_counter()
        spent, self._clock = now - self._clock, now
        self.elapsed += spent
        return {
            **totals,
            "grad_norm": norm,
            "lr": config.learning_rate * factor,
            "clips": clips,
            "time": spent,
            **times,
        }

    def _apply(self, norm: torch.Tensor) -> None:
        """Updates weights and their average; a step whose gradient is not finite is skipped and counted."""
        if torch.isfinite(torch.as_tensor(norm)):
            self.optimizer.step()
            self.average.update(self.student)
            self._skipped = 0
        else:
            self._skipped += 1
            if self.config.mixed_precision == "fp16":
                # The gradient scaler skips the step itself and lowers its scale, which may take it a few steps.
                self.optimizer.step()
            else:
                logger.warning(f"Step {self.step}: the gradient is not finite; the step is skipped.")
            if self._skipped >= _MAX_SKIPPED_STEPS:
                raise TrainingDiverged(
                    f"{self._skipped} steps in a row had gradients that are not finite; training stops. Lower "
                    f"`learning_rate` ({self.config.learning_rate:g}), or go on from an earlier checkpoint."
                )
        self.optimizer.zero_grad(set_to_none=True)

    # ---- logs -------------------------------------------------------------------------------------------------------

    def _record(self, record: dict, progress: float) -> None:
        """Collects a step's figures and logs their means every `logging_steps` steps and after the last one."""
        self._history.append(record)
        if self.step % self.config.logging_steps and progress < 1.0:
            return
        names = [name for name in record if name.startswith("loss")]
        means = {name: _mean(self._history, name) for name in (*names, "grad_norm", "lr")}
        # Every process has seen other clips; the mean is the loss that the step went down.
        shared = torch.tensor([means[name] for name in names], dtype=torch.float32, device=self.accelerator.device)
        means.update(zip(names, self.accelerator.reduce(shared, "mean").tolist(), strict=True))
        total = sum(item["time"] for item in self._history)
        parts = self.task.stopwatch.read()
        line = {
            "step": self.step,
            "progress": round(progress, 4),
            **means,
            "clips_per_second": sum(item["clips"] for item in self._history) / total,
            "data_wait_share": sum(item["wait"] for item in self._history) / total,
            "augment_share": sum(item["augment"] for item in self._history) / total,
            **{f"{name}_share": seconds / total for name, seconds in parts.items()},
            "elapsed": self.elapsed,
        }
        self._history.clear()
        self._last_line = without_nonfinite(line)
        if not self.accelerator.is_main_process:
            return
        done = line["progress"]
        remaining = (self.elapsed - self._resumed_at) / max(done - self._resumed_progress, 1e-6)
        losses = " ".join(f"{name} {value:.4f}" for name, value in line.items() if name.startswith("loss"))
        shares = " ".join(f"{name} {line[f'{name}_share']:.0%}" for name in ("data_wait", "augment", *parts))
        logger.info(
            f"step {self.step} ({done:.1%}) {losses} grad {line['grad_norm']:.2f} lr {line['lr']:.2e} "
            f"{line['clips_per_second']:.2f} clips/s [{shares}] eta {remaining * (1 - done) / 60:.1f} min"
        )
        self.log.write(self._last_line)

    def _run_evaluation(self) -> None:
        """Scores the averaged weights and keeps the best."""
        self._evaluated_step = self.step
        if self.evaluate is None or not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return
        current = {name: value.clone() for name, value in self.student.state_dict().items()}
        self.student.load_state_dict(self.average.weights)
        self._evaluation = self.evaluate(self.student, self.accelerator.device)
        self.student.load_state_dict(current)
        self.task.train()
        score = self._evaluation.get("eval_j", -math.inf)
        logger.info(f"step {self.step} eval_j {score:.4f}")
        self.log.write({"step": self.step, **self._evaluation})
        self.log.draw(self.step, getattr(self.evaluate, "strips", {}))
        if score > self.best:
            self.best = score
            self.save_release(self.output_dir / "best")
            (self.output_dir / "best" / BEST_FILE).write_text(json.dumps({"step": self.step, "eval_j": score}) + "\n")
        # Not part of the time that the schedule counts.
        self._clock = time.perf_counter()
        self.accelerator.wait_for_everyone()

    # ---- files ------------------------------------------------------------------------------------------------------

    def save_release(self, folder: str | Path) -> None:
        """Writes the averaged weights as a model folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.average.weights.items()}
        if hasattr(self.student, "save_pretrained"):
            self.student.save_pretrained(folder, state_dict=weights)
        else:
            save_file(weights, folder / "model.safetensors")
        if self.processor is not None:
            self.processor.save_pretrained(folder)

    def save_checkpoint(self) -> None:
        """Writes `checkpoint-<step>`: a model folder with the averaged weights, and all that resuming needs."""
        if self.accelerator.is_main_process and self._saved_step != self.step:

            def write(folder: Path) -> None:
                self.save_release(folder)
                optimizer = {"optimizer": self.optimizer.state_dict()}
                if self.accelerator.scaler is not None:
                    optimizer["scaler"] = self.accelerator.scaler.state_dict()
                Tensors(self.student.state_dict(), self.average.weights, optimizer).save(folder)

            state = {
                "step": self.step,
                "elapsed": self.elapsed,
                "clips": self.clips,
                "best": self.best if math.isfinite(self.best) else None,
                "average_updates": self.average.updates,
                "origins": self._origins,
                "processes": self.accelerator.num_processes,
                "config": self.config.to_dict(),
            }
            path = write_checkpoint(self.output_dir, self.step, write, state, self.config.checkpoints_total_limit)
            logger.info(f"step {self.step}: wrote {path}")
        self._saved_step = self.step
        self._clock = time.perf_counter()
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Continues from a checkpoint, exactly."""
        path = find_checkpoint(self.output_dir, self.config.resume_from_checkpoint)
        if path is None:
            self._refuse_to_overwrite()
            logger.warning(f"No checkpoint in {self.output_dir}; training starts afresh.")
            return
        if path.parent.resolve() != self.output_dir.resolve():
            self._refuse_to_overwrite()
        state, tensors = read_checkpoint(path)
        self._warn_of_changes(state["config"], state.get("processes"))
        try:
            self.student.load_state_dict(tensors.student)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} was written by a run with another student: {reason}") from error
        self.average.load(tensors.average, state["average_updates"])
        try:
            load_optimizer(self.optimizer, tensors.optimizer["optimizer"])
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The optimizer of {path} is damaged ({type(error).__name__}: {error}): resume from an earlier one."
            ) from error
        if self.accelerator.scaler is not None and "scaler" in tensors.optimizer:
            self.accelerator.scaler.load_state_dict(tensors.optimizer["scaler"])
        self.step, self.elapsed, self.clips = state["step"], state["elapsed"], state["clips"]
        self.best = -math.inf if state["best"] is None else state["best"]
        self._origins = state.get("origins")
        if self._origins is not None and _teacher_hash(self._origins) != _teacher_hash(lineage(self.config)):
            logger.warning(f"The teacher in {self.config.teacher} is not the one that this run began with.")
        self._resumed_at, self._resumed_progress = self.elapsed, self.progress_at(self.step, self.elapsed)
        # In another folder, or abandoned once.
        self._is_elsewhere = path.resolve() != (self.output_dir / f"checkpoint-{self.step}").resolve()
        self._saved_step = None if self._is_elsewhere else self.step
        logger.info(f"Resumed from {path} at step {self.step}, {self.elapsed / 60:.1f} minutes.")

    def _warn_of_changes(self, before: dict, processes: int | None) -> None:
        """Says which settings, and numbers of processes, are not those that the checkpoint was written with."""
        free = {"output_dir", "resume_from_checkpoint", "cache_dir", "data_workers", "logging_steps"}
        now = self.config.to_dict()
        if processes is not None:
            before, now = before | {"processes": processes}, now | {"processes": self.accelerator.num_processes}
        changed = [name for name in now if name not in free and name in before and before[name] != now[name]]
        if changed:
            listed = ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in changed)
            logger.warning(f"Settings changed since the checkpoint, so this is not the run that it began: {listed}")

    def _finish(self) -> dict:
        """Saves the model and the results; a checkpoint too, so that a repeated command takes no further step."""
        if self.config.eval_steps and self._evaluated_step != self.step:
            self._run_evaluation()
        if self.config.checkpointing_steps or list_checkpoints(self.output_dir):
            self.save_checkpoint()
        origins, device = self._origins, self.accelerator.device
        # A run that was over when it was resumed has taken no step of its own.
        last_line = self._last_line or next((line for line in reversed(self.log.lines()) if "loss" in line), {})
        results = {
            "steps": self.step,
            "minutes": self.elapsed / 60,
            "device": describe_device(device),
            "processes": self.accelerator.num_processes,
            "clips": self.clips,
            "parameters": sum(parameter.numel() for parameter in self.student.parameters()),
            **{name: value for name, value in last_line.items() if name not in ("step", "elapsed")},
            **self._evaluation,
            **origins,
            "clips_with_initialisation": total_clips(self.clips, origins.get("initialised_from")),
            "config": self.config.to_dict(),
        }
        if self.accelerator.is_main_process:
            self.save_release(self.output_dir)
            weights = (self.output_dir / "model.safetensors").read_bytes()
            results["sha256"] = hashlib.sha256(weights).hexdigest()
            temporary = self.output_dir / f".writing-{RESULTS_FILE}"
            temporary.write_text(json.dumps(results, indent=2) + "\n")
            os.replace(temporary, self.output_dir / RESULTS_FILE)
            logger.info(f"Wrote {self.output_dir / 'model.safetensors'} after {self.step} steps, {self.clips} clips.")
        self.accelerator.wait_for_everyone()
        self.log.close()
        # Last: whatever the Hub says, the run is saved, and no process waits for another that failed.
        if self.config.push_to_hub and self.accelerator.is_main_process:
            self._push()
        return results

    def _push(self) -> None:
        """Publishes the model as `deformvos publish` does: what belongs to a release, checked, in one commit."""
        from ..publishing.publish import publish_release
        from ..publishing.release import release_run

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / self.config.hub_model_id.split("/")[-1]
            release_run(self.output_dir, folder)
            published = publish_release(folder, self.config.hub_model_id)
        logger.info(f"Published {published.url}, commit {published.commit}.")


def _mean(history: list[dict], name: str) -> float:
    """The mean of one of the figures of some steps, without those that were skipped for not being finite."""
    values = [value for record in history if math.isfinite(value := float(record[name]))]
    return sum(values) / len(values) if values else math.nan


def _teacher_hash(origins: dict) -> str | None:
    """What stands for the teacher's weights, where its record, a release's or a run's, tells."""
    teacher = origins.get("teacher", {})
    return teacher.get("weights_sha256", teacher.get("sha256"))


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run: precision, tracking, and data parallelism that tolerates unused parameters."""
    if config.with_tracking and not is_tensorboard_available():
        raise ValueError("`with_tracking` needs the package tensorboard: pip install tensorboard, or leave it out.")
    return Accelerator(
        # Without it, several processes on a machine without a GPU would each take itself for the only one.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        log_with="tensorboard" if config.with_tracking else None,
        project_dir=config.output_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
    )


def _sync(accelerator: Accelerator, model: nn.Module, last: bool):
    """Gradients travel between processes only after a step's last part."""
    return nullcontext() if last else accelerator.no_sync(model)
