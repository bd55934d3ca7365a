"""The compiled kernels of the operator, executed without a GPU: right results, within a budget of instructions and bytes, at any offset."""

import numpy as np
import pytest
import torch
from carafepp.kernels.geometry import NORMALIZERS, Spec

pytest.importorskip("triton")

from ptx_step import training_step

NCHW, NHWC = torch.contiguous_format, torch.channels_last
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
# largest error over the largest value: a rounding of a weight, of a product, of the result
TOLERANCES = {FLOAT: 1e-5, HALF: 2e-3, BF16: 1.6e-2}


@pytest.mark.parametrize(
    ("size", "spec", "dtype", "memory_format"),
    [
        ((1, 40, 6, 11), Spec(5, up=2), HALF, NCHW),
        ((1, 40, 6, 11), Spec(5, up=2), FLOAT, NHWC),
        ((2, 12, 5, 7), Spec(3, up=2, groups=4), BF16, NHWC),
        ((1, 6, 3, 2), Spec(7, up=2), FLOAT, NCHW),
        ((1, 16, 1, 1), Spec(3, up=4), HALF, NHWC),
        ((1, 20, 7, 11), Spec(5, down=2), HALF, NCHW),
        ((2, 16, 9, 8), Spec(3, down=2, groups=2), FLOAT, NHWC),
        ((1, 4, 7, 5), Spec(5, up=3, down=2), HALF, NCHW),
        ((1, 5, 5, 3), Spec(3), BF16, NCHW),
    ],
)
def test_results_match_float64(size, spec, dtype, memory_format):
    errors = training_step(*size, spec, dtype, memory_format).errors
    assert len(errors) == 3
    assert all(value < TOLERANCES[dtype] for value in errors.values()), errors


@pytest.mark.parametrize("normalizer", set(NORMALIZERS) - {"softmax"})
def test_every_normalizer(normalizer):
    errors = training_step(1, 16, 4, 9, Spec(3, up=2, normalizer=normalizer)).errors
    assert all(value < TOLERANCES[HALF] for value in errors.values()), errors


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["x", "logits", "y", "dy", "dx", "dlogits"])
def test_offsets_beyond_32_bits(name, axis):
    def place(tensor, size):
        if tensor == name:
            strides = list(torch.empty(size).stride())
            # every stride fits into 32 bits, the offset of the last index does not; what is not used takes no memory
            strides[axis] = (2**31 // (size[axis] - 1) // 16 + 1) * 16
            extent = 1 + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
            return torch.from_numpy(np.zeros(extent, np.float16)).as_strided(size, strides)

    errors = training_step(3, 4, 3, 5, Spec(3, up=2), place=place).errors
    assert all(value < TOLERANCES[HALF] for value in errors.values()), errors
