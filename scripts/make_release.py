"""
Turn the output of a training run into a published model's folder: weights in half precision, configurations, card.

    python scripts/make_release.py RUN hub_cards/deformvos-student [--short-side 480] [--memory-interval 8]

RUN is what train_distill.py wrote (`--output_dir`): the averaged weights and all_results.json. The card is rendered
from the latter and from a template, scripts/card_student.md or card_teacher.md by the folder's name; its scores stand
between markers that update_numbers.py fills in.
"""

import argparse
import json
import string
from pathlib import Path

from hf_deformvos import DeformVosImageProcessor, DeformVosModel, DeformVosProcessor
from hf_deformvos.training import TrainingConfig
from hf_deformvos.training.lineage import lineage, total_clips


ROOT = Path(__file__).resolve().parent.parent
# What of a run's settings tells how the weights came about; the others are paths and bookkeeping.
SETTINGS = (
    "supervision att_weight intra_weight inter_weight kl_weight representation_weight temperature stages "
    "video_share max_gap max_objects paste distractor occluder own_masks_start own_masks_end own_masks_from "
    "own_masks_until ce_weight jaccard_weight bootstrap_share learning_rate backbone_lr_scale offset_lr_scale "
    "warm_up poly_power weight_decay max_grad_norm ema_decay mixed_precision seed"
).split()


def release(run: Path, folder: Path, short_side: int, memory_interval: int | None) -> dict:
    """Write the folder's model files and `training.json`; what the latter holds."""
    overrides = {} if memory_interval is None else {"memory_interval": memory_interval}
    results = json.loads((run / "all_results.json").read_text())
    # Before the folder is written: a run may have started from what it held.
    origins = {name: results[name] for name in ("initialised_from", "teacher") if name in results}
    origins = origins or lineage(TrainingConfig(**results["config"]))
    model = DeformVosModel.from_pretrained(run, **overrides)
    model.save_release(folder)
    size = {"shortest_edge": short_side, "longest_edge": 1536}
    DeformVosProcessor(DeformVosImageProcessor(size=size)).save_pretrained(folder)
    facts = {
        "steps": results["steps"],
        "clips": results["clips"],
        "minutes": round(results["minutes"], 1),
        "parameters": results["parameters"],
        "settings": {name: results["config"][name] for name in SETTINGS if name in results["config"]},
        **origins,
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def stages_of(settings: dict) -> list[dict]:
    """A run's curriculum, which a configuration holds as text or written out."""
    stages = settings["stages"]
    return json.loads(stages) if isinstance(stages, str) else stages


def runs_of(facts: dict) -> list[dict]:
    """The runs that made the weights, first to last."""
    runs = [facts]
    while (earlier := runs[0].get("initialised_from")) and "clips" in earlier:
        runs.insert(0, earlier)
    return runs


def describe_run(number: int, facts: dict) -> str:
    """One row of the card's table: what a run learned from, for how long, and on clips of which sizes."""
    settings = facts["settings"]
    clips = "; ".join(
        "{}x{}, {} frames, {} a step".format(*stage["size"], stage["frames"], stage["batch"])
        for stage in stages_of(settings)
    )
    teacher = facts.get("teacher", {}).get("name")
    source = {"labels": "labels", "pseudo": "the teacher's masks", "both": "labels and the teacher's masks"}
    learned = source[settings["supervision"]] + (f", distilled from {teacher}" if teacher else "")
    return (
        f"| {number} | {learned} | {facts['steps']:,} | {facts['clips']:,} | {facts['minutes']:.0f} | {clips} | "
        f"{settings['learning_rate']:g} |"
    )


def render_card(facts: dict, template: str) -> str:
    """The card's text."""
    runs = runs_of(facts)
    return string.Template(template).substitute(
        runs="\n".join(describe_run(number, run) for number, run in enumerate(runs, start=1)),
        clips=f"{total_clips(facts['clips'], facts.get('initialised_from')):,}",
        minutes=f"{sum(run['minutes'] for run in runs):.0f}",
        parameters=f"{facts['parameters'] / 1e6:.2f}",
        precision={"bf16": "bfloat16", "fp16": "float16", "no": "float32"}[facts["settings"]["mixed_precision"]],
    )


def main():
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of train_distill.py")
    parser.add_argument("folder", type=Path, help="the published model's folder")
    parser.add_argument("--short-side", type=int, default=480, help="the processor's bound of the short side")
    parser.add_argument("--memory-interval", type=int, help="overrides the configuration's")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    facts = release(arguments.run, arguments.folder, arguments.short_side, arguments.memory_interval)
    template = ROOT / "scripts" / f"card_{'teacher' if 'teacher' in arguments.folder.name else 'student'}.md"
    (arguments.folder / "README.md").write_text(render_card(facts, template.read_text()))
    print(f"Wrote {arguments.folder}. Measure it next: make numbers DATA=...")


if __name__ == "__main__":
    main()
