"""Checks of the samplers that users put into slots (how they are made, how they are called, and what they return), and of inputs.

Each error about a sampler names its class, what it does, and what a slot needs. `samplers.py` defines the slot.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor


def build(slot: Callable[..., Any], channels: int, options: Mapping[str, Any], *, guided: bool) -> nn.Module:
    """Call a slot, `slot(channels, **options)`, and check that it makes a module that can be called as a sampler.

    Args:
        slot: makes the sampler.
        channels, options: the arguments of the call.
        guided: whether the sampler is called with a guide, `sampler(x, guide)`, instead of `sampler(x)`.

    Raises:
        TypeError: the slot does not take these arguments, does not make a module, or makes a module whose forward takes others.
    """
    name = describe(slot)
    wanted = ", ".join(["channels", *options])
    if (problem := find_mismatch(slot, channels, **options)) is not None:
        raise TypeError(f"the sampler {name} is made by {name}({wanted}), but its constructor does not take these arguments: {problem}")
    sampler = slot(channels, **options)
    if not isinstance(sampler, nn.Module):
        raise TypeError(f"the sampler {name} must make a torch.nn.Module, got an object of type {type(sampler).__name__}")
    maps = ["x", "guide"] if guided else ["x"]
    if (problem := find_mismatch(sampler.forward, *maps)) is not None:
        hint = "" if guided else "; one that needs the finer map has the class attribute needs_guide = True"
        raise TypeError(f"the sampler {name} is called with ({', '.join(maps)}), but its forward does not take them: {problem}{hint}")
    return sampler


def describe(slot: Callable[..., Any]) -> str:
    """Name the class or function of a slot, which a `functools.partial` hides in its attribute `func`."""
    made = getattr(slot, "func", slot)
    return getattr(made, "__name__", type(made).__name__)


def find_mismatch(function: Callable[..., Any], *arguments: Any, **options: Any) -> str | None:
    """Say why a function cannot be called with these arguments; None if it can, or if its signature is not known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # a traced module has no signature, nor has a partial with a wrong option, whose call says more
        return None
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        return str(error)
    return None


def check_map(y: Tensor, x: Tensor, name: str) -> Tensor:
    """Check that what a sampler returns for x [N, C, H, W] is a tensor [N, C, h, w], and return it.

    Raises:
        TypeError: the result is not a tensor.
        ValueError: the result has other channels, or not four axes.
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"the sampler {name} must return a tensor [N, {x.shape[1]}, h, w], got an object of type {type(y).__name__}")
    if y.dim() != 4 or y.shape[1] != x.shape[1]:
        raise ValueError(f"the sampler {name} must keep the channels of its input {tuple(x.shape)}, got the shape {tuple(y.shape)}")
    return y


def check_half(y: Tensor, x: Tensor, name: str) -> Tensor:
    """Check that y is x [N, C, H, W] downsampled by 2, of size ceil(H / 2) x ceil(W / 2), and return it.

    Raises:
        ValueError: y has another size.
    """
    # a condition on sizes would restrict a compiled or exported program to the sizes of the example
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return y
    half = [(side + 1) // 2 for side in x.shape[2:]]
    if [*y.shape[2:]] != half:
        (height, width), (rows, columns) = x.shape[2:], y.shape[2:]
        raise ValueError(f"the downsampler {name} must turn {height} x {width} pixels into {half[0]} x {half[1]}, got {rows} x {columns}")
    return y


def check_features(x: Tensor, channels: int | None, name: str = "x") -> Tensor:
    """Check that the input of a module is a tensor [N, channels, H, W], and return it.

    Args:
        x: the input.
        channels: those that the first layer takes; None, or 0 in a lazy layer, if it does not say.
        name: the name of the argument.

    Raises:
        TypeError: the input is not a tensor.
        ValueError: it has other channels, or not four axes.
    """
    # for a compiler or tracer, the first layer makes this check itself
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return x
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor [N, {channels or 'C'}, H, W], got an object of type {type(x).__name__}")
    if x.dim() != 4 or (channels and x.shape[1] != channels):
        raise ValueError(f"{name} must have the shape [N, {channels or 'C'}, H, W], got {tuple(x.shape)}")
    return x
