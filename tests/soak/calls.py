"""A random call of the operator, of every kind that a user may make: its sizes, memory, values and gradients, and calls that are wrong."""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from carafepp.kernels import reassemble, reassemble_reference, reassemble_weights
from carafepp.kernels.backends import DTYPES
from carafepp.kernels.geometry import LSE_NORMALIZERS, NORMALIZERS, Spec, memory_format
from carafepp.models.carafe import CARAFE
from operator_cases import TOLERANCES, TRITON_TOLERANCES
from torch import Tensor

from soak.wrong_calls import check_wrong_call

# shares of the cases
WRONG, WEIGHTS, MODULE, SECOND_ORDER, LARGE, SHARED = 0.06, 0.2, 0.03, 0.02, 0.003, 0.08
MOST_ELEMENTS = {"cpu": 10_000, "torch": 10_000, "triton": 500}

X_VALUES = ("normal",) * 6 + ("huge", "tiny", "zero", "mixed", "nan", "inf")
LOGIT_VALUES = ("normal",) * 6 + ("wide", "offset", "huge", "equal", "some -inf", "window -inf", "nan", "inf")


class Case(NamedTuple):
    """A call, and how its inputs are made."""

    function: str
    size: tuple[int, int, int, int]
    spec: Spec
    dtype: torch.dtype
    values: tuple[str, str]
    shared: bool
    needs: tuple[bool, bool]


def prepare(backend: str) -> Any:
    """Return the function that runs the case of a seed on a backend."""
    # PyTorch fills the memory that it allocates with NaN in this mode
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".*deterministic")

    def check(seed: int) -> str:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        torch.set_num_threads(int(rng.choice([1, 1, 1, 1, 2, 3, 7])))
        if rng.random() < WRONG:
            return check_wrong_call(rng, backend)
        case = draw_case(rng, backend)
        try:
            return check_case(case, rng, backend)
        except Exception as error:
            error.add_note(str(case))
            raise

    return check


def draw_case(rng: np.random.Generator, backend: str) -> Case:
    """Draw a call whose tensors are small, except rarely."""
    up, down = (int(rng.choice([1, 1, 2, 2, 3, 4, 5])) for _ in range(2))
    if rng.random() < 0.6:
        up, down = (up, 1) if rng.random() < 0.5 else (1, down)
    if rng.random() < 0.02:
        up, down = (int(rng.choice([8, 12])), 1) if rng.random() < 0.5 else (1, int(rng.choice([8, 16])))
    kernel_size, groups = int(rng.choice([1, 3, 5, 7, 9], p=[0.15, 0.4, 0.3, 0.1, 0.05])), int(rng.choice([1, 1, 1, 2, 3, 4]))
    channels = groups * int(rng.choice([1, 2, 3, 4, 5, 8, 16, 17, 33]))
    n = int(rng.choice([1, 1, 1, 2, 3])) if rng.random() > 0.02 else 0
    h, w = (int(rng.choice([1, 1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 31])) for _ in range(2))
    spec = Spec(kernel_size, up, down, groups, str(rng.choice(NORMALIZERS)))
    most = MOST_ELEMENTS[backend]
    if rng.random() < LARGE and backend != "triton":
        h, w, n, most = int(rng.integers(40, 140)), int(rng.integers(40, 140)), 1, 40 * most
    while max(h, w) > 1 and max(sizes_of(spec, (n, channels, h, w))) > most:
        h, w = (h + 1) // 2, (w + 1) // 2
    draw = rng.random()
    function = "weights" if draw < WEIGHTS else "module" if draw < WEIGHTS + MODULE and backend == "cpu" else "reassemble"
    dtype = DTYPES[backend][rng.integers(len(DTYPES[backend]))]
    kinds = str(rng.choice(X_VALUES)), str(rng.choice(LOGIT_VALUES))
    if backend == "triton" and dtype == torch.bfloat16 and kinds[0] == "tiny":
        # Triton's interpreter converts subnormal numbers of this type wrongly
        kinds = "normal", kinds[1]
    return Case(
        function,
        (n, channels, h, w),
        spec._replace(normalizer="none") if function == "weights" else spec,
        dtype,
        kinds,
        bool(rng.random() < SHARED),
        [(True, True), (True, False), (False, True), (False, False)][rng.integers(4)],
    )


