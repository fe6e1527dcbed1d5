"""
Measures what a student's architecture costs: parameters, MACs, and network time a frame on this machine.

    python scripts/measure_budget.py --threads 2 --json docs/numbers/budget.json
    python scripts/measure_budget.py --threads 2 --variants --json docs/numbers/budget-variants.json

Weights are random: cost does not depend on them. All cases of a run are timed alternately, one frame each in turn,
with a full memory bank; medians are reported.
"""

import argparse
import json
import shlex
import statistics
import time
from pathlib import Path

import torch

from hf_deformvos import DeformVosConfig, DeformVosImageProcessor, DeformVosModel
from hf_deformvos.evaluation.macs import count_macs
from hf_deformvos.evaluation.runner import describe_hardware
from hf_deformvos.image_processing_deformvos import network_size
from hf_deformvos.inference_session_deformvos import DeformVosInferenceSession


FRAME = (480, 854)
VARIANTS = {
    "released": {},
    "short term: grid of all tokens, locality bias": {"short_term_form": "grid"},
    "short term: window of 5": {"short_term_window": 5},
    "no offsets": {"use_offsets": False},
    "long-term stride 1": {"long_term_stride": 1},
    "1 memory slot": {"long_term_slots": 1},
    "6 memory slots": {"long_term_slots": 6},
    "key size 128": {"key_size": 128},
    "two layers": {"num_hidden_layers": 2},
    "no stride-32 tail": {"backbone_tail": False},
    "decoder 128/96/64": {"decoder_sizes": [128, 96, 64]},
    "objects in the attention": {"object_independent": False},
}


class Case:
    """One configuration with a session whose memory bank is full."""

    def __init__(self, settings: dict, dtype: torch.dtype, num_objects: int, short_side: int):
        size = DeformVosImageProcessor(size={"shortest_edge": short_side, "longest_edge": 1536}).size
        height, width = network_size(*FRAME, size)
        model = DeformVosModel(DeformVosConfig(**settings)).eval()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.model = model.fold_batch_norm().to(dtype, memory_format=torch.channels_last)
        self.frame = torch.randn(3, height, width)
        self.session = DeformVosInferenceSession(memory_interval=1)
        band = torch.arange(height)[:, None].expand(height, width) * num_objects // height
        self.session.add_masks(0, {number + 1: band == number for number in range(num_objects)})
        self.seconds: list[float] = []
        for _ in range(model.config.long_term_slots + 2):
            self.step()
        self.seconds.clear()

    def step(self):
        """One frame through the network, timed."""
        start = time.perf_counter()
        self.model(inference_session=self.session, frame=self.frame)
        self.seconds.append(time.perf_counter() - start)

    def gmacs(self) -> float:
        """Multiply-accumulates of one frame, in thousand millions, its memory read and written."""
        with count_macs() as macs:
            self.model(inference_session=self.session, frame=self.frame)
        return macs.value / 1e9


def build_cases(arguments: argparse.Namespace) -> dict[str, Case]:
    """The cases of a run by name."""
    side = arguments.short_side
    if arguments.variants:
        return {
            f"{name}, {'bf16' if dtype == torch.bfloat16 else 'fp32'}": Case(settings, dtype, 1, side)
            for name, settings in VARIANTS.items()
            for dtype in (torch.float32, torch.bfloat16)
        }
    return {
        f"{'bf16' if dtype == torch.bfloat16 else 'fp32'}, {objects} object{'s' * (objects > 1)}": Case(
            {}, dtype, objects, side
        )
        for dtype in (torch.float32, torch.bfloat16)
        for objects in (1, 10, 30)
    }


def command_of(arguments: argparse.Namespace) -> str:
    """The command that measures this again; where its record lies is left out."""
    names = ("threads", "frames", "short_side")
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    return shlex.join(["python", "scripts/measure_budget.py", *words, *(["--variants"] if arguments.variants else [])])


def main():
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=15, help="timed frames a case")
    parser.add_argument("--short-side", type=int, default=480, help="short side at the network")
    parser.add_argument("--variants", action="store_true", help="compare architectures instead of objects")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cases = build_cases(arguments)
    for _ in range(arguments.frames):
        for case in cases.values():
            case.step()
    rows = {}
    for name, case in cases.items():
        median = statistics.median(case.seconds)
        rows[name] = {
            "milliseconds": round(median * 1000, 1),
            "gmacs": round(case.gmacs(), 2),
            "parameters": case.parameters,
        }
        print(f"{name:58s} {median * 1000:7.1f} ms  {rows[name]['gmacs']:6.2f} GMACs  {case.parameters / 1e6:.2f} M")
    if arguments.json:
        report = {
            "command": command_of(arguments),
            "frame": FRAME,
            "hardware": describe_hardware(torch.device("cpu"), "float32, bfloat16", arguments.threads, 1),
            "cases": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
