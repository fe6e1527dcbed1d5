"""Options of the commands that run a model: where, in which precision, at which size, adapted or not."""

import argparse

from .common import at_least


# The names are repeated here: every command builds this parser, and few need the modules that define them.
PRESET_NAMES = ("accurate", "standard", "fast")
DTYPES = ("float32", "bfloat16", "float16")
# Of --adapt-check, which goes through them several times: about five seconds, and any sequence of DAVIS-2016 val.
CHECK_FRAMES = 128


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`, `--preset`, `--dtype` and `--short-side`; [`resolve_speed`] settles them."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the fastest present)")
    parser.add_argument(
        "--preset",
        choices=PRESET_NAMES,
        default="accurate",
        help="accurate: float32 (default); standard: the precision in which the device is fastest; fast: smaller "
        "frames too",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the network (default: the preset's)")
    parser.add_argument(
        "--short-side",
        metavar="N",
        type=at_least(16),
        help="short side at the network, in pixels (default: the preset's, else the model's); how far small videos "
        "are enlarged for it is the model's to say",
    )


def add_adaptation_arguments(parser: argparse.ArgumentParser, masks: str) -> None:
    """Adds `--adapt` and its options; [`adaptation_config`] reads them. `masks` says what is adapted to."""
    parser.add_argument(
        "--adapt",
        action="store_true",
        help=f"first train a copy of the model on {masks}: mostly better masks, later (some 40 seconds on two CPU "
        "cores); following is as fast as without",
    )
    parser.add_argument(
        "--adapt-steps", metavar="N", type=at_least(1), help="training steps of --adapt (which it implies)"
    )
    parser.add_argument(
        "--adapt-seed",
        metavar="N",
        type=at_least(0),
        help="seed of the clips that --adapt (which it implies) draws; scores vary with it",
    )
    parser.add_argument(
        "--adapt-draws",
        metavar="N",
        type=at_least(1),
        help="adapt so many times (--adapt, which it implies), each time to other clips, and take the mean: less is "
        "left to chance, for N times the time",
    )
    parser.add_argument(
        "--adapt-check",
        action="store_true",
        help=f"of what --adapt (which it implies) has learned, keep as much as does the video good: its first "
        f"{CHECK_FRAMES} frames are followed there and back, with all of it, three quarters and nothing",
    )


def adaptation_config(arguments: argparse.Namespace):
    """The [`~hf_deformvos.adaptation.AdaptationConfig`] asked for; `None` where none is."""
    named = {"steps": arguments.adapt_steps, "seed": arguments.adapt_seed, "draws": arguments.adapt_draws}
    named = {name: value for name, value in named.items() if value is not None}
    if arguments.adapt_check:
        named["check_frames"] = CHECK_FRAMES
    if not (arguments.adapt or named):
        return None
    from ..adaptation import AdaptationConfig

    return AdaptationConfig(**named)


def resolve_speed(arguments: argparse.Namespace, model: str) -> None:
    """
    Sets `dtype` and `short_side` to the preset's where the user named none.

    Raises:
        ValueError: if there is no such device, or `model` is an exported one and does not take that precision.
    """
    from ..inference import PRESETS, is_exported, resolve_device

    named, preset = arguments.dtype, PRESETS[arguments.preset]
    arguments.dtype = named or preset.resolve_dtype(resolve_device(arguments.device))
    arguments.short_side = arguments.short_side or preset.short_side
    if arguments.dtype != "float32" and is_exported(model):
        asked = f"--dtype {named}" if named else f"--preset {arguments.preset}, which is {arguments.dtype} here"
        raise ValueError(f"The exported model {model} takes float32, got {asked}; pass --dtype float32.")


__all__ = [
    "CHECK_FRAMES",
    "DTYPES",
    "PRESET_NAMES",
    "adaptation_config",
    "add_adaptation_arguments",
    "add_speed_arguments",
    "resolve_speed",
]
