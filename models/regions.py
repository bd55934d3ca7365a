"""Regions that the features of a target come from, through one or several CARAFE++ modules (paper, Figures 1 and 9)."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.reference import weighted_sum
from .carafe import CARAFE
from .samplers import fit


class Region(NamedTuple):
    """One map on the path, and the weight of each of its pixels in the targets.

    Attributes:
        module: name of the module that takes the map, or "" for the output of the last module.
        features: the map, [C, H, W].
        weights: [L, H, W], one map per target. With softmax each sums to 1, unless a window of the border "zero" leaves the map.
    """

    module: str
    features: Tensor
    weights: Tensor


class _Call(NamedTuple):
    name: str
    module: CARAFE
    x: Tensor
    y: Tensor


@torch.no_grad()
def trace_regions(
    network: nn.Module, inputs: Sequence[Tensor], path: str | Sequence[str], locations: Sequence[tuple[float, float]]
) -> list[Region]:
    """Accumulate reassembly kernels backwards, from `locations` in the output of the last module to the input of the first.

    A region says where features were reassembled from. Layers between the modules (convolutions, laterals) are skipped. Kernels of
    several groups are averaged.

    Args:
        network: the network, called once in its present mode; put it into evaluation mode first.
        inputs: arguments of the network, for one image.
        path: names of CARAFE modules, or patterns such as "fpn.upsample.*", that run one after the other.
        locations: L targets (down, across), as fractions of the height and the width of the output of the last module.

    Returns:
        The maps in the order of computation: the input of every module, then the output, where the weight of a target is 1 at its
        location.

    Raises:
        ValueError: no CARAFE module matches `path`, none of the matching modules ran, the modules do not follow one another, they take
            several images or parts of images, or a location is outside the map.
    """
    if outside := [location for location in locations if not all(0 <= part < 1 for part in location)]:
        raise ValueError(f"locations must be fractions of height and width, at least 0 and less than 1, got {outside[0]}")
    calls = _record_calls(network, inputs, [path] if isinstance(path, str) else list(path))
    last = calls[-1]
    height, width = last.y.shape[2:]
    weights = last.y.new_zeros(len(locations), height, width)
    for target, (down, across) in zip(weights, locations, strict=True):
        target[int(down * height), int(across * width)] = 1
    regions = [Region("", last.y[0], weights)]
    for call in reversed(calls):
        weights = _carry_to_input(call, weights)
        regions.insert(0, Region(call.name, call.x[0], weights))
    return regions


def _record_calls(network: nn.Module, inputs: Sequence[Tensor], path: list[str]) -> list[_Call]:
    """Run the network and record the calls of the path's modules."""
    modules = {name: module for name, module in network.named_modules() if isinstance(module, CARAFE)}
    chosen = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in path)]
    there_are = f"its CARAFE modules are {', '.join(modules)}" if modules else "it has no CARAFE module"
    if not chosen:
        raise ValueError(f"the network has no CARAFE module named {', '.join(path)}: {there_are}")
    calls: list[_Call] = []

    def record(module: CARAFE, args: tuple[Tensor], y: Tensor, name: str) -> None:
        calls.append(_Call(name, module, args[0], y))

    handles = [modules[name].register_forward_hook(partial(record, name=name)) for name in chosen]
    try:
        network(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError(f"the network did not call {', '.join(chosen)} for this input")
    if several := [call for call in calls if len(call.x) != 1]:
        raise ValueError(f"{several[0].name} must see one map of the whole image, got {len(several[0].x)} (images, or regions of them)")
    for before, after in pairwise(calls):
        # a network may crop the output of a module
        cropped = [have - need for have, need in zip(before.y.shape[2:], after.x.shape[2:], strict=True)]
        if not all(0 <= rest < before.module.spec.up for rest in cropped):
            sizes = [f"{'x'.join(map(str, map_.shape[2:]))}" for map_ in (before.y, after.x)]
            raise ValueError(
                f"the modules of a path must follow one another, but the output of {before.name} is {sizes[0]} and the input of "
                f"{after.name}, which runs next, is {sizes[1]}: {there_are}"
            )
    return calls


def _carry_to_input(call: _Call, weights: Tensor) -> Tensor:
    """Carry weights [L, h, w] over the output of a module, or a crop of it, to its input, [L, H, W]: the transpose of reassembly."""
    spec, (height, width) = call.module.spec, call.y.shape[2:]
    kernels = call.module.kernels(call.x).flatten(2, 3)  # [1, G, K * K, Ho, Wo]
    targets = weights.new_zeros(len(weights), spec.groups, height, width)
    targets[..., : weights.shape[1], : weights.shape[2]] = weights[:, None] / spec.groups
    with torch.enable_grad():
        source = weights.new_zeros(len(weights), spec.groups, *call.x.shape[2:], requires_grad=True)
        y = fit(weighted_sum(source, kernels.expand(len(weights), -1, -1, -1, -1), spec), call.y.shape[2:])
        return torch.autograd.grad(y, source, targets)[0].sum(1)
