"""The places of a network where samplers can be put: layers, and calls in the forward of a module."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
import torch.nn as nn
import torch.nn.functional as F

from .adapters import Adapter, SizedSampler
from .layers import Resampling, read_interpolation, read_layer
from .observing import FUNCTIONS, Event, Forward, Shapes

SAMPLER_MODULES = tuple(
    f"carafepp.models.{name}" for name in ("carafe", "guided_samplers", "learned_samplers", "point_samplers", "pooling", "samplers")
)


@dataclass
class Place:
    """A layer, or a call in the forward of its owner.

    Attributes:
        paths: where the layer is, several if it is shared. A call has the path of its owner and a name with a number.
        found: what it does.
        layer: the layer; None for the call of a function.
        shapes: of its calls in the forward of the example; None stands for a call that does not take one map [N, C, H, W].
        owner: the module whose forward has to be rewritten; None for a layer.
        index: which of the events in the forward of the owner the call is.
        aliases: paths of the layer that is called.
    """

    paths: tuple[str, ...]
    found: Resampling
    layer: nn.Module | None = None
    shapes: list[Shapes | None] = field(default_factory=list)
    owner: nn.Module | None = None
    index: int = 0
    aliases: tuple[str, ...] = ()

    @property
    def maps(self) -> list[Shapes]:
        """The shapes of the calls that take one map."""
        return [shapes for shapes in self.shapes if shapes is not None]

    @property
    def channels(self) -> set[int]:
        """The numbers of channels of the inputs."""
        return {shapes.source[1] for shapes in self.maps}


def is_sampler(module: nn.Module) -> bool:
    """Return whether a module is a sampler of carafepp or derived from one, or was installed by `replace`."""
    return isinstance(module, Adapter) or any(cls.__module__ in SAMPLER_MODULES for cls in type(module).__mro__)


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the path of a module and the module, then the same for all below it.

    A shared module appears at each of its paths. What is below a layer that resamples, a sampler or a TorchScript module is left out.
    """
    yield path, module
    if not is_sampler(module) and read_layer(module) is None and not isinstance(module, torch.jit.ScriptModule):
        # named_children would omit the second path of a shared module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{path}.{name}".lstrip("."))


def find_places(model: nn.Module, forwards: Sequence[Forward]) -> list[Place]:
    """Find what resamples in a network, in the order of its modules.

    Args:
        model: the network.
        forwards: what the forward of an example told (`observe`). Without them, only layers are found, and no calls of functions.
    """
    paths: dict[nn.Module, list[str]] = {}
    for path, module in walk(model):
        paths.setdefault(module, []).append(path)
    places = []
    for module, names in paths.items():
        if is_sampler(module):
            continue
        found = read_layer(module)
        if found is not None:
            shapes = [event.shapes for forward in forwards for event in forward.events if event.called is module]
            places.append(Place(tuple(names), found, module, shapes))
        places += find_calls(paths, [forward for forward in forwards if forward.module is module])
    return choose_layers_or_calls(places)


def find_calls(paths: Mapping[nn.Module, Sequence[str]], forwards: Sequence[Forward]) -> list[Place]:
    """Find the calls of functions and layers in the forwards of one module, given the paths of all modules."""
    places: list[Place] = []
    counts: Counter[str] = Counter()
    for index, event in enumerate(forwards[0].events if forwards else ()):
        found = read_event(event)
        if found is None:
            continue
        is_function = event.called in FUNCTIONS
        aliases = () if is_function else tuple(paths.get(event.called, ()))
        name = FUNCTIONS[event.called] if is_function else aliases[0].rpartition(".")[2] if aliases else "layer"
        same = [forward.events[index] for forward in forwards if len(forward.events) == len(forwards[0].events)]
        if len(same) < len(forwards) or any(other.called is not event.called for other in same):
            found.reason = "its module does not call the same functions every time"
        # an earlier replacement has names of this form
        while hasattr(forwards[0].module, f"{name}_{counts[name]}"):
            counts[name] += 1
        full = tuple(f"{path}.{name}_{counts[name]}".lstrip(".") for path in paths[forwards[0].module])
        counts[name] += 1
        layer = None if is_function else event.called
        places.append(Place(full, found, layer, [other.shapes for other in same], forwards[0].module, index, aliases))
    return places


def read_event(event: Event) -> Resampling | None:
    """Describe the call of a function or a layer."""
    if isinstance(event.called, nn.Module):
        return read_layer(event.called)
    if event.called is not F.interpolate:
        layer = nn.MaxPool2d if event.called is F.max_pool2d else nn.AvgPool2d
        found = read_layer(layer(*event.args, **event.kwargs))
        if found is not None:
            found.name = found.name.replace(layer.__name__, FUNCTIONS[event.called])
        return found
    size, factor, mode = (
        event.args[i] if len(event.args) > i else event.kwargs.get(key, default)
        for i, (key, default) in enumerate({"size": None, "scale_factor": None, "mode": "nearest"}.items())
    )
    found = read_interpolation("interpolate", size, factor, mode)
    if found is not None:
        # the mode is of no use in a report
        found.name = found.name.removesuffix(f" {mode}")
    if found is not None and size is not None:
        # the call passes a size, which can differ from that of the example
        found.name, found.assemble = "interpolate to size", SizedSampler
    return found


def choose_layers_or_calls(places: Sequence[Place]) -> list[Place]:
    """Drop the calls of layers, except of a layer that gets several numbers of channels: it takes one sampler for each of its calls."""
    calls: dict[nn.Module | None, list[Place]] = {}
    for place in places:
        if place.owner is not None:
            calls.setdefault(place.layer, []).append(place)
    split = {
        place.layer for place in places if place.owner is None and len(place.channels) > 1 and covers(calls.get(place.layer, []), place)
    }
    return [place for place in places if (place.owner is not None) == (place.layer is None or place.layer in split)]


def covers(calls: Sequence[Place], layer: Place) -> bool:
    """Return whether calls are all those of a layer, and each gets one number of channels."""
    return all(len(call.channels) == 1 for call in calls) and sum(len(call.shapes) for call in calls) == len(layer.shapes)


def select_places(places: Sequence[Place], where: str | Sequence[str] | None, taken: Sequence[str] = ()) -> list[Place]:
    """Select the places that names or glob patterns choose, by their paths or by those of modules that contain them.

    Args:
        places: all places.
        where: patterns; None selects all places.
        taken: paths of samplers, which a pattern may also name.

    Raises:
        TypeError: `where` is neither text nor a sequence of texts.
        ValueError: a pattern matches no place; the message lists the paths of all places.
    """
    if where is None:
        return list(places)
    if not isinstance(where, Sequence):
        raise TypeError(f"where must be a name, a glob pattern or a sequence of them, got {where!r}")
    chosen = set()
    for pattern in [where] if isinstance(where, str) else where:
        if not isinstance(pattern, str):
            raise TypeError(f"where must be a name, a glob pattern or a sequence of them, got {pattern!r}")
        matching = {i for i, place in enumerate(places) if fits(pattern, [*place.paths, *place.aliases])}
        if not matching and not fits(pattern, taken):
            known = ", ".join(path for place in places for path in place.paths)
            raise ValueError(f"where={pattern!r} matches no place; the places that resample are: {known or 'none'}")
        chosen |= matching
    return [place for i, place in enumerate(places) if i in chosen]


def fits(pattern: str, paths: Sequence[str]) -> bool:
    """Return whether a pattern fits one of several paths, or a module that contains it."""
    names = {".".join(path.split(".")[:depth]) for path in paths for depth in range(1, path.count(".") + 2)}
    return any(fnmatchcase(name, pattern) for name in names)
