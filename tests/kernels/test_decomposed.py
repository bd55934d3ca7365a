"""The decompositions of the ops agree with the definition, and only the ONNX exporter uses them."""

import pytest
import torch
from carafepp.kernels import reassemble, reassemble_reference, reassemble_weights
from carafepp.kernels.decomposed import decompose, decompose_backward
from carafepp.kernels.geometry import LSE_NORMALIZERS, NORMALIZERS, Spec
from operator_cases import AWKWARD, BORDERED, describe, differentiate, log_sum_exp, random_inputs, relative_error
from torch._decomp import get_decompositions

# every awkward case with every normalizer, and the cases of the other borders with their own
CASES = [(*case[:4], case[4]._replace(normalizer=normalizer)) for normalizer in NORMALIZERS for case in AWKWARD] + BORDERED


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_decomposition_is_the_definition_at_every_size(case):
    spec = case[4]
    normalizer = spec.normalizer
    x, logits, dy = random_inputs(*case[:4], spec, torch.float64)
    rows, columns = dy.shape[2:]
    for size in [None, (rows, columns), (max(1, rows - spec.up + 1), columns + spec.up - 1)]:
        y, lse = decompose(x, logits, size, *spec, False, None)
        expected = reassemble_reference(x, logits, **spec._asdict(), size=size)
        assert y.shape == expected.shape
        assert relative_error(y, expected) < 1e-14
        if normalizer in LSE_NORMALIZERS:
            torch.testing.assert_close(lse, log_sum_exp(logits, spec, *x.shape[2:]))


@pytest.mark.parametrize("case", AWKWARD + BORDERED, ids=describe)
def test_decomposition_of_weights_at_output_resolution(case):
    spec = case[4]._replace(normalizer="softmax")
    x, _, dy = random_inputs(*case[:4], spec, torch.float64)
    weights = torch.randn(x.shape[0], spec.groups * spec.taps, *dy.shape[2:], dtype=torch.float64)
    y, _ = decompose(x, weights, dy.shape[2:], *spec, True, None)
    assert relative_error(y, reassemble_weights(x, weights, **spec._asdict(), backend="reference")) < 1e-14


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_decomposition_of_the_gradient_of_logits(case):
    spec = case[4]
    x, logits, dy = random_inputs(*case[:4], spec, torch.float64)
    expected = differentiate(reassemble_reference, x, logits, dy, (False, True), **spec._asdict())["dlogits"]
    _, dlogits = decompose_backward(dy, x, logits, x.new_empty(0), dy.shape[2:], *spec, False, None, False, True)
    assert relative_error(dlogits, expected, slack=1.0) < 1e-14
    assert decompose_backward(dy, x, logits, x.new_empty(0), dy.shape[2:], *spec, False, None, True, True) is NotImplemented


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype):
    spec = Spec(5, up=2, groups=2)
    x, logits, _ = random_inputs(1, 8, 6, 5, spec, dtype)
    y, lse = decompose(x, logits, None, *spec, False, None)
    assert (y.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(y, decompose(x.float(), logits.float(), None, *spec, False, None)[0].to(dtype))


class Reassemble(torch.nn.Module):
    """x and logits to a reassembly by 3 / 2."""

    spec = Spec(3, up=3, down=2)

    def forward(self, x, logits):
        return reassemble(x, logits, **self.spec._asdict())


def test_exported_program_keeps_the_op_and_decomposes_on_request():
    x, logits, _ = random_inputs(2, 4, 6, 8, Reassemble.spec)
    dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Reassemble(), (x, logits), dynamic_shapes=(dims, dims))

    def ops(program):
        return {node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}

    assert "carafepp" in ops(program)
    assert "carafepp" in ops(program.run_decompositions())
    plain = program.run_decompositions(get_decompositions([torch.ops.carafepp.reassemble]))
    assert ops(plain) == {"aten"}
    for n, h, w in [(1, 7, 5), (3, 12, 13)]:
        x, logits, _ = random_inputs(n, 4, h, w, Reassemble.spec)
        expected = reassemble_reference(x.double(), logits.double(), **Reassemble.spec._asdict())
        assert relative_error(plain.module()(x, logits), expected) < 4e-6
