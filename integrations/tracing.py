"""Rewriting of a forward with torch.fx, for calls of functions that resample."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch.fx._symbolic_trace import PH
from torch.utils._pytree import tree_leaves

from .layers import read_layer
from .observing import FUNCTIONS, Forward
from .places import Place


class _ShallowTracer(torch.fx.Tracer):
    """Traces the forward of one module, and of its children only those of `inlined`."""

    def __init__(self, inlined: set[nn.Module]):
        super().__init__()
        self.inlined = inlined

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inlined


@dataclass(eq=False)
class Trace:
    """The forward of a module as a graph.

    Attributes:
        owner: the module.
        module: does the same, with the children, parameters, buffers, hooks and plain attributes of the owner, but not its methods.
        nodes: the nodes of the events, by the module and its index there (`Forward.list_events`).
    """

    owner: nn.Module
    module: torch.fx.GraphModule
    nodes: dict[tuple[nn.Module, int], torch.fx.Node]


def trace(forward: Forward) -> Trace:
    """Trace a forward of a module as it ran with the example.

    Arguments that are not tensors are fixed in the graph. Children stay as they are, except that those which return a container are traced,
    too, if the forward takes the container apart.

    Raises:
        ValueError: torch.fx cannot trace the forward, or its graph differs from the example, or between training and evaluation.
    """
    try:
        return trace_with(forward, set())
    except ValueError:
        containers = forward.find_containers()
        if not containers:
            raise
        return trace_with(forward, containers)


def trace_with(forward: Forward, inlined: set[nn.Module]) -> Trace:
    """Trace a forward together with those of the `inlined` modules; see `trace`."""
    owner, arguments = forward.module, forward.arguments
    module = trace_module(owner, arguments, inlined)
    nodes, events = find_nodes(module), forward.list_events(inlined)
    if len(nodes) != len(events):
        raise ValueError(f"torch.fx finds {len(nodes)} calls in the forward of {type(owner).__name__}, and the example {len(events)}")
    return Trace(owner, module, dict(zip(events, nodes, strict=True)))


def trace_module(owner: nn.Module, arguments: Mapping[str, Any], inlined: set[nn.Module]) -> torch.fx.GraphModule:
    """Return a module that does the same as `owner` in its forward; see `trace`."""
    fixed = {name: value for name, value in arguments.items() if value is not PH and tree_leaves(value) != []}
    before, mode = set(vars(owner)), owner.training
    traced = []
    try:
        for owner.training in (not mode, mode):
            graph = _ShallowTracer(inlined).trace(owner, concrete_args=dict(fixed) or None)
            traced.append(inherit(torch.fx.GraphModule(owner, graph, type(owner).__name__), owner))
            # the tracer keeps constants in the module
            for name in set(vars(owner)) - before:
                delattr(owner, name)
    except Exception as error:
        # anything can happen in a forward that gets proxies
        reason = re.split(r"\.\s|\n", str(error).strip())[0] or type(error).__name__
        raise ValueError(f"torch.fx cannot trace the forward of {type(owner).__name__}: {reason}") from error
    finally:
        owner.training = mode
    if traced[0].code != traced[1].code:
        raise ValueError(f"the forward of {type(owner).__name__} differs between training and evaluation, and torch.fx keeps only one")
    return traced[1]


def inherit(traced: torch.fx.GraphModule, owner: nn.Module) -> torch.fx.GraphModule:
    """Give a traced module all that its owner has, used by the graph or not, except methods."""
    for name, value in vars(owner).items():
        if name in ("_modules", "_parameters", "_buffers"):
            getattr(traced, name).clear()
            getattr(traced, name).update(value)
        elif name not in vars(traced) or "hook" in name or name == "_non_persistent_buffers_set":
            vars(traced)[name] = value
    return traced


def find_nodes(traced: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """List the nodes that resample, in the order of the forward."""
    layers = dict(traced.named_modules(remove_duplicate=False))
    return [
        node
        for node in traced.graph.nodes
        if (node.op == "call_function" and node.target in FUNCTIONS)
        or (node.op == "call_module" and read_layer(layers[node.target]) is not None)
    ]


def put_sampler(traced: Trace, place: Place, name: str, sampler: nn.Module) -> None:
    """Put a sampler in the place of a call, as the child `name` of the traced module, which must then be recompiled."""
    node = next(node for (owner, index), node in traced.nodes.items() if owner is place.owner and index == place.index)
    traced.module.add_submodule(name, sampler)
    x = node.args[0] if node.args else node.kwargs["input"]
    options: dict[str, Any] = {}
    size = node.args[1] if len(node.args) > 1 else node.kwargs.get("size")
    if node.target is F.interpolate and size is not None:
        options["size"] = (size, size) if isinstance(size, int) else size
    with traced.module.graph.inserting_before(node):
        call = traced.module.graph.call_module(name, (x,), options)
    node.replace_all_uses_with(call)
    traced.module.graph.erase_node(node)
