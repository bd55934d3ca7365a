"""The forward of a module as a graph of torch.fx, traced as it ran with an example."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx
import torch.nn as nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .layers import read_layer
from .observing import FUNCTIONS, Arguments, Placeholder


class ForwardTracer(torch.fx.Tracer):
    """Traces a forward with given arguments; the forwards of other modules are traced only if they are `inlined`.

    Args:
        forward: the function, which takes the module first.
        arguments: positional and keyword arguments, with placeholders for what the graph takes.
        inlined: modules.
    """

    def __init__(self, forward: Callable[..., Any], arguments: Arguments, inlined: Sequence[nn.Module] = ()):
        super().__init__()
        self.forward, self.arguments, self.inlined = forward, arguments, inlined
        self.out_spec: TreeSpec | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one node."""
        return all(m is not module for module in self.inlined)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Return a function of the module that takes the placeholders as inputs of the graph and flattens the output."""
        leaves, spec = tree_flatten(self.arguments)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Placeholder):
                leaves[i] = self.create_proxy("placeholder", f"input_{i}", (), {})
        args, kwargs = tree_unflatten(leaves, spec)

        def call(module: nn.Module) -> list[Any]:
            outputs, self.out_spec = tree_flatten(self.forward(module, *args, **kwargs))
            return outputs

        return call, [self.root]


@dataclass
class Graph:
    """A traced forward.

    Attributes:
        graph: takes the inputs among the arguments and returns a list of outputs.
        out_spec: puts the outputs into their containers.
        constants: tensors that the forward makes without its arguments, by the names that the graph uses.
    """

    graph: torch.fx.Graph
    out_spec: TreeSpec
    constants: dict[str, Any]

    def compile(self) -> Callable[..., list[Any]]:
        """Return the graph as a function of the module and the inputs."""
        code = self.graph.python_code("self")
        source = code.src
        for name in self.constants:
            source = re.sub(rf"\bself\.{name}\b", f"constant{name}", source)
        names = code.globals | {f"constant{name}": value for name, value in self.constants.items()}
        exec(compile(source, "<forward rewritten by carafepp.replace>", "exec"), names)
        return names["forward"]


def trace(owner: nn.Module, forward: Callable[..., Any], arguments: Arguments, inlined: Sequence[nn.Module]) -> Graph:
    """Trace the forward of a module.

    Args:
        owner: the module, which stays as it is.
        forward, arguments, inlined: see `ForwardTracer`.

    Raises:
        ValueError: torch.fx cannot trace the forward, or its graph differs between training and evaluation.
    """
    before, mode, name = set(vars(owner)), owner.training, type(owner).__name__
    graphs = []
    try:
        for owner.training in (not mode, mode):
            tracer = ForwardTracer(forward, arguments, inlined)
            try:
                graph = tracer.trace(owner)
            except Exception as error:
                # anything can happen in a forward that gets proxies
                reason = re.split(r"\.\s|\n", str(error).strip())[0] or type(error).__name__
                raise ValueError(f"torch.fx cannot trace the forward of {name}: {reason}") from error
            finally:
                # the tracer keeps constants in the module
                constants = {key: vars(owner).pop(key) for key in set(vars(owner)) - before}
            assert tracer.out_spec is not None
            graphs.append(Graph(graph, tracer.out_spec, constants))
    finally:
        owner.training = mode
    if str(graphs[0].graph) != str(graphs[1].graph):
        raise ValueError(f"the forward of {name} differs between training and evaluation, and torch.fx keeps only one")
    return graphs[1]


def find_events(owner: nn.Module, graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """List the nodes that resample, in the order of the forward."""
    layers = dict(owner.named_modules(remove_duplicate=False))
    return [
        node
        for node in graph.nodes
        if (node.op == "call_function" and node.target in FUNCTIONS)
        or (node.op == "call_module" and read_layer(layers[node.target]) is not None)
    ]
