"""Calls of the operator with one wrong argument, which an error has to name."""

import re
from typing import Any

import numpy as np
import torch
from carafepp.kernels import reassemble, reassemble_weights

NAMES = re.compile(r"\b(x|logits|weights|kernel_size|up|down|groups|normalizer|backend)\b")


def damage_tensor(tensor: torch.Tensor, rng: np.random.Generator) -> Any:
    """Return something that cannot take the place of a tensor [N, C, H, W]."""
    n, c, h, w = tensor.shape
    ways = [
        lambda: None,
        lambda: 1.0,
        lambda: tensor.tolist(),
        lambda: tensor.numpy(),
        lambda: tensor[0],
        lambda: tensor[None],
        lambda: tensor.flatten(),
        lambda: tensor.sum(),
        lambda: tensor.int(),
        lambda: tensor.bool(),
        lambda: tensor.to(torch.uint8),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.double(),
        lambda: tensor.to(torch.float8_e4m3fn),
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse(),
        lambda: tensor.to_mkldnn(),
        lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor(list(tensor)),
        lambda: torch.nested.nested_tensor(list(tensor), layout=torch.jagged),
        lambda: tensor.flatten(0, 2).to_sparse_csr(),
        lambda: tensor.new_zeros(n + 1, c, h, w),
        lambda: tensor.new_zeros(n, c + 1, h, w),
        lambda: tensor.new_zeros(n, c, h + 3, w),
        lambda: tensor.new_zeros(n, c, h, w + 3),
        lambda: tensor.new_zeros(n, 0, h, w),
        lambda: tensor.new_zeros(n, c, 0, w),
        lambda: tensor.new_zeros(n, c, h, 0),
        lambda: tensor.new_zeros(1).expand(2**40, c, h, w),
    ]
    return ways[rng.integers(len(ways))]()


WRONG_OPTIONS: dict[str, list[Any]] = {
    "kernel_size": [0, -1, 2, 4, 5, 7, 3.0, "3", None, True, (3, 3), 2**31 + 1, 10**30 + 1, torch.tensor(3), np.int64(3), float("nan")],
    "up": [0, -1, 1, 3, 2.0, "2", None, False, (2, 2), 2**31, 10**30, torch.tensor(2)],
    "down": [0, -1, 2, 3, 1.0, "1", None, False, (1, 1), 2**31, 10**30],
    "groups": [0, -1, 3, 4, 5, 1.0, "1", None, True, 2**31, 10**30],
    "normalizer": ["", "Softmax", "soft max", None, 1, ["softmax"], b"softmax", 2.5, "none\x00"],
    "backend": ["", "CPU", "cuda", 1, ["cpu"], b"cpu", True, "mps"],
}


def check_wrong_call(rng: np.random.Generator, backend: str) -> str:
    """Make a call with one wrong argument, whose ValueError or TypeError has to name an argument."""
    x, weights = torch.randn(2, 2, 4, 5), torch.randn(2, 2 * 9 * 4, 4, 5)
    options: dict[str, Any] = {"kernel_size": 3, "up": 2, "down": 1, "groups": 2, "normalizer": "softmax", "backend": backend}
    function = reassemble
    if rng.random() < 0.3:
        function, weights = reassemble_weights, torch.randn(2, 2 * 9, 8, 10)
        options.pop("normalizer")
    damaged = str(rng.choice(["x", "weights", *options]))
    if damaged == "x":
        x = damage_tensor(x, rng)
    elif damaged == "weights":
        weights = damage_tensor(weights, rng)
    else:
        values = WRONG_OPTIONS[damaged]
        options[damaged] = values[rng.integers(len(values))]
    told = f"{damaged} = {type(x) if damaged == 'x' else type(weights) if damaged == 'weights' else options[damaged]!r}"
    try:
        function(x, weights, **options)
    except (TypeError, ValueError) as error:
        if NAMES.search(str(error)):
            return "wrong calls refused"
        raise AssertionError(f"{told}: {type(error).__name__} without a name: {error}") from error
    except Exception as error:
        raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error
    raise AssertionError(f"{told} was accepted")