def sizes_of(spec: Spec, size: tuple[int, int, int, int]) -> list[int]:
    """Numbers of elements of x, logits and y."""
    n, c, h, w = size
    cells = spec.cells(h) * spec.cells(w) * spec.groups * spec.taps * spec.up**2
    return [n * c * h * w, n * cells, n * c * spec.output_size(h) * spec.output_size(w)]


def draw_values(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: torch.dtype, groups: int = 1) -> Tensor:
    """Draw a contiguous tensor of the values that `kind` names."""
    limits = torch.finfo(dtype)
    values = torch.randn(shape, dtype=torch.float64)
    if kind == "normal":
        values *= float(rng.choice([0.1, 1, 1, 3]))
    elif kind == "wide":
        values *= 30
    elif kind == "offset":
        values += float(rng.choice([-1, 1])) * min(limits.max / 100, 1e4)
    elif kind == "huge":
        values *= limits.max / 1e8 if dtype != torch.float16 else 5e3
    elif kind == "tiny":
        values *= limits.smallest_normal
    elif kind == "zero":
        values.zero_()
    elif kind == "equal":
        values.fill_(float(rng.normal()))
    elif kind == "mixed":
        values *= 10 ** (6 * torch.rand(shape, dtype=torch.float64) - 4)
    elif kind == "some -inf":
        values[torch.rand(shape) < 0.3] = -math.inf
    elif kind == "window -inf" and values.numel():
        # every weight of some cells
        windows = values.unflatten(1, (groups, -1)).movedim(2, -1)
        windows[torch.rand(windows.shape[:-1]) < 0.1] = -math.inf
    elif kind in ("nan", "inf") and values.numel():
        values.view(-1)[rng.integers(values.numel())] = math.nan if kind == "nan" else float(rng.choice([-1, 1])) * math.inf
    return values.to(dtype)


def arrange(values: Tensor, rng: np.random.Generator) -> Tensor:
    """Put values [N, C, H, W] at strided places of a larger memory, in any order of the axes, with NaN between and around them."""
    draw = rng.random()
    if draw < 0.2:
        return values
    if draw < 0.3:
        # some axes repeat their first value
        for axis in rng.permutation(4)[: rng.integers(1, 4)]:
            values = values.narrow(axis, 0, min(1, values.shape[axis]))
        return values
    if draw < 0.33:
        # PyTorch notes the sign of the imaginary part of a conjugate and leaves the memory as it is
        return torch.complex(torch.zeros_like(values), -values).conj().imag if values.dtype.itemsize >= 4 else values
    orders = [(0, 1, 2, 3), (0, 1, 2, 3), (0, 2, 3, 1), (0, 2, 3, 1), (0, 1, 3, 2), tuple(rng.permutation(4).tolist())]
    order = orders[rng.integers(len(orders))]
    steps = [int(rng.choice([1, 1, 1, 2])) for _ in range(4)]
    starts, ends = ([int(rng.choice([0, 0, 0, 1, 2])) for _ in range(4)] for _ in range(2))
    lengths = [start + size * step + end for size, step, start, end in zip(values.shape, steps, starts, ends, strict=True)]
    offset = int(rng.choice([0, 0, 1, 2, 3]))
    memory = torch.full([offset + math.prod(lengths)], math.nan, dtype=values.dtype)[offset:]
    view = memory.view([lengths[axis] for axis in order]).permute([order.index(axis) for axis in range(4)])
    for axis in range(4):
        stop = starts[axis] + values.shape[axis] * steps[axis]
        view = view[(slice(None),) * axis + (slice(starts[axis], stop, steps[axis]),)]
    return view.copy_(values)


