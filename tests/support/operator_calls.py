"""Calls of the operator, drawn by Hypothesis: sizes, options, dtypes, memory layouts and numbers of threads."""

from typing import NamedTuple

import torch
from carafepp.kernels.geometry import BORDERS, LSE_NORMALIZERS, NORMALIZERS, Spec
from hypothesis import strategies as st
from operator_cases import LAYOUTS, TOLERANCES, assert_matches_definition, random_inputs

SCALES = [(1, 1), (2, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (3, 2), (2, 3), (5, 2)]
SMALL = st.tuples(st.integers(1, 13), st.integers(1, 19))
MANY_TILES = st.tuples(st.integers(1, 3), st.integers(20, 310))


class DrawnCall(NamedTuple):
    """One call with its options and random inputs."""

    size: tuple[int, int, int, int]  # n, c, h, w
    spec: Spec
    dtype: torch.dtype
    layouts: tuple[str, str, str]  # of x, logits, dy
    threads: int
    seed: int


@st.composite
def drawn_calls(draw: st.DrawFn, sizes=SMALL, channels=(1, 2, 3, 5, 16, 17, 33)) -> DrawnCall:
    """Draw a call on a map of `sizes` with one of `channels` channels in every group."""
    up, down = draw(st.sampled_from(SCALES))
    groups = draw(st.integers(1, 3))
    kernel_size = draw(st.sampled_from([1, 3, 5, 7]))
    total = groups * draw(st.sampled_from(channels))
    border, normalizer, (height, width) = draw(st.sampled_from(BORDERS)), draw(st.sampled_from(NORMALIZERS)), draw(sizes)
    if border == "renormalize" and normalizer not in LSE_NORMALIZERS:
        normalizer = LSE_NORMALIZERS[0]
    if border == "shift":
        height, width = max(height, kernel_size), max(width, kernel_size)
    return DrawnCall(
        (draw(st.integers(1, 2)), total, height, width),
        Spec(kernel_size, up, down, groups, normalizer, border),
        draw(st.sampled_from(list(TOLERANCES))),
        draw(st.tuples(*(st.sampled_from(LAYOUTS) for _ in range(3)))),
        draw(st.sampled_from([1, 2, 3, 7])),
        draw(st.integers(0, 2**16)),
    )


def assert_call_matches_definition(backend: str, call: DrawnCall) -> None:
    """Compare the results of a drawn call with the definition in float64."""
    torch.set_num_threads(call.threads)
    inputs = random_inputs(*call.size, call.spec, call.dtype, call.layouts, seed=call.seed, spread=2.0)
    tolerance = TOLERANCES[call.dtype]
    if call.layouts[1:] == ("expanded", "expanded") and call.dtype.itemsize >= 4:
        # equal terms have equal rounding errors, which add up instead of averaging out
        tolerance *= 3
    assert_matches_definition(backend, *inputs, call.spec, tolerance=tolerance)
