"""The Triton kernels on CPU tensors, in Triton's interpreter; test_triton.py runs this file in its own process (TRITON_INTERPRET=1)."""

import pytest
import torch
from carafepp.kernels import reassemble, reassemble_reference, reassemble_weights
from carafepp.kernels.geometry import NORMALIZERS, Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import SIZES, TOLERANCES, check, poisoned, random_inputs, relative_error

DTYPES = tuple(TOLERANCES)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"k{s[4].kernel_size}u{s[4].up}d{s[4].down}g{s[4].groups}-{s[1]}x{s[2]}x{s[3]}")
def test_matches_the_definition(size):
    *shape, spec = size
    index = SIZES.index(size)
    memory_format = (torch.contiguous_format, torch.channels_last)[index % 2]
    check(*random_inputs(*shape, spec, DTYPES[index % 3], "cpu", memory_format), spec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("scale", [{"up": 2}, {"down": 2}])
def test_every_normalizer_dtype_and_format(normalizer, dtype, memory_format, scale):
    spec = Spec(3, **scale, normalizer=normalizer)
    check(*random_inputs(1, 4, 4, 5, spec, dtype, "cpu", memory_format), spec)


@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    kernel_size=st.sampled_from([1, 3, 5]),
    up=st.integers(1, 3),
    down=st.integers(1, 3),
    groups=st.integers(1, 2),
    channels=st.integers(1, 3),
)
@settings(deadline=None, derandomize=True, max_examples=5, database=None)
def test_any_shape_and_scale(h, w, kernel_size, up, down, groups, channels):
    spec = Spec(kernel_size, up, down, groups)
    check(*random_inputs(1, groups * channels, h, w, spec, torch.float32, "cpu"), spec)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_one_gradient_alone(needs):
    spec = Spec(3, up=2)
    check(*random_inputs(1, 4, 5, 4, spec, torch.float32, "cpu"), spec, needs)


def test_views_are_read_in_place():
    spec = Spec(3, up=2)
    x, logits = random_inputs(2, 8, 12, 5, spec, torch.float32, "cpu")
    # every other channel and row of x, logits transposed
    check(x[:, ::2, ::2], logits[:, :, :6].transpose(2, 3).contiguous().transpose(2, 3), spec)


def test_an_expanded_gradient_is_read_in_place():
    spec = Spec(3, up=2)
    x, logits = (t.requires_grad_() for t in random_inputs(1, 4, 3, 5, spec, torch.float32, "cpu"))
    expected = torch.autograd.grad(reassemble_reference(x, logits, kernel_size=3, up=2).sum(), (x, logits))
    result = torch.autograd.grad(reassemble(x, logits, kernel_size=3, up=2, backend="triton").sum(), (x, logits))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_weights_at_output_resolution():
    x = torch.randn(1, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(1, 2 * 9, 6, 10, generator=torch.Generator().manual_seed(1))
    options = {"kernel_size": 3, "up": 2, "groups": 2}
    result = reassemble_weights(x, weights, backend="triton", **options)
    torch.testing.assert_close(result, reassemble_weights(x.double(), weights.double(), backend="reference", **options).float())


def test_infinite_logits_close_taps_as_in_softmax():
    spec = Spec(3, up=2)
    x, logits = random_inputs(1, 4, 3, 3, spec, torch.float32, "cpu")
    logits[:, 4 * 4 :] = -torch.inf
    expected = reassemble_reference(x, logits, kernel_size=3, up=2)
    torch.testing.assert_close(reassemble(x, logits, kernel_size=3, up=2, backend="triton"), expected)


def test_forward_saves_inputs_and_one_number_per_window():
    saved = []
    x, logits = (t.requires_grad_() for t in random_inputs(1, 8, 4, 4, Spec(3, up=2), torch.float32, "cpu"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        reassemble(x, logits, kernel_size=3, up=2, backend="triton")
    windows = 8 * 8
    assert sorted(t.numel() for t in saved) == sorted([x.numel(), logits.numel(), windows])
    assert {t.untyped_storage().data_ptr() for t in saved} >= {x.data_ptr(), logits.data_ptr()}


def test_poison_shows():
    """The check itself: a result with one unwritten place does not pass."""
    result = torch.ones(4)
    result[0] = poisoned(result)[0]
    assert not relative_error(result, torch.ones(4, dtype=torch.float64)) < 1.0
