"""Multiply-accumulates of what runs inside a block, the fused convolutions of a folded backbone included."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


class MacCount:
    """What [`count_macs`] counted; `value` is set when its block ends."""

    value: int | None = None


def _fused_convolution(input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return conv_flop_count(input_shape, weight_shape, out_shape, transposed=False)


@contextmanager
def count_macs() -> Iterator[MacCount]:
    """
    Count the multiply-accumulates of convolutions and matrix products. Sampling and element-wise work is not counted.

    Example:

    ```python
    with count_macs() as macs:
        model(inference_session=session, frame=pixel_values)
    print(macs.value)
    ```
    """
    # Builds of PyTorch without oneDNN do not have it.
    fused = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    count = MacCount()
    mapping = {} if fused is None else {fused: _fused_convolution}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        yield count
    # The counter takes a multiply-accumulate for two operations.
    count.value = counter.get_total_flops() // 2


__all__ = ["MacCount", "count_macs"]
