"""The count of launches that tests/support/launches.py makes on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from launches import LaunchCounter


@pytest.mark.parametrize(
    ("function", "launches"),
    [
        (torch.relu, 1),
        (lambda x: x.permute(0, 2, 3, 1).flatten(0, 1)[:, :3], 0),
        (lambda x: x.to(torch.float32), 0),
        (lambda x: x.to(torch.bfloat16), 1),
        (torch.empty_like, 0),
        (lambda x: F.batch_norm(x, None, None, training=True), 3),
        (lambda x: torch.mm(x[0, 0], x[0, 1]), 1),
    ],
)
def test_operations(function, launches):
    x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    with LaunchCounter() as counter:
        function(x)
    assert counter.total == launches


# the last two: copies to 104 channels and back in half precision
@pytest.mark.parametrize(
    ("channels", "dtype", "biased", "forward", "backward"),
    [
        (104, torch.bfloat16, False, 1, 2),
        (104, torch.bfloat16, True, 2, 3),
        (100, torch.float32, True, 2, 3),
        (100, torch.bfloat16, False, 2, 3),
        (100, torch.float16, True, 3, 4),
    ],
)
def test_convolutions(channels, dtype, biased, forward, backward):
    x = torch.randn(2, 8, 3, 3, dtype=dtype, requires_grad=True)
    weight = torch.ones(channels, 8, 1, 1, dtype=dtype, requires_grad=True)
    bias = torch.ones(channels, dtype=dtype, requires_grad=True) if biased else None
    with LaunchCounter() as counter:
        y = F.conv2d(x, weight, bias)
    assert counter.total == forward
    dy = torch.ones_like(y)
    with LaunchCounter() as counter:
        y.backward(dy)
    assert counter.total == backward
    assert counter.bytes > dy.numel() * dy.element_size()
