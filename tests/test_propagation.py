"""Deformable attention against plain attention, against grid_sample, and on degenerate maps."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_deformvos import DeformVosConfig
from hf_deformvos.memory_deformvos import LayerMemory, MemoryBank, MemoryFrame
from hf_deformvos.propagation_deformvos import (
    GridDeformableAttention,
    QueryDeformableAttention,
    bilinear_corners,
    reference_points,
    sample_at,
)


SIZES = [(7, 9), (6, 5), (1, 8), (5, 1), (1, 1)]


def config(**changes):
    return DeformVosConfig(**{"key_size": 8, "offset_hidden_size": 8, "correlation_radius": 1, **changes})


def zero_offsets(attention):
    """As `post_init` leaves the last offset convolution."""
    torch.nn.init.zeros_(attention.offset_network.offset.weight)
    torch.nn.init.zeros_(attention.offset_network.offset.bias)
    return attention


def random_maps(height, width, dtype=torch.float64):
    return [torch.randn(2, channels, height, width, dtype=dtype) for channels in (8, 8, 12)]


def vanilla(query, keys, values, allowed=None):
    """Softmax attention written out, tokens as rows."""
    scores = query.flatten(2).transpose(1, 2) @ keys / math.sqrt(query.shape[1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2).unflatten(2, query.shape[-2:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_untrained_grid_form_is_vanilla_attention_on_the_grid(size, stride, dtype, tolerance):
    attention = zero_offsets(GridDeformableAttention(config(), stride)).to(dtype)
    query, key, value = random_maps(*size, dtype)
    read, _, _ = attention(query, [key, -key], [value, 2 * value])
    on_grid = [m[..., ::stride, ::stride].flatten(2) for m in (key, -key, value, 2 * value)]
    keys, values = torch.cat(on_grid[:2], 2), torch.cat(on_grid[2:], 2).transpose(1, 2)
    torch.testing.assert_close(read, vanilla(query, keys, values), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_untrained_query_form_is_vanilla_attention_in_the_window(size):
    attention = zero_offsets(QueryDeformableAttention(config(short_term_window=3))).double()
    query, key, value = random_maps(*size)
    read, dense, _ = attention(query, [key], [value])
    points = reference_points(*size, 1, query.device).flatten(0, 1)
    # Points beyond the border fall on it: a token there is counted as often as points fall on it.
    window = points[:, None] + reference_points(3, 3, 1, query.device).flatten(0, 1) - 1
    window = torch.minimum(window.clamp_min(0), torch.tensor([size[0] - 1, size[1] - 1]))
    counts = (window[:, :, None] == points).all(-1).sum(1)
    scores = query.flatten(2).transpose(1, 2) @ key.flatten(2) / math.sqrt(8)
    weights = scores.exp() * counts
    weights = weights / weights.sum(-1, keepdim=True)
    expected = (weights @ value.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, size)
    torch.testing.assert_close(dense, weights, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(read, expected, atol=1e-10, rtol=1e-10)


def test_query_form_equals_sampling_keys_and_values():
    """The dense products give what resampling every query's keys and values gives."""
    attention = QueryDeformableAttention(config(short_term_window=3)).double()
    torch.nn.init.normal_(attention.offset_network.offset.weight)
    query, key, value = random_maps(6, 7)
    read, _, locations = attention(query, [key], [value])
    assert (locations - locations.round()).abs().max() > 0.1, "the offsets must point between tokens"
    points = locations.shape[2]
    keys = sample_at(key, locations.flatten(1, 2)).unflatten(1, (-1, points))
    values = sample_at(value, locations.flatten(1, 2)).unflatten(1, (-1, points))
    queries = query.flatten(2).transpose(1, 2)
    weights = ((queries.unsqueeze(2) * keys).sum(-1) / math.sqrt(8) + attention.point_bias).softmax(-1)
    expected = (weights.unsqueeze(-1) * values).sum(2).transpose(1, 2).unflatten(2, (6, 7))
    torch.testing.assert_close(read, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", ["grid", "query"])
def test_offsets_move_the_samples_within_their_bound_and_get_a_gradient(form):
    settings = config(max_offset=1.5, max_displacement=2.0, short_term_window=3)
    attention = GridDeformableAttention(settings, 2) if form == "grid" else QueryDeformableAttention(settings)
    torch.nn.init.normal_(attention.offset_network.offset.weight, std=100.0)
    query, key, value = (m.float() for m in random_maps(9, 9))
    read, _, locations = attention(query, [key], [value])
    read.square().sum().backward()
    assert attention.offset_network.offset.weight.grad.abs().sum() > 0
    if form == "grid":
        moved = locations - reference_points(9, 9, 2, query.device).flatten(0, 1)
        assert 1.0 < moved.abs().max() <= 1.5
    else:
        moved = locations - QueryDeformableAttention._window(9, 9, 1, query.device)
        assert 1.5 < moved.abs().max() <= 3.5
        assert locations.min() >= 0
        assert locations.max() <= 8
    attention.use_offsets = False
    assert not torch.equal(attention(query, [key], [value])[2], locations)


def test_sample_at_is_grid_sample_at_token_coordinates():
    hidden = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    locations = torch.rand(2, 6, 2, dtype=torch.float64) * torch.tensor([4.0, 3.0])
    expected = []
    for image, points in zip(hidden, locations, strict=True):
        for y, x in points:
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, 4), min(x0 + 1, 3)
            top = image[:, y0, x0] * (1 - (x - x0)) + image[:, y0, x1] * (x - x0)
            bottom = image[:, y1, x0] * (1 - (x - x0)) + image[:, y1, x1] * (x - x0)
            expected.append(top * (1 - (y - y0)) + bottom * (y - y0))
    torch.testing.assert_close(sample_at(hidden, locations), torch.stack(expected).view(2, 6, 3))
    index, weights = bilinear_corners(locations, 5, 4)
    gathered = hidden.flatten(2).gather(2, index.flatten(1).unsqueeze(1).expand(-1, 3, -1)).unflatten(2, (4, 6))
    read = (gathered * weights.unsqueeze(1)).sum(2).transpose(1, 2)
    torch.testing.assert_close(read, torch.stack(expected).view(2, 6, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_at_full_precision_coordinates(dtype):
    # 200 tokens a side: half-precision coordinates could not tell neighbours apart.
    hidden = torch.arange(200.0).view(1, 1, 1, 200).to(dtype)
    locations = torch.tensor([[[0.0, 37.0], [0.0, 131.0]]])
    assert sample_at(hidden, locations).flatten().tolist() == hidden.flatten()[[37, 131]].tolist()
    attention = zero_offsets(GridDeformableAttention(config(), 2, local=True)).to(dtype)
    query, key, value = (m.to(dtype) for m in random_maps(6, 7))
    read, weights, _ = attention(query, [key], [value])
    assert read.dtype == weights.dtype == dtype
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(2, 42), atol=0.02, rtol=0)


def memory_frame(index, is_reference=False):
    layer = LayerMemory(torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 2, 2))
    return MemoryFrame(index, (layer,), torch.zeros(1, 3, 5, 5), is_reference)


