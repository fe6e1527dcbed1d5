"""What this machine can do, and how much of it each stage gets: products and bytes against measured rates."""

import time
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from .clip import Clip
from .clock import StageClock
from .engine import Engine


# Large enough to leave the caches of one core, small enough for a machine of 2 GB.
_MATRIX_SIDE = 1536
_COPY_BYTES = 256 * 2**20
_REPEATS = 7


@dataclass(frozen=True)
class MachineRates:
    """
    The best that this machine did in a few trials.

    Attributes:
        matmul_gmacs (`float`): thousand millions of multiply-accumulates a second, of square matrices.
        copy_gbytes (`float`): thousand millions of bytes a second, read and written together.
    """

    matmul_gmacs: float
    copy_gbytes: float


def measure_rates(device: torch.device, dtype: torch.dtype) -> MachineRates:
    """The rates of a device, with the threads that torch has now."""
    from .clock import synchronizer

    wait = synchronizer(str(device))
    left, right = (torch.randn(_MATRIX_SIDE, _MATRIX_SIDE, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    matmul = _best(lambda: torch.mm(left, right, out=product), wait)
    copy = _best(lambda: target.copy_(source), wait)
    return MachineRates(_MATRIX_SIDE**3 / matmul / 1e9, 2 * _COPY_BYTES / copy / 1e9)


def _best(function, wait) -> float:
    """The shortest time of several trials, in seconds; the first ones are not counted."""
    seconds = []
    for _ in range(2 + _REPEATS):
        wait()
        started = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds[2:])


@dataclass
class StageWork:
    """
    What one frame asks of a stage.

    Attributes:
        macs (`int`): multiply-accumulates of convolutions and matrix products.
        num_bytes (`int`): bytes that its operations read and write, each operation by itself.
        operations (`list[tuple[int, int]]`): both, an entry an operation.
    """

    macs: int = 0
    num_bytes: int = 0
    operations: list[tuple[int, int]] = field(default_factory=list)

    def bound_seconds(self, rates: MachineRates) -> float:
        """
        The time at the machine's rates: every operation takes what the dearer of its products and its bytes takes.
        """
        macs_a_second, bytes_a_second = rates.matmul_gmacs * 1e9, rates.copy_gbytes * 1e9
        return sum(max(macs / macs_a_second, size / bytes_a_second) for macs, size in self.operations)


class _WorkCounter(TorchDispatchMode):
    """Counts every operation into the stage whose clock is running."""

    def __init__(self, clock: "_StageNames"):
        super().__init__()
        self.work: dict[str, StageWork] = {}
        self._clock = clock
        # Builds of PyTorch without oneDNN do not have it.
        self._fused = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in flop_registry:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        macs, size = self._macs(func, args, kwargs, result), self._bytes(func, args, kwargs, result)
        if macs or size:
            work = self.work.setdefault(self._clock.current, StageWork())
            work.macs, work.num_bytes = work.macs + macs, work.num_bytes + size
            work.operations.append((macs, size))
        return result

    def _macs(self, func, args, kwargs, result) -> int:
        packet = func._overloadpacket
        if packet in flop_registry:
            return flop_registry[packet](*args, **kwargs, out_val=result) // 2
        if packet is self._fused:
            return conv_flop_count(args[0].shape, args[1].shape, result.shape, transposed=False) // 2
        return 0

    @staticmethod
    def _bytes(func, args, kwargs, result) -> int:
        """What it reads and writes; a view moves nothing."""
        aliases = [entry.alias_info for entry in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return 0
        leaves = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        # An expanded tensor has fewer bytes than elements.
        return sum(min(leaf.nbytes, leaf.untyped_storage().nbytes()) for leaf in leaves)


class _StageNames(StageClock):
    """A clock that only knows which stage is open."""

    @property
    def current(self) -> str:
        return self._open[-1] if self._open else "propagation"


def count_work(engine: Engine, clip: Clip, num_objects: int) -> dict[str, StageWork]:
    """
    What one frame of the steady stream asks of each stage, a memory write included. Frames are synthetic noise of the
    clip's size: work does not depend on what they show.

    Returns:
        `dict[str, StageWork]`: by stage; those whose work is not torch's (decode, resizing) have none.
    """
    height, width = clip.first_mask.shape
    frame = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()
    session, given = engine.open_session(), clip.mask_of(num_objects)
    for _ in range(engine.num_warmup_frames):
        engine.step(session, frame, given)
        given = None
    clock = _StageNames()
    with engine.watched(session, clock), _WorkCounter(clock) as counter:
        engine.step(session, frame, clock=clock)
    return counter.work


def compare(stages: dict[str, dict], work: dict[str, StageWork], rates: MachineRates) -> dict[str, dict]:
    """
    Stages with their work beside their times.

    Args:
        stages (`dict[str, dict]`): by name, with `median_ms`.
        work (`dict[str, StageWork]`): by name.
        rates ([`MachineRates`]): what the machine can do.

    Returns:
        `dict[str, dict]`: by name, for stages that have both: `gmacs` and `gbytes` a frame, `matmul_share` and
        `copy_share` (rate reached by rate measured), `bound_ms` (the time at the machine's rates) and `bound_share`
        (by the time taken). Operations whose tensors stay in a cache may pass the copy rate: shares can exceed 1.
    """
    compared = {}
    for name, stage in stages.items():
        if name not in work:
            continue
        done, seconds = work[name], stage["median_ms"] / 1e3
        bound = done.bound_seconds(rates)
        compared[name] = {
            "gmacs": round(done.macs / 1e9, 4),
            "gbytes": round(done.num_bytes / 1e9, 4),
            "matmul_share": round(done.macs / seconds / 1e9 / rates.matmul_gmacs, 4),
            "copy_share": round(done.num_bytes / seconds / 1e9 / rates.copy_gbytes, 4),
            "bound_ms": round(1e3 * bound, 3),
            "bound_share": round(bound / seconds, 4),
        }
    return compared


__all__ = ["MachineRates", "StageWork", "compare", "count_work", "measure_rates"]
