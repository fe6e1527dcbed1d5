"""`deformvos evaluate`: runs a model over a benchmark and reports accuracy, speed and memory."""

import argparse
import json
import sys
from pathlib import Path

from .common import Table, add_dataset_arguments, at_least, chosen_sequences, load_dataset, thread_count
from .speed import adaptation_config, add_adaptation_arguments, add_speed_arguments, resolve_speed


_DESCRIPTION = """\
Run a model over a benchmark, one frame at a time, and report region similarity J and boundary accuracy F (mean, recall
above 0.5, decay) by the protocol of the benchmark, with frames a second, network time and peak memory beside them. FPS
counts decoding, resizing, network, masks at full size and their files, one after the other; scoring is not counted.
The benchmark is a folder (--root, --dataset, --split), or a Hugging Face data set with a row a frame, as `deformvos
push-dataset` writes it (--dataset-name, --dataset-split), which is read row by row."""


def add_parser(subparsers) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "evaluate",
        help="run a model over a benchmark and score it",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="DIR_OR_REPO", required=True, help="folder or Hub repository")
    add_dataset_arguments(parser, required=False)
    # With underscores too, as training has them.
    parser.add_argument(
        "--dataset-name",
        "--dataset_name",
        metavar="NAME_OR_PATH",
        help="instead of --root: a Hub data set, a folder or a parquet file of one; --dataset may choose another "
        "protocol than the set's masks suggest",
    )
    parser.add_argument("--dataset-split", "--dataset_split", metavar="SPLIT", help="split of it (default val)")
    parser.add_argument(
        "--dataset-streaming",
        "--dataset_streaming",
        action="store_true",
        help="read it from the Hub as a stream instead of downloading it first",
    )
    parser.add_argument(
        "--all-frames",
        action="store_true",
        help="YouTube-VOS: stream the frames between the sampled ones too, from valid_all_frames",
    )
    add_speed_arguments(parser)
    parser.add_argument("--threads", type=thread_count, metavar="N", help="CPU threads of all workers together")
    parser.add_argument(
        "--workers",
        type=at_least(1),
        default=1,
        metavar="N",
        help="processes, each taking whole sequences (default 1)",
    )
    parser.add_argument(
        "--memory-interval", type=at_least(1), metavar="N", help="every N frames one enters the long-term memory"
    )
    parser.add_argument(
        "--override",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="another value for a field of the model's configuration, as use_offsets=false; may be repeated",
    )
    add_adaptation_arguments(parser, "each sequence's first masks")
    parser.add_argument(
        "--save-masks",
        metavar="DIR",
        help="write DIR/SEQUENCE/00000.png, ... (palette PNG); for YouTube-VOS also DIR/submission.zip",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take up sequences whose masks in --save-masks are all there, unless changed",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write every number, the settings, versions and the weights' sha256"
    )
    parser.set_defaults(run=run)


