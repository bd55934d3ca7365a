"""The promises of every backend: the results of the definition for any size, dtype and memory layout, and the same bits every time.

The tests that take `backend` run for each one that this machine can run; tests/kernels/gpu/test_triton.py runs them in Triton's
interpreter.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from carafepp.kernels import execution, reassemble, reassemble_reference, reassemble_weights, reassembly, torch_backend
from carafepp.kernels.geometry import NORMALIZERS, Spec
from carafepp.kernels.reference import reassembly_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import AWKWARD, BORDERED, assert_matches_definition, describe, differentiate, random_inputs, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = ("contiguous", "channels_last")


@pytest.mark.parametrize("case", AWKWARD, ids=describe)
def test_matches_the_definition_at_awkward_sizes(case, backend, device):
    index, spec = AWKWARD.index(case), case[-1]
    inputs = random_inputs(*case, DTYPES[index % 3], FORMATS[index % 2], device=device)
    assert_matches_definition(backend, *inputs, spec)


@pytest.mark.parametrize("case", BORDERED, ids=describe)
def test_matches_the_definition_at_every_border(case, backend, device):
    index = BORDERED.index(case)
    if backend == "triton" and device == "cpu":
        # in Triton's interpreter, a program takes milliseconds
        case = (1, 1, 3, 3, case[4]._replace(kernel_size=3, up=min(case[4].up, 4), groups=1))
    spec = case[-1]
    inputs = random_inputs(*case, DTYPES[index % 3], FORMATS[index % 2], device=device)
    assert_matches_definition(backend, *inputs, spec)


@pytest.mark.parametrize(("i", "normalizer"), list(enumerate(NORMALIZERS)), ids=NORMALIZERS)
@pytest.mark.parametrize(("j", "dtype"), list(enumerate(DTYPES)), ids=map(str, DTYPES))
def test_every_normalizer_dtype_and_memory_format(i, normalizer, j, dtype, backend, device):
    """Every two of a normalizer, a dtype, a memory format and a scale meet, as does every dtype, format and scale."""
    layout, scale = FORMATS[(i + j) % 2], ({"up": 2}, {"down": 2})[(i // 2 + j) % 2]
    spec = Spec(3, **scale, normalizer=normalizer)
    assert_matches_definition(backend, *random_inputs(1, 4, 4, 5, spec, dtype, layout, device=device), spec)


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
def test_any_shape_and_scale(backend, device, h, w, kernel_size, up, down, groups, channels):
    spec = Spec(kernel_size, up, down, groups)
    assert_matches_definition(backend, *random_inputs(1, groups * channels, h, w, spec, device=device), spec)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["dx", "dlogits"])
def test_one_gradient_alone(needs, backend, device):
    spec = Spec(3, up=2)
    assert_matches_definition(backend, *random_inputs(1, 4, 5, 4, spec, device=device), spec, needs)


def test_views_are_read_in_place(backend, device):
    spec = Spec(3, up=2)
    x, logits, dy = random_inputs(2, 8, 12, 5, spec, device=device)
    # every other channel and row of x; logits and dy transposed
    x = x[:, ::2, ::2]
    logits, dy = logits[:, :, :6], dy[:, :4, :12]
    assert_matches_definition(backend, x, *(t.transpose(2, 3).contiguous().transpose(2, 3) for t in (logits, dy)), spec)


@pytest.mark.parametrize("shared", [(2, 3), (3,)], ids=["pixels", "columns"])
def test_a_gradient_in_another_memory_format_than_its_logits(shared, backend, device):
    """PyTorch lays out the gradient of logits that pixels share anew, with another fastest axis."""
    spec = Spec(3, up=2)
    x, logits, dy = random_inputs(2, 4, 2, 3, spec, layouts="channels_last", device=device)
    size = logits.shape
    for axis in shared:
        logits = logits.narrow(axis, 0, 1)
    logits = logits.expand(size)
    assert logits.stride(1) == 1 < torch.empty_like(logits).stride(1)
    assert_matches_definition(backend, x, logits, dy, spec)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["x", "logits", "dy"])
@pytest.mark.parametrize("kind", ["negation", "zeros"])
def test_a_tensor_whose_memory_does_not_hold_its_values(kind, place, backend, device):
    """The imaginary part of a conjugate is a note on the memory of the number, and zeros may have no memory at all."""
    spec = Spec(3, up=2)
    inputs = list(random_inputs(1, 2, 2, 3, spec, device=device))
    lazy = inputs[place]
    lazy = torch.complex(lazy, -lazy).conj().imag if kind == "negation" else torch._efficientzerotensor(lazy.shape, device=device)
    assert lazy.is_neg() or lazy._is_zerotensor()
    inputs[place] = lazy
    whole = [torch.zeros_like(t) if t._is_zerotensor() else t.resolve_neg() for t in inputs]
    expected = differentiate(reassemble, *whole, backend=backend, **spec._asdict())
    for compute in (torch.no_grad, torch.enable_grad):
        with compute():
            y = reassemble(*inputs[:2], backend=backend, **spec._asdict())
        torch.testing.assert_close(y, expected["y"], rtol=0, atol=0)
    actual = differentiate(reassemble, *inputs, backend=backend, **spec._asdict())
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_an_expanded_gradient_is_read_in_place(backend, device):
    spec = Spec(3, up=2)
    x, logits, dy = random_inputs(1, 4, 3, 5, spec, device=device)
    assert_matches_definition(backend, x, logits, torch.ones_like(dy[:1, :1, :1, :1]).expand_as(dy), spec)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3)])
def test_weights_at_output_resolution(up, down, backend, device):
    spec = Spec(3, up, down, groups=2)
    x, logits, dy = random_inputs(1, 8, 3, 5, spec, torch.float64, device=device)

    def from_weights(x, logits):
        weights = reassembly_kernels(logits, spec, *x.shape[2:]).flatten(1, 2)
        if backend == "triton":
            x, weights = x.float(), weights.float()
        return reassemble_weights(x, weights, kernel_size=3, up=up, down=down, groups=2, backend=backend)

    expected = differentiate(reassemble_reference, x, logits, dy, **spec._asdict())
    actual = differentiate(from_weights, x, logits, dy.float() if backend == "triton" else dy)
    tolerances = dict(rtol=1e-5, atol=1e-5, check_dtype=False) if backend == "triton" else {}
    for name in ("y", "dx", "dlogits"):
        torch.testing.assert_close(actual[name], expected[name], **tolerances)


@pytest.mark.parametrize(
    ("spec", "size", "layout"),
    [
        (Spec(3, up=2), (5, 7), "contiguous"),
        (Spec(3, up=2), (7, 9), "contiguous"),
        (Spec(3, up=2), (7, 8), "channels_last"),
        (Spec(3, up=2), (6, 9), "channels_last"),
        (Spec(3, up=3, groups=2), (7, 14), "contiguous"),
        (Spec(3, up=3, down=2), (7, 4), "channels_last"),
    ],
    ids=str,
)
def test_another_output_size(spec, size, layout, backend, device):
    # in Triton's interpreter, a program takes milliseconds
    channels = 4 if backend == "triton" else 32
    x, logits, _ = random_inputs(1, channels, 3, 4, spec, layouts=layout, device=device)
    dy = torch.randn(1, channels, *size, device=device)
    assert_matches_definition(backend, x, logits, dy, spec, size=size)


@pytest.mark.parametrize(
    ("scale", "normalizer", "size"),
    [({"up": 2}, "softmax", (5, 7)), ({"down": 2}, "sigmoid", (2, 2)), ({"up": 3, "down": 2}, "sigmoid_normalized", (4, 6))],
    ids=str,
)
def test_logits_at_output_resolution(scale, normalizer, size, backend, device):
    spec = Spec(3, **scale, groups=2, normalizer=normalizer)
    x, logits, dy = random_inputs(1, 4, 3, 4, spec, device=device)
    dy = dy[..., : size[0], : size[1]]

    def at_targets(x, logits):
        shuffled = F.pixel_shuffle(logits, spec.up)[..., : size[0], : size[1]]
        return reassemble_weights(x, shuffled, size=size, backend=backend, **spec._asdict())

    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), size=size, **spec._asdict())
    for name, result in differentiate(at_targets, x, logits, dy).items():
        torch.testing.assert_close(result.double(), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
@pytest.mark.parametrize("layout", FORMATS)
def test_further_channels_of_the_logits_are_not_read(layout, backend, device):
    spec = Spec(3, up=2, groups=2)
    x, logits, dy = random_inputs(1, 4, 3, 4, spec, layouts=layout, device=device)
    expected = differentiate(reassemble, x, logits, dy, backend=backend, **spec._asdict())
    further = torch.full_like(logits[:, :8], torch.nan)
    wide = torch.cat([logits, further], 1)
    options = (dy.shape[2:], *spec, False, backend)
    actual = differentiate(lambda x, wide: torch.ops.carafepp.reassemble(x, wide, *options)[0], x, wide, dy)
    assert torch.equal(actual["y"], expected["y"])
    assert torch.equal(actual["dx"], expected["dx"])
    assert torch.equal(actual["dlogits"], F.pad(expected["dlogits"], (0, 0, 0, 0, 0, 8)))


@pytest.mark.parametrize(("up", "down", "size"), [(2, 1, (10, 12)), (1, 2, (3, 3)), (3, 2, (8, 9))])
def test_output_keeps_shape_dtype_and_memory_format(up, down, size, backend, device):
    spec = Spec(3, up, down)
    x, logits, _ = random_inputs(2, 8, 5, 6, spec, device=device)
    y = reassemble(x, logits, kernel_size=3, up=up, down=down, backend=backend)
    assert y.shape == (2, 8, *size)
    assert y.dtype == torch.float32
    assert y.is_contiguous()
    last = reassemble(x.to(memory_format=torch.channels_last), logits, kernel_size=3, up=up, down=down, backend=backend)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)


def test_gradients_keep_the_memory_format_of_their_inputs(backend, device):
    if backend == "reference":
        pytest.skip("autograd lays them out")
    x, logits, dy = random_inputs(2, 8, 3, 4, Spec(3, up=2), layouts="channels_last", device=device)
    gradients = differentiate(reassemble, x, logits, dy, kernel_size=3, up=2, backend=backend)
    assert gradients["dx"].is_contiguous(memory_format=torch.channels_last)
    assert gradients["dlogits"].is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_has_empty_results(backend, device):
    x, logits, dy = random_inputs(0, 8, 5, 6, Spec(3, up=2), device=device)
    assert reassemble(x, logits, kernel_size=3, up=2, backend=backend).shape == (0, 8, 10, 12)
    results = differentiate(reassemble, x, logits, dy, kernel_size=3, up=2, backend=backend)
    assert (results["dx"].shape, results["dlogits"].shape) == (x.shape, logits.shape)


def test_runs_repeat_bit_for_bit(backend, device):
    spec = Spec(3, up=2, groups=2)
    inputs = random_inputs(1, 4, 3, 5, spec, device=device)
    first, second = (differentiate(reassemble, *inputs, backend=backend, **spec._asdict()) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_infinite_logits_close_taps_as_in_softmax(backend, device):
    x, logits, _ = random_inputs(1, 4, 3, 3, Spec(3, up=2), device=device)
    logits[:, 4 * 4 :] = -torch.inf
    expected = reassemble_reference(x, logits, kernel_size=3, up=2)
    torch.testing.assert_close(reassemble(x, logits, kernel_size=3, up=2, backend=backend), expected)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "sigmoid_normalized"])
def test_extreme_logits(normalizer, backend, device):
    """Scores far beyond the range of exp, and windows masked by minus infinity, give the results of the definition in float64."""
    x, logits = torch.randn(1, 16, 4, 5, device=device), torch.randn(1, 9, 4, 5, device=device)
    logits[:, 2] = 300
    logits[:, 3] = -torch.inf
    logits[..., 0] -= 1e4
    options = dict(kernel_size=3, normalizer=normalizer)
    expected = reassemble_reference(x.double(), logits.double(), **options).float()
    torch.testing.assert_close(reassemble(x, logits, backend=backend, **options), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid_normalized"])
@pytest.mark.parametrize("spec", [Spec(3), Spec(3, up=12), Spec(9, down=2)], ids=["banded", "wide scale", "wide window"])
def test_low_logits_at_the_border(spec, normalizer, backend, device):
    """Windows whose logits are all beyond the range of exp, with taps outside the map."""
    spec = spec._replace(normalizer=normalizer)
    x, logits, dy = random_inputs(1, 4, 2, 1, spec, device=device)
    assert_matches_definition(backend, x, logits - 150, dy, spec, tolerance=1e-4)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"], indirect=True)
def test_a_logit_that_is_no_number_spoils_its_own_target_alone(backend):
    x, logits = torch.randn(1, 16, 4, 5), torch.randn(1, 9, 4, 5)
    logits[0, 0, 1, 1] = torch.nan
    wrong = reassemble(x, logits, kernel_size=3, backend=backend).isnan()
    assert wrong[..., 1, 1].all()
    assert wrong.sum() == wrong[..., 1, 1].sum()


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid_normalized"])
def test_a_logit_without_an_output_spoils_nothing(normalizer, backend, device):
    """A rational scale cuts the last cells: logits of their sub-pixels without an output have no effect on outputs and on dx."""
    spec = Spec(3, up=4, down=5, normalizer=normalizer)
    x, logits, dy = random_inputs(1, 4, 6, 6, spec, device=device)
    expected = differentiate(reassemble, x, logits, dy, backend=backend, **spec._asdict())
    # outputs 0 to 4 of 8: the second cell has one
    logits.unflatten(1, (9, 4, 4))[:, :, 3, 3, 1, 1] = torch.nan
    actual = differentiate(reassemble, x, logits, dy, backend=backend, **spec._asdict())
    for name in ("y", "dx"):
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"], indirect=True)
def test_an_infinite_logit_does_not_vanish_outside_the_map(backend):
    """Its window has no softmax, although the tap itself would read a zero of the padding."""
    x, logits, dy = random_inputs(1, 4, 5, 5, Spec(3))
    logits[0, 0, 0, 0] = torch.inf
    results = differentiate(reassemble, x, logits, dy, kernel_size=3, backend=backend)
    assert results["y"][..., 0, 0].isnan().all()
    assert results["y"].isnan().sum() == 4
    assert results["dlogits"][..., 0, 0].isnan().all()
    assert results["dlogits"].isnan().sum() == 9


@pytest.mark.parametrize("backend", ["reference", "torch"], indirect=True)
def test_large_equal_logits_share_the_weight(backend):
    """The log-sum-exp of logits of 1e9 is rounded to 1e9, which would give every weight the value 1."""
    x, dy = torch.randn(2, 1, 8, 5, 5)
    results = differentiate(reassemble, x, torch.full((1, 9, 5, 5), 1e9), dy, kernel_size=3, backend=backend)
    expected = differentiate(reassemble, x, torch.zeros(1, 9, 5, 5), dy, kernel_size=3, backend=backend)
    torch.testing.assert_close(results, expected)


def test_forward_saves_inputs_and_one_number_per_window(backend, device):
    if backend == "reference":
        pytest.skip("autograd saves what it needs")
    saved = []
    x, logits, _ = random_inputs(1, 8, 4, 4, Spec(3, up=2), device=device)
    x.requires_grad_(), logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        reassemble(x, logits, kernel_size=3, up=2, backend=backend)
    windows = 8 * 8
    assert sorted(t.numel() for t in saved) == sorted([x.numel(), logits.numel(), windows])
    assert {t.untyped_storage().data_ptr() for t in saved} >= {x.data_ptr(), logits.data_ptr()}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_call_without_gradients_gives_the_same_bits(normalizer, backend, device):
    """It keeps no log-sum-exp."""
    spec = Spec(3, up=2, normalizer=normalizer)
    x, logits, _ = random_inputs(2, 8, 3, 5, spec, device=device)
    recorded = reassemble(x.clone().requires_grad_(), logits, backend=backend, **spec._asdict())
    assert torch.equal(reassemble(x, logits, backend=backend, **spec._asdict()), recorded)


def test_a_place_that_is_left_out_has_an_error_that_is_no_number():
    result = torch.ones(4)
    result[:1] = torch.empty(1)
    assert not relative_error(result, torch.ones(4, dtype=torch.float64)) < 1.0


@pytest.mark.parametrize(
    ("direction", "output"), [("forward", 2), ("forward", 3), ("backward", 4), ("backward", 5)], ids=["y", "lse", "dx", "dlogits"]
)
def test_a_backend_that_leaves_a_place_out_is_found_out(direction, output, monkeypatch):
    compute = getattr(torch_backend, direction)

    def compute_all_but_the_last(*arguments):
        if arguments[output] is None:
            return compute(*arguments)
        whole = torch.empty_like(arguments[output])
        compute(*arguments[:output], whole, *arguments[output + 1 :])
        arguments[output].view(-1)[:-1] = whole.view(-1)[:-1]

    spec = Spec(3, up=2)
    inputs = random_inputs(1, 4, 3, 5, spec)
    assert_matches_definition("torch", *inputs, spec)
    monkeypatch.setattr(torch_backend, direction, compute_all_but_the_last)
    with pytest.raises(AssertionError, match="is off by nan"):
        assert_matches_definition("torch", *inputs, spec)


def test_500_sizes_of_images_are_laid_out_once():
    caches = reassembly.check_layouts, execution.find_layouts
    for cache in caches:
        cache.cache_clear()
    for _ in range(2):
        for height, width in itertools.product(range(1, 26), range(1, 21)):
            reassemble(torch.zeros(1, 1, height, width), torch.zeros(1, 1, height, width), kernel_size=1, backend="torch")
    assert [cache.cache_info().misses for cache in caches] == [500, 500]
    assert [cache.cache_info().currsize for cache in caches] == [500, 500]
    assert reassembly.check_layouts.cache_info().hits == 500
