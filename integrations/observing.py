"""What a forward of a network tells: the shapes at its layers, and the functions that it calls to resample."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from .layers import read_layer

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Placeholder(Enum):
    """Stands for a value among arguments."""

    TENSOR = "tensor"
    NUMBER = "number"


TENSOR, NUMBER = Placeholder.TENSOR, Placeholder.NUMBER
# arguments of these types are fixed when a forward is rewritten
CONSTANTS = (bool, int, float, str, type(None), Placeholder)

# functions that resample
FUNCTIONS: dict[Any, str] = {F.interpolate: "interpolate", F.max_pool2d: "max_pool2d", F.avg_pool2d: "avg_pool2d"}


@dataclass(frozen=True)
class Shapes:
    """Shapes of the input and the output of one call, with data type and device of the input."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def scale(self) -> tuple[float, float]:
        """Rows and columns of the output divided by those of the input."""
        return self.target[2] / self.source[2], self.target[3] / self.source[3]


@dataclass
class Event:
    """A call of a function or a layer that resamples.

    Attributes:
        called: the function, or the layer.
        args, kwargs: what the function was given beside its first argument, without tensors.
        shapes: None if the call does not take and return one map [N, C, H, W].
    """

    called: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: Shapes | None


@dataclass
class Forward:
    """One forward of a module.

    Attributes:
        module: the module.
        arguments: positional and keyword arguments, defaults included, with `TENSOR` in the place of tensors.
        steps: in order, the events directly in its forward, and the forwards of the modules that it calls.
        returns_tensor: whether its output is a tensor, and not a container.
    """

    module: nn.Module
    arguments: Arguments
    steps: list["Event | Forward"] = field(default_factory=list)
    returns_tensor: bool = True

    @property
    def events(self) -> list[Event]:
        """What resamples directly in its forward, in order."""
        return [step for step in self.steps if isinstance(step, Event)]

    def resembles(self, other: "Forward") -> bool:
        """Return whether the structure of the arguments, and the constants among them, are those of another forward."""
        (leaves, spec), (others, other_spec) = tree_flatten(self.arguments), tree_flatten(other.arguments)
        pairs = zip(leaves, others, strict=False)
        return spec == other_spec and all(not isinstance(leaf, CONSTANTS) or leaf == value for leaf, value in pairs)

    def find_containers(self) -> set[nn.Module]:
        """Return the modules that it calls and that return containers, and those that these call."""
        called = [step for step in self.steps if isinstance(step, Forward) and not step.returns_tensor]
        return {step.module for step in called}.union(*(step.find_containers() for step in called))

    def list_events(self, inlined: set[nn.Module]) -> list[tuple[nn.Module, int]]:
        """List the events of its forward and of the `inlined` modules in it, in order: each as the module and its index there."""
        events, index = [], 0
        for step in self.steps:
            if isinstance(step, Event):
                events.append((self.module, index))
                index += 1
            elif step.module in inlined:
                events += step.list_events(inlined)
        return events


def read_shapes(source: Any, target: Any) -> Shapes | None:
    """Return the shapes of a call, or None if it does not take and return one map [N, C, H, W]."""
    if not (isinstance(source, Tensor) and isinstance(target, Tensor) and source.dim() == target.dim() == 4):
        return None
    return Shapes(tuple(source.shape), tuple(target.shape), source.dtype, source.device)


class _Recorder(TorchFunctionMode):
    """Records the forwards of modules, between `enter` and `leave`, and the functions that they call."""

    def __init__(self) -> None:
        super().__init__()
        # the caller of the model comes first
        self.stack = [Forward(nn.Identity(), ((), {}))]
        self.finished = self.stack.copy()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        if func in FUNCTIONS and read_layer(self.stack[-1].module) is None:
            x = args[0] if args else kwargs.get("input")
            self.stack[-1].steps.append(Event(func, args[1:], {k: v for k, v in kwargs.items() if k != "input"}, read_shapes(x, y)))
        return y

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the start of a forward."""
        self.stack.append(Forward(module, bind_arguments(module, args, kwargs)))

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        """Note the end of a forward."""
        # forwards that an exception has left are dropped
        while (forward := self.stack.pop()).module is not module:
            pass
        forward.returns_tensor = isinstance(y, Tensor)
        self.finished.append(forward)
        x = args[0] if args else next(iter(kwargs.values()), None)
        self.stack[-1].steps.append(forward if read_layer(module) is None else Event(module, (), {}, read_shapes(x, y)))


def bind_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return all arguments of a forward, defaults included, with `TENSOR` in the place of tensors."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        # a forward of C++ has no signature
        return (), {}
    bound.apply_defaults()
    return tree_map(lambda leaf: TENSOR if isinstance(leaf, Tensor) else leaf, (bound.args, bound.kwargs))


def call_with(model: nn.Module, example: Any) -> Any:
    """Call a model: a tuple holds positional arguments, a mapping keyword arguments, and anything else is the only argument."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode and without gradients; training modes, buffers and random numbers are then as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device.index for device in devices]))
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, before in buffers:
                buffer.copy_(before)


def observe(model: nn.Module, example: Any) -> list[Forward]:
    """Run a forward with an example (see `call_with`), which leaves the model as it was, and return the forwards of all modules."""
    recorder = _Recorder()
    with undisturbed(model), ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                hooks = (
                    module.register_forward_pre_hook(recorder.enter, with_kwargs=True),
                    module.register_forward_hook(recorder.leave, with_kwargs=True),
                )
                for hook in hooks:
                    stack.callback(hook.remove)
        with recorder:
            call_with(model, example)
    return recorder.finished