def test_memory_bank_keeps_references_and_its_bound():
    bank = MemoryBank(3)
    assert bank.is_empty
    bank.write(memory_frame(0, is_reference=True), to_long_term=True)
    for index in range(1, 40):
        bank.write(memory_frame(index), to_long_term=index % 5 == 0)
    assert [frame.frame_idx for frame in bank.long_term] == [0, 30, 35]
    assert bank.previous.frame_idx == 39
    bytes_before = bank.num_bytes
    bank.write(memory_frame(40, is_reference=True), to_long_term=False)
    assert [frame.frame_idx for frame in bank.long_term] == [0, 35, 40], "a correction enters, a plain frame leaves"
    for index in (41, 42):
        bank.write(memory_frame(index, is_reference=True), to_long_term=False)
    assert [frame.frame_idx for frame in bank.long_term] == [0, 41, 42], "the first reference stays"
    bank.write(memory_frame(45), to_long_term=True)
    assert [frame.frame_idx for frame in bank.long_term] == [0, 41, 42], "references are worth more than plain frames"
    assert bank.num_bytes == bytes_before
    bank.write(memory_frame(42, is_reference=True), to_long_term=True)
    assert [frame.frame_idx for frame in bank.long_term] == [0, 41, 42], "a frame is held once"
    assert bank.num_bytes == bytes_before - memory_frame(0).masks.nbytes - sum(
        tensor.nbytes for tensor in memory_frame(0).layers[0].tensors()
    ), "a frame that is both long-term and previous is counted once"


def test_memory_bank_with_one_slot_holds_the_newest_reference():
    bank = MemoryBank(1)
    bank.write(memory_frame(0, is_reference=True), to_long_term=True)
    bank.write(memory_frame(5), to_long_term=True)
    assert [frame.frame_idx for frame in bank.long_term] == [0]
    bank.write(memory_frame(6, is_reference=True), to_long_term=True)
    assert [frame.frame_idx for frame in bank.long_term] == [6]


def test_grid_sample_needs_one_dtype():
    """The reason for the casts in `sample_at`; when this stops failing they can go."""
    with pytest.raises(RuntimeError, match=r"same dtype|Half|expected"):
        F.grid_sample(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 2), align_corners=True)
