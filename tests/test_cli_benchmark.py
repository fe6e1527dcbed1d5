"""`deformvos benchmark`: what is asked for, before anything is measured."""

import argparse

import pytest

from hf_deformvos.cli import build_parser, main
from hf_deformvos.cli.benchmark import engine_config


def test_sizes_are_even(capsys):
    """H.264 pads odd sides: frames would be larger than the report says."""
    for size in ("481x855", "480x854,720x1281", "97x160"):
        with pytest.raises(SystemExit) as exit_info:
            main(["benchmark", "--sizes", size])
        assert exit_info.value.code == 2
        assert f"must have even sides, such as 480x854, since H.264 pads odd ones, got '{size.split(',')[-1]}'" in (
            capsys.readouterr().err
        )
    assert build_parser().parse_args(["benchmark", "--sizes", "96x160,64x96"]).sizes == [(96, 160), (64, 96)]


def test_a_preset_settles_precision_and_size():
    def config_of(*words) -> argparse.Namespace:
        return engine_config(build_parser().parse_args(["benchmark", "--model", "m", "--device", "cpu", *words]))

    assert (config_of().dtype, config_of().short_side) == ("float32", None)
    assert config_of("--preset", "fast").short_side == 320
    assert config_of("--preset", "fast", "--short-side", "400", "--dtype", "float32").dtype == "float32"
