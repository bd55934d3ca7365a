"""The operator in torch's FLOP counter."""

import pytest
from carafepp.kernels import reassemble
from carafepp.kernels.geometry import Spec
from operator_cases import random_inputs
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize(("grad_x", "grad_logits"), [(True, True), (True, False), (False, True)])
def test_flops_are_counted(grad_x, grad_logits):
    x, logits, _ = random_inputs(2, 8, 5, 6, Spec(3, up=2))
    x.requires_grad_(grad_x)
    logits.requires_grad_(grad_logits)
    with FlopCounterMode(display=False) as counter:
        y = reassemble(x, logits, kernel_size=3, up=2)
        y.sum().backward()
    # a multiplication and an addition for every tap of every output value, in each of the sums
    assert counter.get_total_flops() == 2 * 9 * y.numel() * (1 + grad_x + grad_logits)