def parse_override(text: str) -> tuple[str, object]:
    """`FIELD=VALUE` to the field and the value that JSON reads there, or the text where it is none."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--override takes FIELD=VALUE, got {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from ..evaluation.runner import RunnerConfig, write_json
    from ..writable import check_file

    if arguments.json:
        check_file(arguments.json)
    resolve_speed(arguments, arguments.model)
    config = RunnerConfig(
        model=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        num_threads=arguments.threads,
        short_side=arguments.short_side,
        memory_interval=arguments.memory_interval,
        overrides=dict(parse_override(text) for text in arguments.override),
        adaptation=adaptation_config(arguments),
        save_masks=arguments.save_masks,
        resume=arguments.resume,
    )
    if arguments.dataset_name is not None:
        result = _evaluate_hub_dataset(arguments, config)
    else:
        result = _evaluate_folder(arguments, config)
    if arguments.json:
        from ..evaluation.report import run_as_dict

        write_json(arguments.json, run_as_dict(result, ["deformvos", *sys.argv[1:]]))
        print(f"wrote {arguments.json}")
    dataset = result.dataset
    if config.save_masks and dataset.name.startswith("youtubevos"):
        from ..evaluation.youtube_vos import write_submission

        submission = Path(config.save_masks, "submission.zip")
        count = write_submission(config.save_masks, dataset, submission)
        print(f"{submission}: {count} masks of {len(dataset.sequences)} videos for the evaluation server")
    return 0


def _evaluate_folder(arguments: argparse.Namespace, config):
    """Evaluates on a folder, and prints each sequence as soon as it is done."""
    from ..evaluation import report
    from ..evaluation.runner import evaluate

    missing = [flag for flag in ("root", "dataset") if getattr(arguments, flag) is None]
    if missing:
        raise ValueError(
            f"--{missing[0]} is missing: a benchmark is --root DIR --dataset LAYOUT, or --dataset-name NAME_OR_PATH."
        )
    if arguments.dataset_split is not None:
        raise ValueError(
            f"--dataset-split belongs to --dataset-name, got {arguments.dataset_split!r} with --root; give a folder's "
            "part as --split."
        )
    if arguments.dataset_streaming:
        raise ValueError("--dataset-streaming belongs to --dataset-name: the folder of --root is read as it is.")
    dataset = load_dataset(arguments, all_frames=arguments.all_frames)
    sequences = {sequence.name: sequence for sequence in dataset.sequences}
    table = Table(report.table_header(), is_all=not (arguments.json or arguments.save_masks))

    def add_row(result) -> None:
        sequence = sequences[result.score.name]
        table.add(report.result_row(result, len(sequence.images), len(sequence.objects)))

    result = evaluate(dataset, config, arguments.workers, add_row)
    _print_totals(result)
    return result


def _evaluate_hub_dataset(arguments: argparse.Namespace, config):
    """Evaluates on a data set with a row a frame, and prints each sequence as soon as it is done."""
    from ..evaluation import report
    from ..evaluation.streamed import evaluate_hub_dataset

    for flag, given in (
        ("--root", arguments.root is not None),
        ("--all-frames", arguments.all_frames),
        ("--resume", arguments.resume),
        ("--workers", arguments.workers > 1),
    ):
        if given:
            raise ValueError(
                f"{flag} belongs to folders, and --dataset-name {arguments.dataset_name} is read in one go."
            )
    if arguments.split is not None:
        raise ValueError(
            f"--split belongs to folders, got {arguments.split!r} with --dataset-name; give a data set's part as "
            "--dataset-split."
        )
    table = Table(report.table_header(), is_all=not (arguments.json or arguments.save_masks))

    def add_row(result, sequence) -> None:
        table.add(report.result_row(result, len(sequence.images), len(sequence.objects)))

    result = evaluate_hub_dataset(
        arguments.dataset_name,
        config,
        protocol=arguments.dataset,
        split="val" if arguments.dataset_split is None else arguments.dataset_split,
        streaming=arguments.dataset_streaming,
        sequences=chosen_sequences(arguments),
        max_frames=arguments.max_frames,
        progress=add_row,
    )
    _print_totals(result)
    if arguments.dataset is None:
        print(f"scored as {result.dataset.name}; --dataset chooses another protocol")
    return result


def _print_totals(result) -> None:
    """What follows the rows of the sequences."""
    from ..evaluation import report

    dataset, scores = result.dataset, [item.score for item in result.results]
    print(report.total_row(dataset, scores, [item.timing for item in result.results if item.timing]))
    classes = report.class_lines(dataset, scores)
    if classes:
        print(classes)
    if not dataset.has_ground_truth:
        print("no scores: there are first masks alone, or no frames but the first and the last, which are not scored")
    print("\n".join(_facts(result)))


def _facts(result) -> list[str]:
    """What the numbers above belong to."""
    from ..evaluation.report import summarize_speed

    hardware, facts = result.hardware, result.facts
    speed = summarize_speed(item.timing for item in result.results if item.timing)
    lines = [
        f"{hardware['device_name']}, {hardware['processes']} process(es) of {hardware['threads_per_process']} "
        f"thread(s), {hardware['dtype']}, torch {result.versions['torch']}"
    ]
    if facts is not None:
        line = f"{facts.num_parameters / 1e6:.2f} M parameters"
        if facts.macs is not None:
            height, width = facts.macs_network_size
            line += (
                f", {facts.macs / 1e9:.2f} GMACs a frame at {height}x{width} with {facts.macs_num_objects} object(s)"
            )
        lines.append(line)
    if speed["peak_memory_bytes"] is not None:
        line = f"peak memory {speed['peak_memory_bytes'] / 2**20:.0f} MiB a process"
        if speed["peak_device_memory_bytes"] is not None:
            line += f", {speed['peak_device_memory_bytes'] / 2**20:.0f} MiB on the device"
        lines.append(line)
    if result.weights_sha256:
        lines.append(f"weights sha256 {result.weights_sha256}")
    return lines


__all__ = ["add_parser", "run"]
