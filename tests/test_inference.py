"""Loading for inference: presets, precisions and what a command makes of them."""

import argparse

import pytest
import torch

from hf_deformvos import inference
from hf_deformvos.cli.speed import add_speed_arguments, resolve_speed
from hf_deformvos.inference import (
    PRESETS,
    fastest_dtype,
    hash_weights,
    keep_freed_memory,
    load_checkpoint,
    load_for_inference,
)
from hf_deformvos.propagation_deformvos import channels_last


def settle(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_speed_arguments(parser)
    arguments = parser.parse_args([*options, "--device", "cpu"])
    resolve_speed(arguments, "model")
    return arguments


def test_presets_are_defaults_that_options_overrule():
    native = fastest_dtype("cpu")
    assert native in ("float32", "bfloat16")
    assert (settle().dtype, settle().short_side) == ("float32", None)
    assert (settle("--preset", "standard").dtype, settle("--preset", "standard").short_side) == (native, None)
    fast = settle("--preset", "fast")
    assert (fast.dtype, fast.short_side) == (native, PRESETS["fast"].short_side)
    chosen = settle("--preset", "fast", "--dtype", "float32", "--short-side", "400")
    assert (chosen.dtype, chosen.short_side) == ("float32", 400)


@pytest.mark.parametrize(
    ("known", "seconds", "expected"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, None, "bfloat16"),
        ({"architecture": "x86_64", "amx_bf16": True}, None, "bfloat16"),
        ({"architecture": "x86_64", "avx512_bf16": False, "avx512_f": True}, None, "float32"),
        ({"architecture": "arm64", "bf16": True}, {"float32": 1.0, "bfloat16": 0.5}, "bfloat16"),
        ({"architecture": "arm64", "bf16": True}, {"float32": 1.0, "bfloat16": 0.9}, "float32"),
        (None, {"float32": 1.0, "bfloat16": 20.0}, "float32"),
    ],
)
def test_the_processor_says_which_precision_is_fast_or_else_a_measurement(monkeypatch, known, seconds, expected):
    if known is None:  # an older PyTorch
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)

    def measure(dtype):
        assert seconds is not None, "x86 processors are asked, not timed"
        return seconds[str(dtype).removeprefix("torch.")]

    monkeypatch.setattr(inference, "_convolution_seconds", measure)
    assert fastest_dtype.__wrapped__("cpu") == expected


@pytest.mark.parametrize("device", ["abacus", "meta", "hpu"])
def test_a_device_that_does_not_compute_is_named(device):
    with pytest.raises(ValueError, match="`device` must be one that PyTorch can use here"):
        parser = argparse.ArgumentParser()
        add_speed_arguments(parser)
        resolve_speed(parser.parse_args(["--device", device]), "model")


def test_keeping_memory_changes_no_result(tiny_model, tiny_processor, tiny_clip, tmp_path, monkeypatch):
    frames, ids = tiny_clip
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)

    def follow(model, processor):
        session = processor.init_video_session(video=frames)
        processor.add_inputs_to_inference_session(session, 0, input_masks=ids[0])
        return torch.stack([output.pred_masks for output in model.propagate_in_video_iterator(session)])

    expected = follow(tiny_model, tiny_processor)
    keep_freed_memory()()
    torch.testing.assert_close(follow(*load_for_inference(tmp_path.as_posix())), expected, atol=1e-3, rtol=1e-3)

    given_back = []
    monkeypatch.setattr(inference, "keep_freed_memory", lambda: lambda: given_back.append(True))
    monkeypatch.setattr(inference, "_FRAMES_BETWEEN_TRIMS", 2)
    model, processor = load_for_inference(tmp_path.as_posix(), device="cpu")
    for _ in range(2):
        follow(model, processor)
    assert len(given_back) == 2 * len(frames) // 2


def test_the_precision_is_no_override(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`dtype` cannot be overridden, got 'bfloat16': --dtype sets the precision"):
        load_checkpoint(tmp_path.as_posix(), overrides={"dtype": "bfloat16"})


@pytest.mark.parametrize("load", [load_checkpoint, hash_weights])
def test_a_folder_that_hides_a_repository_is_named(load, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"local folder 'owner' holds no 'model', .* rename .*owner\.$"):
        load("owner/model")
    for path in ("owner/model/other", "./owner/model"):
        with pytest.raises(ValueError, match="which is neither"):
            load(path)


@pytest.mark.parametrize("shape", [(1, 6, 4, 5), (2, 6, 4, 5), (1, 1, 1, 1)])
def test_channels_last_is_the_same_map_with_strides_that_say_so(shape):
    # A batch of one whose first stride means nothing, as products of matrices leave it.
    hidden = torch.randn(shape[0], shape[2] * shape[3], shape[1]).transpose(1, 2).unflatten(2, shape[2:])
    hidden = hidden.as_strided(shape, (1, *hidden.stride()[1:])) if shape[0] == 1 else hidden
    brought = channels_last(hidden)
    torch.testing.assert_close(brought, hidden)
    assert brought.stride() == (shape[1] * shape[2] * shape[3], 1, shape[1] * shape[3], shape[1])


@pytest.mark.parametrize(("kind", "waits", "name"), [("cpu", 0, "CPU"), ("cuda", 1, "A GPU"), ("mps", 1, "Apple GPU")])
def test_a_device_is_waited_for_and_named(monkeypatch, kind, waits, name):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    inference.synchronize(kind)
    assert len(waited) == waits
    assert inference.describe_device(torch.device(kind)) == name
