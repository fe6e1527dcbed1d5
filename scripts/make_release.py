"""
Turn the output of a training run into a published model's folder: weights in half precision, configurations, card.

    python scripts/make_release.py RUN hub_cards/deformvos-student [--short-side 480] [--memory-interval 8]

RUN is what train_distill.py wrote (`--output_dir`): the averaged weights and all_results.json. The card is rendered
from the latter and from scripts/card_student.md; its scores stand between markers that update_numbers.py fills in.
"""

import argparse
import json
import string
from pathlib import Path

from hf_deformvos import DeformVosImageProcessor, DeformVosModel, DeformVosProcessor


ROOT = Path(__file__).resolve().parent.parent
# What of a run's settings tells how the weights came about; the others are paths and bookkeeping.
SETTINGS = (
    "supervision stages video_share max_gap max_objects paste distractor occluder own_masks_start own_masks_end "
    "own_masks_from own_masks_until ce_weight jaccard_weight bootstrap_share learning_rate backbone_lr_scale "
    "offset_lr_scale warm_up poly_power weight_decay max_grad_norm ema_decay mixed_precision seed"
).split()


def release(run: Path, folder: Path, short_side: int, memory_interval: int | None) -> dict:
    """Write the folder's model files and `training.json`; what the latter holds."""
    overrides = {} if memory_interval is None else {"memory_interval": memory_interval}
    model = DeformVosModel.from_pretrained(run, **overrides)
    model.save_release(folder)
    size = {"shortest_edge": short_side, "longest_edge": 1536}
    DeformVosProcessor(DeformVosImageProcessor(size=size)).save_pretrained(folder)
    results = json.loads((run / "all_results.json").read_text())
    facts = {
        "steps": results["steps"],
        "clips": results["clips"],
        "minutes": round(results["minutes"], 1),
        "parameters": results["parameters"],
        "settings": {name: results["config"][name] for name in SETTINGS},
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def render_card(facts: dict, template: str) -> str:
    """The card's text."""
    stages = facts["settings"]["stages"]
    stages = json.loads(stages) if isinstance(stages, str) else stages
    rows, start = [], 0.0
    for stage in stages:
        height, width = stage["size"]
        rows.append(
            f"| {start:.0%} to {stage['until']:.0%} | {width}x{height} | {stage['frames']} | {stage['batch']} | "
            f"{stage.get('video_share', facts['settings']['video_share']):.0%} |"
        )
        start = stage["until"]
    return string.Template(template).substitute(
        steps=f"{facts['steps']:,}",
        clips=f"{facts['clips']:,}",
        minutes=f"{facts['minutes']:.0f}",
        parameters=f"{facts['parameters'] / 1e6:.2f}",
        precision={"bf16": "bfloat16", "fp16": "float16", "no": "float32"}[facts["settings"]["mixed_precision"]],
        learning_rate=f"{facts['settings']['learning_rate']:g}",
        stages="\n".join(rows),
    )


def main():
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of train_distill.py")
    parser.add_argument("folder", type=Path, help="the published model's folder")
    parser.add_argument("--short-side", type=int, default=480, help="the processor's bound of the short side")
    parser.add_argument("--memory-interval", type=int, help="overrides the configuration's")
    parser.add_argument("--card", type=Path, default=ROOT / "scripts" / "card_student.md", help="the card's template")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    facts = release(arguments.run, arguments.folder, arguments.short_side, arguments.memory_interval)
    (arguments.folder / "README.md").write_text(render_card(facts, arguments.card.read_text()))
    print(f"Wrote {arguments.folder}. Measure it next: make numbers DATA=...")


if __name__ == "__main__":
    main()
