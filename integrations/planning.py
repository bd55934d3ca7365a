"""Plans: the sampler for a place, built and measured before anything is changed."""

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from .adapters import SampledConv, SampledDeconv, SizedSampler
from .choices import Sampler, explain_guide, needs_guide
from .layers import Direction, by
from .observing import Shapes, undisturbed
from .places import Place, is_sampler
from .report import Replacement


class Unfit(Exception):
    """A place that no sampler, or not this one, can take. The message is the reason."""


@dataclass
class Plan:
    """What comes to a place.

    Attributes:
        place: the place.
        module: what is installed there.
        row: its row in the report.
    """

    place: Place
    module: nn.Module
    row: Replacement


def read_scale(place: Place, has_example: bool) -> tuple[Direction, int]:
    """Return the direction and the integer scale of a place.

    Raises:
        Unfit: no sampler can take the place.
    """
    found = place.found
    if found.reason:
        raise Unfit(found.reason)
    if None in place.shapes:
        raise Unfit("it does not turn one map [N, C, H, W] into another")
    if not place.maps and None in (found.channels, found.scale):
        if has_example:
            raise Unfit("the forward of the example does not reach it")
        raise Unfit("its channels are known only from a forward; give example=, an input of the model")
    if found.channels is None and len(place.channels) > 1:
        raise Unfit(f"it gets maps of different channels: {', '.join(map(str, sorted(place.channels)))}")
    if place.maps and all(shapes.source[2:] == shapes.target[2:] for shapes in place.maps):
        raise Unfit("it keeps the size of its input")
    if found.scale is None and any(shapes.source[2:] == (1, 1) for shapes in place.maps):
        raise Unfit("its input is a single cell, which tells no scale; if this is no pooled cell, a larger example tells the scale")
    if found.direction is not None:
        scales = {cast(tuple[float, float], found.scale)}
    else:
        scales = {near_scale(shapes) for shapes in place.maps}
    if len(scales) > 1:
        raise Unfit(f"its calls resize by different factors: {', '.join(sorted(map(by, scales)))}")
    rows, columns = scales.pop()
    if rows != columns or rows != int(rows) or rows < 2:
        if found.scale is None:
            raise Unfit("its output is not a whole number of times as large as its input")
        raise Unfit(f"it resizes by {by((rows, columns))}, and not by an integer")
    return found.direction or "up", int(rows)


def near_scale(shapes: Shapes) -> tuple[float, float]:
    """Return the integer scale whose size differs by less than one cell from that of a call; otherwise the scale of the call."""
    whole = round(shapes.scale[0]), round(shapes.scale[1])
    sides = zip(whole, shapes.source[2:], shapes.target[2:], strict=True)
    return whole if all(abs(scale * source - target) < scale for scale, source, target in sides) else shapes.scale


def make_plan(place: Place, direction: Direction, scale: int, slot: Sampler, reference: torch.Tensor | None) -> Plan:
    """Build the sampler for a place and what goes around it, and measure it with the maps of the example.

    Args:
        place: the place.
        direction, scale: of the place.
        slot: makes the sampler.
        reference: a parameter whose device and data type the sampler gets, where the layer itself has none.

    Raises:
        Unfit: the sampler does not take these channels, or does not give the size of the layer.
        TypeError, ValueError: `slot` does not return a sampler for other people's networks.
    """
    sampler = build(slot, place.found.channels or next(iter(place.channels)), direction)
    spec = getattr(sampler, "spec", None)
    own = 2 if spec is None else getattr(spec, direction)
    if own != scale:
        raise Unfit(f"it resizes by {scale} and the sampler by {own}; {direction}=partial(CARAFE, {direction}={scale}) would fit")
    weight = next((p for p in place.layer.parameters() if p.is_floating_point()), reference) if place.layer is not None else reference
    dtype = place.maps[0].dtype if weight is None and place.maps else None if weight is None else weight.dtype
    sampler.to(place.maps[0].device if place.maps else None if weight is None else weight.device, dtype)
    module = place.found.assemble(sampler)
    if not is_sampler(module):
        # a second `replace` must know it
        module = SizedSampler(module)
    inherit(module, place)
    after = type(sampler).__name__
    if isinstance(module, SampledConv):
        after += f" + {type(module.conv).__name__}"
    elif isinstance(module, SampledDeconv) and isinstance(module.projection, nn.Conv2d):
        after += " after 1x1 Conv2d"
    row = Replacement(place.paths, place.found.name, after, count_parameters(place.layer), count_parameters(module))
    if place.maps and dtype is not None:
        sized = place.found.scale is None and place.layer is None
        flops = 0 if place.layer is None else measure(place.layer, place, dtype, False)
        row = dataclasses.replace(row, flops_before=flops, flops_after=measure(module, place, dtype, sized))
    return Plan(place, module, row)


def inherit(module: nn.Module, place: Place) -> None:
    """Give the module of a place the training mode, and the attributes that a framework has set on the layer, such as its index."""
    before = place.owner if place.layer is None or place.owner is not None else place.layer
    if before is None:
        return
    module.train(before.training)
    if before is place.layer:
        own = {"transposed", *getattr(before, "__constants__", ())}
        vars(module).update({k: v for k, v in vars(before).items() if k[0] != "_" and k not in own and k not in vars(module)})


def build(slot: Sampler, channels: int, direction: Direction) -> nn.Module:
    """Make a sampler.

    Raises:
        Unfit: the sampler does not take these channels.
        TypeError, ValueError: the result is not a module, or needs a guide.
    """
    try:
        sampler = slot(channels)
    except ValueError as error:
        raise Unfit(str(error)) from error
    if not isinstance(sampler, nn.Module):
        raise TypeError(f"{direction} must return a torch.nn.Module for a number of channels, got {type(sampler).__name__}")
    if needs_guide(sampler):
        raise ValueError(explain_guide(direction, sampler))
    return sampler


def count_parameters(module: nn.Module | None) -> int:
    """Count the parameters of a module; nothing has none."""
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def measure(module: nn.Module, place: Place, dtype: torch.dtype, sized: bool) -> int:
    """Return the FLOPs of a module for the maps of a place.

    Raises:
        Unfit: the module gives other sizes than the layer.
    """
    with undisturbed(module), FlopCounterMode(display=False) as counter:
        for shapes in place.maps:
            x = torch.zeros(shapes.source, dtype=dtype, device=shapes.device)
            try:
                y = module(x, size=shapes.target[2:]) if sized else module(x)
            except ValueError as error:
                raise Unfit(f"the sampler does not take its maps: {error}") from error
            if y.shape != shapes.target:
                sizes = [" x ".join(map(str, shape[1:])) for shape in (shapes.source, shapes.target, y.shape)]
                raise Unfit(f"it turns maps of {sizes[0]} into {sizes[1]}, and the sampler into {sizes[2]}")
    return counter.get_total_flops()