def make_inputs(case: Case, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, logits or weights, and the gradient dy of the output."""
    (n, c, h, w), spec = case.size, case.spec
    shapes = [(n, c, h, w), (n, spec.groups * spec.taps * spec.up**2, spec.cells(h), spec.cells(w))]
    outputs = spec.output_size(h), spec.output_size(w)
    if case.function == "weights":
        shapes[1] = (n, spec.groups * spec.taps, *outputs)
    if case.shared:
        # overlapping parts of one memory
        memory = torch.randn(max(map(math.prod, shapes)) + 3).to(case.dtype)
        x, logits = (memory[start : start + math.prod(shape)].view(shape) for start, shape in zip((3, 0), shapes, strict=True))
    else:
        made = (draw_values(rng, shape, kind, case.dtype, spec.groups) for shape, kind in zip(shapes, case.values, strict=True))
        x, logits = (arrange(values, rng).expand(shape) for values, shape in zip(made, shapes, strict=True))
    dy = arrange(draw_values(rng, (n, c, *outputs), str(rng.choice(["normal", "normal", "zero", "mixed"])), case.dtype), rng)
    return x, logits, dy.expand(n, c, *outputs)


def check_case(case: Case, rng: np.random.Generator, backend: str) -> str:
    """Compare results and gradients of a case with the definition in float64; return what the case counts as."""
    if case.function == "module":
        return check_module(case, rng)
    x, logits, dy = make_inputs(case, rng)
    before = [t.clone() for t in (x, logits, dy)]
    options: dict[str, Any] = case.spec._asdict()
    definition: Any = reassemble_reference
    function: Any = reassemble
    if case.function == "weights":
        options.pop("normalizer")
        function = reassemble_weights
        definition = lambda x, logits, **o: reassemble_weights(x, logits, backend="reference", **o)  # noqa: E731
    doubles = tuple(t.double() for t in (x, logits, dy))
    expected = differentiate(definition, *doubles, case.needs, options)
    actual = differentiate(function, x, logits, dy, case.needs, options | {"backend": backend})
    assert actual["y"].is_contiguous(memory_format=memory_format(x)), "y has another memory format than x"
    for name, result in actual.items():
        assert result.dtype == x.dtype, f"{name} is {result.dtype}"
        compare(name, result, expected[name], x, logits, dy, case, backend)
    for tensor, copy in zip((x, logits, dy), before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num()), "an input has changed"
    usual = case.values == ("normal", "normal") and not case.shared
    if usual and all(case.needs) and case.dtype.itemsize >= 4 and rng.random() < 10 * SECOND_ORDER and backend != "triton":
        check_second_order(function, definition, (x, logits, dy), options, backend)
    return "cases"


def differentiate(
    function: Any, x: Tensor, logits: Tensor, dy: Tensor, needs: tuple[bool, bool], options: dict[str, Any]
) -> dict[str, Tensor]:
    """Return y and those of dx and dlogits that are needed, by name."""
    x, logits = (t.detach().requires_grad_(need) for t, need in zip((x, logits), needs, strict=True))
    y = function(x, logits, **options)
    wanted = {name: t for name, t in (("dx", x), ("dlogits", logits)) if t.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy) if wanted else ()
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def compare(name: str, actual: Tensor, expected: Tensor, x: Tensor, logits: Tensor, dy: Tensor, case: Case, backend: str) -> None:
    """Raise AssertionError if a result is off by more than rounding, or is finite where the definition is not."""
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not actual.numel():
        return
    spec, dtype = case.spec, case.dtype
    limits = torch.finfo(dtype)
    # sums of squares and rounded weights can overflow before the result does
    small = expected.abs() <= limits.max / 64
    if name == "dlogits" and not logits.isfinite().all():
        # a window with such a logit and without an output, which a rational scale cuts, may have any gradient
        windows = logits.unflatten(1, (spec.groups, -1)) if case.function == "weights" else split_windows(logits, spec)
        small &= windows.isfinite().all(2, keepdim=True).expand(windows.shape).reshape(logits.shape)
    spread = () if backend == "torch" and spec.normalizer in LSE_NORMALIZERS else (x, dy, logits) if backend == "triton" else (x, dy)
    if not all(t.isfinite().all() for t in spread):
        # whole tiles are multiplied: a value that is not finite reaches targets nearby, see `reassemble`
        small &= actual.isfinite()
    found, wanted = actual.double()[small], expected[small]
    assert found.isfinite().all(), f"{name} is not finite in {(~found.isfinite()).sum()} of {found.numel()} places where it should be"
    if wanted.numel():
        tolerance = (TRITON_TOLERANCES if backend == "triton" else TOLERANCES)[dtype] * (3 if dtype.itemsize >= 4 else 1.5)
        finite = logits[logits.isfinite()].double().abs()
        largest = finite.max().item() if spec.normalizer in LSE_NORMALIZERS and finite.numel() else 0
        # the log-sum-exp that is saved for the gradients has the rounding of the largest logit
        compute = torch.finfo(torch.promote_types(dtype, torch.float32))
        tolerance += 4 * compute.eps * largest if backend == "triton" or (backend == "cpu" and name != "y") else 0
        scale = wanted.abs().max().item()
        if name == "dlogits":
            # differences of sums over the channels, which cancel
            scale += (x.shape[1] / spec.groups) ** 0.5 * math.prod(root_mean_square(t) for t in (x, dy))
        error = (found - wanted).abs().max().item()
        least = spec.taps * limits.smallest_normal
        assert error <= tolerance * scale + least, f"{name} is off by {error:.2e}, {error / (scale + least) / tolerance:.1f} times too much"
    # NaN does not vanish; a weight of zero may keep an infinite value from its target
    if spec.normalizer in LSE_NORMALIZERS and x.isfinite().all() and dy.isfinite().all():
        assert actual[expected.isnan()].isnan().all(), f"{name} is a number where it should be NaN"


def split_windows(logits: Tensor, spec: Spec) -> Tensor:
    """View logits as [N, G, K * K, up, up, Hq, Wq]."""
    return logits.unflatten(1, (spec.groups, spec.taps, spec.up, spec.up))


def root_mean_square(tensor: Tensor) -> float:
    """Return the root mean square of the finite values, even where their squares overflow."""
    values = tensor[tensor.isfinite()].double()
    largest = values.abs().max().item() if values.numel() else 0
    return largest * (values / largest).square().mean().sqrt().item() if largest else 0


def check_second_order(function: Any, definition: Any, inputs: tuple[Tensor, Tensor, Tensor], options: dict, backend: str) -> None:
    """Compare the gradients of a product of the gradients."""
    directions = [torch.randn(t.shape, dtype=torch.float64) for t in inputs[:2]]

    def differentiate_twice(function: Any, options: dict, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, logits, dy = (t.detach().requires_grad_() for t in inputs)
        y = function(x, logits, **options)
        gradients = torch.autograd.grad(y, (x, logits), dy, create_graph=True)
        product = sum((gradient * d.to(gradient.dtype)).sum() for gradient, d in zip(gradients, directions, strict=True))
        return torch.autograd.grad(product, (x, logits, dy))

    expected = differentiate_twice(definition, options, *(t.double() for t in inputs))
    actual = differentiate_twice(function, options | {"backend": backend}, *inputs)
    for name, result, wanted in zip(("x", "logits", "dy"), actual, expected, strict=True):
        if not wanted.numel():
            continue
        error, scale = (result.double() - wanted).abs().max().item(), wanted.abs().max().item() + wanted.numel() ** 0.5
        assert error <= 100 * TOLERANCES[inputs[0].dtype] * scale, f"the second gradient of {name} is off by {error:.2e} of {scale:.2e}"


def check_module(case: Case, rng: np.random.Generator) -> str:
    """Compare a CARAFE++ module with the definition on its own logits."""
    dtype = case.dtype if case.dtype.itemsize >= 4 else torch.float32
    width = [None, 1, 5, "auto"][rng.integers(4)]
    module = CARAFE(
        case.size[1],
        **case.spec._asdict(),
        encoder_kernel=int(rng.choice([1, 3, 5])),
        compressed_channels=width,
        encoder_dilation=int(rng.choice([1, 1, 2])),
        compressor_norm=bool(width is not None and case.size[0] * case.size[2] * case.size[3] > 1 and rng.random() < 0.3),
    ).to(dtype)
    torch.nn.init.normal_(module.content_encoder.weight, std=0.5)
    x = arrange(torch.randn(case.size, dtype=dtype), rng).expand(case.size)
    if case.values[0] != "normal":
        module.eval()
    y = module(x)
    with torch.no_grad():
        expected = reassemble_reference(x.double(), module.logits(x).double(), **case.spec._asdict())
    if y.numel():
        error, scale = (y.double() - expected).abs().max().item(), expected.abs().max().item()
        assert error <= 3 * TOLERANCES[dtype] * scale + 1e-30, f"the module is off by {error:.2e} of {scale:.2e}"
    y.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in module.parameters())
    return "cases of the module"
