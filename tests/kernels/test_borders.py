"""The borders of the map: the definition against other definitions of each, and derivatives, vmap and exported programs at every border."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from carafepp.kernels import reassemble, reassemble_reference, reassemble_weights
from carafepp.kernels.geometry import BORDERS, Spec
from carafepp.models.carafe import CARAFE
from operator_cases import BORDERED, describe, differentiate, random_inputs
from torch.func import grad, jvp, vmap

SCALES = [dict(up=2), dict(up=1), dict(down=2), dict(up=3, down=2), dict(up=4, down=5)]
IDS = ["up2", "same", "down2", "3/2", "4/5"]


@pytest.mark.parametrize("scale", SCALES, ids=IDS)
def test_zero_is_the_default(scale):
    inputs = random_inputs(1, 4, 4, 5, Spec(3, **scale))[:2]
    for function in (reassemble, reassemble_reference):
        assert torch.equal(function(*inputs, kernel_size=3, **scale), function(*inputs, kernel_size=3, **scale, border="zero"))


@pytest.mark.parametrize("normalizer", ["softmax", "none"])
@pytest.mark.parametrize("scale", SCALES, ids=IDS)
def test_replicate_is_the_middle_of_a_padded_map(scale, normalizer):
    spec = Spec(5, **scale, groups=2, normalizer=normalizer)
    x, logits, dy = random_inputs(1, 4, 4, 7, spec, torch.float64)
    y = reassemble_reference(x, logits, **spec._replace(border="replicate")._asdict())
    # two cells before the map and four behind it, which the windows of the middle reach at most; their own logits have no effect there
    cells = [side + 6 for side in logits.shape[2:]]
    before = 2 * spec.down
    below, right = (count * spec.down - side - before for count, side in zip(cells, (4, 7), strict=True))
    padded = F.pad(x, (before, right, before, below), "replicate")
    others = torch.randn(*logits.shape[:2], *cells, dtype=torch.float64)
    others[..., 2:-4, 2:-4] = logits
    whole = reassemble_reference(padded, others, **spec._asdict())
    middle = whole[..., 2 * spec.up :, 2 * spec.up :][..., : dy.shape[2], : dy.shape[3]]
    torch.testing.assert_close(y, middle, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid_normalized"])
@pytest.mark.parametrize("scale", SCALES, ids=IDS)
@pytest.mark.parametrize("size", [(4, 7), (2, 1)], ids=str)
def test_renormalize_divides_by_the_sum_inside(size, scale, normalizer):
    spec = Spec(5, **scale, groups=2, normalizer=normalizer)
    x, logits, _ = random_inputs(1, 4, *size, spec, torch.float64)
    y = reassemble_reference(x, logits, **spec._replace(border="renormalize")._asdict())
    inside = reassemble_reference(torch.ones_like(x), logits, **spec._asdict())
    torch.testing.assert_close(y, reassemble_reference(x, logits, **spec._asdict()) / inside, rtol=1e-12, atol=1e-12)
    ones = reassemble_reference(torch.ones_like(x), logits, **spec._replace(border="renormalize")._asdict())
    torch.testing.assert_close(ones, torch.ones_like(ones))


@pytest.mark.parametrize("scale", SCALES, ids=IDS)
def test_shift_reads_the_nearest_window_inside(scale):
    spec = Spec(3, **scale, normalizer="sigmoid", border="shift")
    x, logits, dy = random_inputs(1, 2, 4, 5, spec, torch.float64)
    weights = F.pixel_shuffle(logits, spec.up).sigmoid()[..., : dy.shape[2], : dy.shape[3]].unflatten(1, (3, 3))
    expected = torch.empty_like(dy)
    for row, column in itertools.product(*map(range, dy.shape[2:])):
        top, left = (
            min(max(target * spec.down // spec.up - 1, 0), side - 3) for target, side in zip((row, column), x.shape[2:], strict=True)
        )
        window = x[..., top : top + 3, left : left + 3]
        expected[..., row, column] = (weights[:, :, :, row, column][:, None] * window).sum((-2, -1))
    torch.testing.assert_close(reassemble_reference(x, logits, **spec._asdict()), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("border", BORDERS)
def test_borders_agree_inside(border):
    spec = Spec(3, up=2)
    x, logits, _ = random_inputs(1, 4, 6, 7, spec)
    y, plain = (reassemble(x, logits, **spec._replace(border=name)._asdict()) for name in (border, "zero"))
    torch.testing.assert_close(y[..., 2:-2, 2:-2], plain[..., 2:-2, 2:-2])
    assert (border == "zero") == torch.equal(y, plain)


@pytest.mark.parametrize("case", BORDERED, ids=describe)
def test_logits_at_output_resolution(case, backend):
    """With another output size, where one is possible."""
    if backend == "triton":
        pytest.skip("the kernels of a GPU take the same layout in both functions")
    spec = case[4]
    x, logits, dy = random_inputs(*case[:4], spec)
    size = tuple(side - 1 if spec.up > 1 and side > 1 else side for side in dy.shape[2:])

    def at_targets(x, logits):
        shuffled = F.pixel_shuffle(logits, spec.up)[..., : size[0], : size[1]]
        return reassemble_weights(x, shuffled, size=size, backend=backend, **spec._asdict())

    dy = dy[..., : size[0], : size[1]]
    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), size=size, **spec._asdict())
    for name, result in differentiate(at_targets, x, logits, dy).items():
        torch.testing.assert_close(result.double(), expected[name], rtol=1e-4, atol=1e-4)


def test_positive_weights_are_renormalised_by_their_logarithms():
    x, logits, _ = random_inputs(1, 4, 4, 5, Spec(3))
    weights = logits.softmax(1)
    y = reassemble_weights(x, weights.log(), kernel_size=3, normalizer="softmax", border="renormalize")
    inside = reassemble_weights(torch.ones_like(x), weights, kernel_size=3)
    torch.testing.assert_close(y, reassemble_weights(x, weights, kernel_size=3) / inside)


DIFFERENTIATED = [
    Spec(3, up=2, groups=2, border="renormalize"),
    Spec(3, up=4, down=5, normalizer="sigmoid_normalized", border="renormalize"),
    Spec(3, up=2, normalizer="sigmoid", border="replicate"),
    Spec(3, up=3, down=2, border="replicate"),
    Spec(3, up=2, groups=2, border="shift"),
    Spec(3, down=2, normalizer="none", border="shift"),
]


@pytest.mark.parametrize("spec", DIFFERENTIATED, ids=lambda spec: f"{spec.border}-up{spec.up}-down{spec.down}")
@pytest.mark.parametrize("at_targets", [False, True], ids=["cells", "targets"])
def test_derivatives_and_vmap(spec, at_targets, backend):
    if backend == "triton":
        pytest.skip("it does not take float64")
    stacks = [random_inputs(1, 4, 3, 4, spec, torch.float64, seed=seed, spread=2.0)[:2] for seed in range(2)]
    function, definition = reassemble, reassemble_reference
    if at_targets:
        side = slice(0, spec.output_size(3)), slice(0, spec.output_size(4))
        stacks = [(x, F.pixel_shuffle(logits, spec.up)[..., side[0], side[1]].contiguous()) for x, logits in stacks]
        function, definition = reassemble_weights, functools.partial(reassemble_weights, backend="reference")
    ours, theirs = functools.partial(function, backend=backend, **spec._asdict()), functools.partial(definition, **spec._asdict())
    inputs = [tensor.requires_grad_() for tensor in stacks[0]]
    assert torch.autograd.gradcheck(ours, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, inputs, fast_mode=True)
    xs, ls = (torch.stack(tensors).detach() for tensors in zip(*stacks, strict=True))

    def transforms(f):
        gradients = grad(lambda x, logits: f(x, logits).sin().sum(), (0, 1))
        return (
            jvp(f, (xs[0], ls[0]), (xs[1], ls[1])),
            jvp(gradients, (xs[0], ls[0]), (xs[1], ls[1])),
            vmap(f, (0, None))(xs, ls[0]),
            vmap(gradients)(xs, ls),
        )

    torch.testing.assert_close(transforms(ours), transforms(theirs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", DIFFERENTIATED[1::2], ids=lambda spec: spec.border)
def test_the_ops_have_shapes_without_values(spec):
    x, logits, dy = random_inputs(2, 8, 5, 4, spec, spread=2.0)
    tail = (dy.shape[2:], *spec, False, "torch")
    torch.library.opcheck(torch.ops.carafepp.reassemble, (x.requires_grad_(), logits.requires_grad_(), *tail))
    y = reassemble(x.to("meta"), logits.to("meta"), **spec._asdict())
    assert (y.shape, y.device.type) == (dy.shape, "meta")


@pytest.mark.parametrize("border", BORDERS)
def test_modules_have_borders(border):
    torch.manual_seed(0)
    module = CARAFE(8, up=2, kernel_size=3, compressed_channels=4, border=border).double()
    x = torch.randn(1, 8, 4, 5, dtype=torch.float64)
    logits = module.logits(x)
    torch.testing.assert_close(module(x), reassemble_reference(x, logits, kernel_size=3, up=2, border=border))
    assert f"border={border!r}" in repr(module)
    kernels = module.kernels(x)
    torch.testing.assert_close(kernels.sum((2, 3)), torch.ones(1, 1, 8, 10, dtype=torch.float64))
    assert (kernels[0, 0, 0, 0, 0, 0] == 0) == (border == "renormalize")
    if border != "zero":
        torch.testing.assert_close(module(torch.ones_like(x)), torch.ones(1, 8, 8, 10, dtype=torch.float64))


def test_modules_refuse_wrong_borders():
    with pytest.raises(ValueError, match="border must be one of zero, renormalize, replicate, shift, got 'same'"):
        CARAFE(8, up=2, border="same")
    with pytest.raises(ValueError, match="border 'renormalize' needs a normalizer"):
        CARAFE(8, up=2, border="renormalize", normalizer="sigmoid")


@pytest.mark.parametrize("border", BORDERS)
def test_an_exported_program_serves_any_size(border):
    spec = Spec(3, up=3, down=2, border=border)

    class Reassemble(torch.nn.Module):
        def forward(self, x, logits):
            return reassemble(x, logits, **spec._asdict())

    dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Reassemble(), random_inputs(2, 4, 6, 8, spec)[:2], dynamic_shapes=(dims, dims))
    from torch._decomp import get_decompositions

    plain = program.run_decompositions(get_decompositions([torch.ops.carafepp.reassemble]))
    names = {str(node.target) for node in plain.graph.nodes if node.op == "call_function"}
    assert not any(word in name for name in names for word in ("carafepp", "gather", "index", "scatter"))
    for n, h, w in [(1, 7, 5), (3, 12, 13)]:
        x, logits, _ = random_inputs(n, 4, h, w, spec)
        expected = reassemble_reference(x, logits, **spec._asdict())
        for exported in (program, plain):
            torch.testing.assert_close(exported.module()(x, logits), expected)


@pytest.mark.parametrize("border", BORDERS)
def test_a_traced_program_serves_any_size(border):
    spec = Spec(3, up=3, down=2, border=border)

    def function(x, logits):
        return reassemble(x, logits, **spec._asdict())

    traced = torch.jit.trace(function, random_inputs(2, 4, 6, 8, spec)[:2])
    for n, h, w in [(1, 7, 5), (3, 12, 13)]:
        inputs = random_inputs(n, 4, h, w, spec)[:2]
        torch.testing.assert_close(traced(*inputs), function(*inputs))
