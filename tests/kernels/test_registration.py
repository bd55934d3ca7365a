"""The ops behind the operator: derivatives of every order, shapes without values, torch.compile and torch.export."""

import pytest
import torch
from carafepp.kernels import reassemble
from carafepp.kernels.geometry import NORMALIZERS, Spec
from commands import run_after_torch
from operator_cases import differentiate, random_inputs
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"], indirect=True)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_to_second_order(normalizer, backend):
    spec = Spec(3, up=2, groups=2, normalizer=normalizer)
    inputs = [t.requires_grad_() for t in random_inputs(1, 4, 3, 2, spec, torch.float64, spread=2.0)[:2]]

    def function(x, logits):
        return reassemble(x, logits, backend=backend, **spec._asdict())

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("normalizer", ["softmax", "none"])
def test_opcheck(layout, normalizer, backend):
    spec = Spec(3, up=3, down=2, groups=2, normalizer=normalizer)
    x, logits, dy = random_inputs(2, 32, 5, 4, spec, layouts=layout, spread=2.0)
    tail = (dy.shape[2:], *spec, False, backend)
    torch.library.opcheck(torch.ops.carafepp.reassemble, (x.requires_grad_(), logits.detach().requires_grad_(), *tail))
    lse = torch.ops.carafepp.reassemble(x, logits, *tail)[1].detach()
    torch.library.opcheck(torch.ops.carafepp.reassemble_backward, (dy, x.detach(), logits, lse, *tail, True, True))


class Reassemble(torch.nn.Module):
    def forward(self, x, logits):
        return reassemble(x.relu(), 2 * logits, kernel_size=5, up=2) + 1


def test_compiles_to_one_graph():
    inputs = random_inputs(1, 8, 6, 5, Spec(5, up=2), layouts="channels_last", spread=2.0)
    compiled = torch.compile(Reassemble(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(differentiate(compiled, *inputs), differentiate(Reassemble(), *inputs))


def test_exports_for_any_size():
    height, width = torch.export.Dim("height", min=2, max=99), torch.export.Dim("width", min=2, max=99)
    sizes = {2: height, 3: width}
    exported = torch.export.export(
        Reassemble(), (torch.randn(1, 8, 6, 5), torch.randn(1, 100, 6, 5)), dynamic_shapes={"x": sizes, "logits": sizes}
    )
    for size in ((6, 5), (11, 7)):
        inputs = torch.randn(1, 8, *size), torch.randn(1, 100, *size)
        torch.testing.assert_close(exported.module()(*inputs), Reassemble()(*inputs))


def test_exported_program_needs_the_operator_and_nothing_else(tmp_path):
    """A process that loads a file of another one registers the operator by importing carafepp.kernels."""
    inputs = torch.randn(1, 8, 6, 5), torch.randn(1, 100, 6, 5)
    torch.export.save(torch.export.export(Reassemble(), inputs), tmp_path / "program.pt2")
    torch.save((*inputs, Reassemble()(*inputs)), tmp_path / "expected.pt")
    done = run_after_torch(
        """if True:
        import torch
        try:
            torch.export.load("program.pt2")
        except RuntimeError as error:
            print(error)
        import carafepp.kernels
        *inputs, expected = torch.load("expected.pt")
        torch.testing.assert_close(torch.export.load("program.pt2").module()(*inputs), expected)
        """,
        cwd=tmp_path,
    )
    assert "error when deserializing the saved file" in done.stdout
    # PyTorch's warnings name what is missing
    assert "failed to resolve torch.ops.carafepp.reassemble.default" in done.stderr


def test_meta_tensors_give_shapes():
    x, logits, _ = random_inputs(1, 8, 5, 6, Spec(3, up=2), device="meta")
    y = reassemble(x.to(memory_format=torch.channels_last), logits, kernel_size=3, up=2)
    assert (y.shape, y.device.type) == ((1, 8, 10, 12), "meta")
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_what_watches_a_call_sees_the_ops():
    """Calls without an observer do not pass through the dispatcher."""
    x, logits, dy = random_inputs(1, 8, 5, 6, Spec(3, up=2))
    names = {"carafepp::reassemble", "carafepp::reassemble_backward"}
    with torch.profiler.profile() as profile:
        expected = differentiate(reassemble, x, logits, dy, kernel_size=3, up=2)
    assert names <= {event.key for event in profile.key_averages()}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.add(op.name())
            return op(*args, **(kwargs or {}))

    seen = set()
    with Recorder():
        observed = differentiate(reassemble, x, logits, dy, kernel_size=3, up=2)
    assert names <= seen
    alone = differentiate(reassemble, x, logits, dy, kernel_size=3, up=2)
    for name, result in expected.items():
        assert torch.equal(observed[name], result)
        assert torch.equal(alone[name], result)


def test_many_sizes_in_turn_give_the_results_of_one():
    """What a call remembers of a layout depends on everything that the results depend on."""
    spec = Spec(3, up=2)
    problems = [
        random_inputs(1, 4, h, w, spec, layouts=layout) for h in (3, 4) for w in (5, 6) for layout in ("contiguous", "channels_last")
    ]
    problems += [[t.double() for t in problem] for problem in problems]
    alone = [differentiate(reassemble, *problem, **spec._asdict()) for problem in problems]
    for problem, expected in [*zip(problems, alone, strict=True)] * 2:
        for name, result in differentiate(reassemble, *problem, **spec._asdict()).items():
            assert torch.equal(result, expected[name])
            assert result.stride() == expected[name].stride()
