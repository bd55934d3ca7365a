"""The parameters of the kernels: records of run-time values, and records of compile-time constants.

The `ptr` of a record is a tensor on the host, and the address of its first element in a kernel. Kernels use only the fields of a record,
because the compiler does not evaluate properties and methods. Records of run-time values hold no strings, because the compiler does not
support them there.
"""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX


class Features(NamedTuple):
    """A map of features [N, G * C, H, W], with strides in elements."""

    ptr: Tensor
    stride_n: int
    stride_c: int
    stride_h: int
    stride_w: int


class Logits(NamedTuple):
    """Logits [N, G * K * K, UP, UP, HQ, WQ] or their gradient, with strides in elements."""

    ptr: Tensor
    stride_n: int
    stride_c: int
    stride_u: int
    stride_v: int
    stride_h: int
    stride_w: int


class MapSizes(NamedTuple):
    """The sizes of a map of features [N, C, H, W]."""

    c: int
    h: int
    w: int


class Sizes(NamedTuple):
    """The sizes of the tensors."""

    groups: int
    c: int  # channels of one group
    h: int  # rows of the source
    w: int
    ho: int  # rows of the output
    wo: int
    hq: int  # rows of cells
    wq: int


class Window(NamedTuple):
    """The sources that a window covers, and the step from its logits to its weights. A constant."""

    kernel_size: int
    up: int
    down: int
    normalizer: str
    border: str
    normalized: bool  # whether the weights of a window are divided by their sum
    weighed: bool  # whether weights at the resolution of the output are in the place of logits (banded/weighing.py)


class Layout(NamedTuple):
    """The addressing of features in the banded kernels. A constant."""

    x_axis: int  # of locations in a block of source features: 0 where channels are their fastest axis, else 1
    y_axis: int  # the same for target features
    x_align: int  # every run of source features begins and ends at a multiple of this number of elements
    y_align: int  # the same for target features
    # targets are ordered by cells, whose logits are runs that begin at multiples of this number of elements; 0: by rows
    cell_align: int
    index: tl.dtype  # type of offsets within one image


def offset_type(*tensors: Tensor) -> tl.dtype:
    """Return the type of offsets within one image of any of the tensors."""
    # the offset of the last element of an image
    last = (sum((size - 1) * step for size, step in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    return tl.int64 if max(last) > INT32_MAX else tl.int32
