"""Regions that the features of a target come from, through one or several samplers (paper, Figures 1 and 9)."""

from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels.reference import weighted_sum
from .carafe import CARAFE
from .samplers import fit


class Region(NamedTuple):
    """One map on the path, and the weight of each of its pixels in the targets.

    Attributes:
        module: name of the sampler that takes the map, or "" for the output of the last sampler.
        features: the map, [C, H, W].
        weights: [L, H, W], one map per target. With softmax, each sums to 1, unless a window of the border "zero" leaves the map.
    """

    module: str
    features: Tensor
    weights: Tensor


class _Call(NamedTuple):
    name: str
    # a module, or None for a call of `F.interpolate`
    module: nn.Module | None
    # maps x [1, C, h, w] to y [1, C', H, W]
    run: Callable[[Tensor], Tensor]
    x: Tensor
    y: Tensor


@torch.no_grad()
def trace_regions(
    network: nn.Module, inputs: Sequence[Tensor], path: str | Sequence[str], locations: Sequence[tuple[float, float]]
) -> list[Region]:
    """Accumulate the weights of samplers backwards, from `locations` in the output of the last sampler to the input of the first.

    A region says where features were reassembled from. Layers between the samplers (convolutions, laterals) are skipped.

    The weights of a CARAFE module are its reassembly kernels, averaged over its groups. Other samplers serve for comparison: any module
    that changes the size of a map, and calls of `F.interpolate`, such as those of an empty slot. Their weights are the absolute derivatives
    of the output with respect to each pixel of the input, summed over the channels and divided by their total. For interpolation, average
    pooling and max-pooling, these are the weights that the operator gives to each pixel, on average over the channels.

    Args:
        network: the network, called once in its present mode; put it into evaluation mode first.
        inputs: arguments of the network, for one image.
        path: names of samplers, or patterns such as "fpn.upsample.*", that run one after the other. Calls of `F.interpolate` in a module
            have the names "MODULE.interpolate_0", "MODULE.interpolate_1", ..., in their order. Of samplers inside each other, the CARAFE
            module is taken, or the innermost one.
        locations: L targets (down, across), as fractions of the height and the width of the output of the last sampler.

    Returns:
        The maps in the order of computation: the input of every sampler, then the output, where the weight of a target is 1 at its
        location.

    Raises:
        ValueError: no sampler that ran matches `path`, the matching samplers do not follow one another, they take several images or parts
            of images, or a location is outside the map.
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


class _Recorder(TorchFunctionMode):
    """Record the calls that change the size of a map: those of modules, and those of `F.interpolate`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.running, self.counts = [""], Counter()
        modules = [(name, module) for name, module in network.named_modules() if name]
        self.handles = [module.register_forward_pre_hook(partial(self._enter, name=name)) for name, module in modules]
        self.handles += [module.register_forward_hook(self._leave, with_kwargs=True) for _, module in modules]

    def _enter(self, module: nn.Module, args: tuple, name: str) -> None:
        self.running.append(name)

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        run = module.forward
        if getattr(module, "rewrites_guide", False):
            # the pair of the output and the rewritten guide
            run, y = (lambda *args, **kwargs: module.forward(*args, **kwargs)[0]), y[0]
        self._add(self.running.pop(), module, run, args, kwargs, y)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is F.interpolate:
            name = f"{self.running[-1]}.interpolate".lstrip(".")
            self._add(f"{name}_{self.counts[name]}", None, func, args, kwargs or {}, y)
            self.counts[name] += 1
        return y

    def _add(self, name: str, module: nn.Module | None, run: Callable, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        if not args:
            return
        x, *others = args
        are_maps = isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() == y.dim() == 4
        if are_maps and (isinstance(module, CARAFE) or x.shape[2:] != y.shape[2:]):
            self.calls.append(_Call(name, module, lambda x: run(x, *others, **kwargs), x, y))


def _record_calls(network: nn.Module, inputs: Sequence[Tensor], path: list[str]) -> list[_Call]:
    """Run the network and record the calls of the path's samplers."""
    recorder = _Recorder(network)
    try:
        with recorder:
            network(*inputs)
    finally:
        for handle in recorder.handles:
            handle.remove()
    whole = [call.name for call in recorder.calls if isinstance(call.module, CARAFE)]
    found = [call for call in recorder.calls if not any(call.name.startswith(f"{name}.") for name in whole)]
    there_are = f"it called the samplers {', '.join(dict.fromkeys(call.name for call in _keep_innermost(found))) or 'none'}"
    calls = _keep_innermost([call for call in found if any(fnmatchcase(call.name, pattern) for pattern in path)])
    if not calls:
        raise ValueError(f"the network did not call a sampler named {', '.join(path)} for this input: {there_are}")
    if several := [call for call in calls if len(call.x) != 1]:
        raise ValueError(f"{several[0].name} must see one map of the whole image, got {len(several[0].x)} (images, or regions of them)")
    for before, after in pairwise(calls):
        # a network may crop the output of an upsampler
        pairs = zip(before.x.shape[2:], before.y.shape[2:], after.x.shape[2:], strict=True)
        if not all(0 <= have - need < max(1, -(-have // coarse)) for coarse, have, need in pairs):
            sizes = [f"{'x'.join(map(str, map_.shape[2:]))}" for map_ in (before.y, after.x)]
            raise ValueError(
                f"the samplers of a path must follow one another, but the output of {before.name} is {sizes[0]} and the input of "
                f"{after.name}, which runs next, is {sizes[1]}: {there_are}"
            )
    return calls


def _keep_innermost(calls: list[_Call]) -> list[_Call]:
    """Drop the calls of modules that contain another sampler among the calls."""
    return [call for call in calls if not any(other.name.startswith(f"{call.name}.") for other in calls)]


def _carry_to_input(call: _Call, weights: Tensor) -> Tensor:
    """Carry weights [L, h, w] over the output of a sampler, or a crop of it, to its input, [L, H, W]."""
    targets = weights.new_zeros(len(weights), *call.y.shape[2:])
    targets[:, : weights.shape[1], : weights.shape[2]] = weights
    with torch.enable_grad():
        if isinstance(call.module, CARAFE):
            return _transpose_reassembly(call, call.module, targets)
        return torch.stack([_differentiate(call, target) for target in targets])


def _transpose_reassembly(call: _Call, module: CARAFE, targets: Tensor) -> Tensor:
    """Carry weights [L, Ho, Wo] over the output of a CARAFE module to its input, [L, H, W]."""
    spec = module.spec
    kernels = module.kernels(call.x).flatten(2, 3)  # [1, G, K * K, Ho, Wo]
    source = targets.new_zeros(len(targets), spec.groups, *call.x.shape[2:], requires_grad=True)
    y = fit(weighted_sum(source, kernels.expand(len(targets), -1, -1, -1, -1), spec), call.y.shape[2:])
    gradients = targets[:, None].expand(-1, spec.groups, -1, -1) / spec.groups
    return torch.autograd.grad(y, source, gradients)[0].sum(1)


def _differentiate(call: _Call, target: Tensor) -> Tensor:
    """Carry weights [Ho, Wo] over the output of any sampler to its input, [H, W], by absolute derivatives."""
    x, run = call.x.detach().clone().requires_grad_(), call.run
    if isinstance(call.module, nn.Conv2d) and type(call.module).forward is nn.Conv2d.forward:
        # the derivatives with respect to one pixel have the signs of the weights, and would cancel in a sum over the outputs
        run = partial(call.module._conv_forward, weight=call.module.weight.abs(), bias=None)
    y = run(x)
    influence = torch.autograd.grad(y, x, target.expand_as(y))[0].abs().sum((0, 1))
    return influence / influence.sum().clamp(min=1e-12)
