"""PSANet's attention, position by position."""

import itertools

import pytest
import torch
from carafepp.models.psanet import PointwiseAttention, align_masks
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3, 5, 9]))
def test_masks_of_relative_positions_are_laid_out(h, w, side):
    masks = torch.randn(2, side * side, h, w)
    scores = align_masks(masks)
    reach = side // 2
    for (yj, xj), (yi, xi) in itertools.product(itertools.product(range(h), range(w)), repeat=2):
        dy, dx = yj - yi, xj - xi
        expected = torch.full([2], float("-inf"))
        if abs(dy) <= reach and abs(dx) <= reach:
            expected = masks[:, (dy + reach) * side + dx + reach, yi, xi]
        assert torch.equal(scores[:, yj * w + xj, yi * w + xi], expected)


@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize("mask_size", [3, 7])
def test_attention_collects_and_distributes(mask_size, shrink):
    """Section 3 of the PSANet paper, position by position: i collects x_j by the mask of i, and is given x_j by the mask of j."""
    torch.manual_seed(0)
    h, w, reach = 3, 4, mask_size // 2
    layer = PointwiseAttention(6, 5, mask_size=mask_size, shrink=shrink).double().eval()
    x = torch.randn(1, 6, (h - 1) * shrink + 1, (w - 1) * shrink + 1, dtype=torch.float64)
    # at these sizes every second pixel is left
    values = [reduce(x)[..., ::shrink, ::shrink] for reduce in (layer.reduce, layer.reduce_p)]
    masks = layer.attention(values[0]), layer.attention_p(values[1])

    def mask(of, at, to):
        """Score that the mask of position `at` has for position `to`."""
        dy, dx = to[0] - at[0], to[1] - at[1]
        if max(abs(dy), abs(dx)) > reach:
            return torch.tensor(float("-inf"), dtype=torch.float64)
        return of[0, (dy + reach) * mask_size + dx + reach, at[0], at[1]]

    positions = list(itertools.product(range(h), range(w)))
    collected, given = (torch.zeros(1, 5, h, w, dtype=torch.float64) for _ in range(2))
    for i in positions:
        wanted = torch.stack([mask(masks[0], i, j) for j in positions]).softmax(0)
        offered = torch.stack([mask(masks[1], j, i) for j in positions]).softmax(0)
        for a, b, j in zip(wanted, offered, positions, strict=True):
            collected[0, :, *i] += a * values[0][0, :, *j]
            given[0, :, *i] += b * values[1][0, :, *j]
    # the map is projected first and then enlarged, so that an omitted position is the mean of its neighbours
    expected = torch.zeros_like(x)
    expected[..., ::shrink, ::shrink] = layer.proj(torch.cat([collected, given], 1))
    if shrink == 2:
        expected[..., 1::2, ::2] = (expected[..., :-2:2, ::2] + expected[..., 2::2, ::2]) / 2
        expected[..., 1::2] = (expected[..., :-2:2] + expected[..., 2::2]) / 2
    torch.testing.assert_close(layer(x), torch.cat([x, expected], 1))


def test_mask_of_even_size_is_refused():
    with pytest.raises(ValueError, match=r"mask_size must be odd.*got 8"):
        PointwiseAttention(4, 4, mask_size=8, shrink=2)
