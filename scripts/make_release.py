"""
Turn the output of a training run into a published model's folder: weights in half precision, configurations, card.

    python scripts/make_release.py RUN hub_cards/deformvos-student [--short-side 480] [--memory-interval 8]

RUN is what train_distill.py wrote (`--output_dir`): the averaged weights and all_results.json. The card is rendered
from the latter; its scores are filled in by update_numbers.py, once these weights have been measured.
"""

import argparse
import json
import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from hf_deformvos.publishing.release import release_run, write_card
from hf_deformvos.training import TrainingConfig
from hf_deformvos.training.lineage import lineage


ROOT = Path(__file__).resolve().parent.parent


def release(
    run: Path,
    folder: Path,
    short_side: int,
    memory_interval: int | None,
    data: list[str] | None = None,
    blend: float | None = None,
    average: list[Path] | None = None,
):
    """Write the folder."""
    results = json.loads((run / "all_results.json").read_text())
    # Before the folder is written: a run may have started from what it held. Older runs do not tell.
    known = "initialised_from" in results or "teacher" in results
    origins = {} if known else lineage(TrainingConfig(**results["config"]))
    release_run(run, folder, short_side, memory_interval, data, origins, blend, average or ())
    records = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs" / "numbers").glob("*.json")}
    write_card(folder, records)


def main() -> int:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of train_distill.py")
    parser.add_argument("folder", type=Path, help="the published model's folder")
    parser.add_argument("--short-side", type=int, default=480, help="the processor's bound of the short side")
    parser.add_argument("--memory-interval", type=int, help="overrides the configuration's")
    parser.add_argument("--data", nargs="+", metavar="NAME", help="data sets, if not those of the run's folders")
    parser.add_argument(
        "--blend", type=float, metavar="SHARE", help="share of the run's weights; the rest is of what it started from"
    )
    parser.add_argument(
        "--average",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="further runs from the same start, to take the mean of all",
    )
    arguments = parser.parse_args()
    try:
        release(**vars(arguments))
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"Wrote {arguments.folder}. Measure it next: make numbers DATA=...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
