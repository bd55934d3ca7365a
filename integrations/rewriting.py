"""Modules whose forward calls samplers instead of functions.

Only the forward changes: the module is the same object, its class gets a subclass of the same name with another forward, and the samplers
become its children. A copy or a pickle traces the original forward again.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .observing import CONSTANTS, NUMBER, Arguments, Forward, Placeholder
from .tracing import Graph, find_events, trace

# the attribute of a rewritten module that holds its rewriting
ATTRIBUTE = "carafepp_rewriting"


@dataclass
class Rewriting:
    """How the forward of a module is rewritten. It is a part of the module's state.

    Attributes:
        arguments: positional and keyword arguments of the example, with placeholders for the inputs of the graph: tensors, and integers
            where the forward can be traced for any.
        inlined: paths of the children that are traced together with the module.
        swaps: samplers by the number of the node that they replace in the graph of the original forward: names of children.
    """

    arguments: Arguments
    inlined: tuple[str, ...]
    swaps: dict[int, str]


def read_base(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, without rewritings."""
    return type(module).__mro__[1] if ATTRIBUTE in vars(module) else type(module)


def plan_rewriting(forward: Forward) -> tuple[Rewriting, dict[tuple[nn.Module, int], int]]:
    """Trace a forward as it ran with the example.

    Children stay as they are, except that those which return containers are traced, too, if the forward takes the containers apart.
    Integers among the arguments, such as the size of another map, are inputs of the graph where torch.fx can trace the forward for any.

    Returns:
        The rewriting, still without new samplers, and the numbers of the nodes of the events (`Forward.list_events`).

    Raises:
        ValueError: torch.fx cannot trace the forward, or its graph differs from the example, or between training and evaluation.
    """
    owner = forward.module
    earlier = vars(owner).get(ATTRIBUTE)
    if earlier is not None:
        return earlier, number_events(owner, earlier, forward)
    if "forward" in vars(owner):
        raise ValueError(f"the forward of {type(owner).__name__} is patched")
    containers = forward.find_containers()
    paths = tuple(path for path, module in owner.named_modules() if module in containers)
    ways = [(arguments, inlined) for inlined in ((), paths) for arguments in (free_integers(forward.arguments), forward.arguments)]
    failure = ValueError()
    for arguments, inlined in ways:
        rewriting = Rewriting(arguments, inlined, {})
        try:
            return rewriting, number_events(owner, rewriting, forward)
        except ValueError as error:
            failure = error
    raise failure


def free_integers(arguments: Arguments) -> Arguments:
    """Put placeholders in the place of integers."""
    return tree_map(lambda leaf: NUMBER if type(leaf) is int else leaf, arguments)


def number_events(owner: nn.Module, rewriting: Rewriting, forward: Forward) -> dict[tuple[nn.Module, int], int]:
    """Return the number, in the graph of the original forward, of the node of each event of a forward.

    Raises:
        ValueError: see `plan_rewriting`.
    """
    graph, numbers = trace_rewritten(owner, rewriting)
    nodes = find_events(owner, graph.graph)
    events = forward.list_events({owner.get_submodule(path) for path in rewriting.inlined})
    if len(nodes) != len(events):
        raise ValueError(f"torch.fx finds {len(nodes)} calls in the forward of {type(owner).__name__}, and the example {len(events)}")
    for node in nodes:
        check_options(node)
    return {event: numbers[node] for event, node in zip(events, nodes, strict=True)}


def trace_rewritten(owner: nn.Module, rewriting: Rewriting) -> tuple[Graph, dict[torch.fx.Node, int]]:
    """Trace the original forward of a module and put the samplers into its graph.

    Returns:
        The graph, and the numbers that its nodes had in the original.

    Raises:
        ValueError: see `trace`.
    """
    inlined = [owner.get_submodule(path) for path in rewriting.inlined]
    traced = trace(owner, read_base(owner).forward, rewriting.arguments, inlined)
    numbers = {node: number for number, node in enumerate(traced.graph.nodes)}
    for node, number in list(numbers.items()):
        if number in rewriting.swaps:
            swap_node(traced.graph, node, rewriting.swaps[number])
    return traced, numbers


def read_node(node: torch.fx.Node) -> tuple[Any, Any]:
    """Return the input of a node that resamples, and the size to which it interpolates, if it is given one."""
    x = node.args[0] if node.args else node.kwargs["input"]
    size = node.args[1] if len(node.args) > 1 else node.kwargs.get("size")
    return x, size if node.target is F.interpolate else None


def check_options(node: torch.fx.Node) -> None:
    """Check that a call of a function gets nothing from the graph that its sampler could not take, such as a factor.

    Raises:
        ValueError: the call gets such an argument.
    """
    taken: list[torch.fx.Node] = []
    map_arg(read_node(node), taken.append)
    if node.op == "call_function" and set(node.all_input_nodes) - set(taken):
        raise ValueError(f"the call of {node.name} gets options that the forward computes")


def swap_node(graph: torch.fx.Graph, node: torch.fx.Node, name: str) -> None:
    """Replace the node of a function or layer by a call of the child `name`."""
    x, size = read_node(node)
    options = {} if size is None else {"size": size}
    with graph.inserting_before(node):
        call = graph.call_module(name, (x,), options)
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def rewrite(owner: nn.Module, rewriting: Rewriting, samplers: dict[int, tuple[str, nn.Module]]) -> Callable[[], None]:
    """Let the forward of a module call samplers.

    Args:
        owner: the module, which is changed.
        rewriting: of `plan_rewriting`.
        samplers: their names as children of the module, and the samplers, by the numbers of the nodes that they replace.

    Returns:
        A function that gives the module back its forward.
    """
    earlier, cls = vars(owner).get(ATTRIBUTE), type(owner)

    def undo() -> None:
        owner.__class__ = cls
        for name, _ in samplers.values():
            del owner._modules[name]
        if earlier is None:
            del vars(owner)[ATTRIBUTE]
        else:
            vars(owner)[ATTRIBUTE] = earlier

    base = read_base(owner)
    for name, sampler in samplers.values():
        owner.add_module(name, sampler)
    swaps = {number: name for number, (name, _) in samplers.items()}
    vars(owner)[ATTRIBUTE] = dataclasses.replace(rewriting, swaps=rewriting.swaps | swaps)
    owner.__class__ = derive_class(base)
    define_forward(owner)
    return undo


def derive_class(base: type[nn.Module]) -> type[nn.Module]:
    """Derive a class for one rewritten module, whose forward `define_forward` adds."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return restore, (base,), self.__getstate__()  # pyright: ignore[reportAttributeAccessIssue]

    def set_state(self: nn.Module, state: Any) -> None:
        base.__setstate__(self, state)
        define_forward(self)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**names, "__reduce_ex__": reduce, "__setstate__": set_state})


def restore(base: type[nn.Module]) -> nn.Module:
    """Make an empty rewritten module, whose state is set next: the first step of a copy or of unpickling."""
    cls = derive_class(base)
    return cls.__new__(cls)


def define_forward(module: nn.Module) -> None:
    """Define the forward of a rewritten module in its class."""
    rewriting: Rewriting = vars(module)[ATTRIBUTE]
    base = read_base(module)
    traced, _ = trace_rewritten(module, rewriting)
    run, out_spec = traced.compile(), traced.out_spec
    fixed, spec = tree_flatten(rewriting.arguments)
    name = base.__name__

    def call(self: nn.Module, given: Arguments) -> Any:
        leaves, found = tree_flatten(given)
        if found != spec:
            raise ValueError(f"the forward of {name} was rewritten for arguments of this structure: {rewriting.arguments}")
        inputs = []
        for leaf, constant in zip(leaves, fixed, strict=True):
            if isinstance(constant, Placeholder):
                inputs.append(leaf)
            # a tracer passes a proxy for a default
            elif isinstance(constant, CONSTANTS) and not isinstance(leaf, torch.fx.Proxy) and leaf != constant:
                raise ValueError(f"the forward of {name} was rewritten for the argument {constant!r}, got {leaf!r}")
        return tree_unflatten(run(self, *inputs), out_spec)

    forward = give_signature(call, inspect.signature(base.forward.__get__(module)))
    forward.__doc__, forward.__module__, forward.__qualname__ = base.forward.__doc__, base.__module__, f"{base.__qualname__}.forward"
    type(module).forward = forward


def give_signature(call: Callable[[nn.Module, Arguments], Any], signature: inspect.Signature) -> Any:
    """Return a method with a signature, without annotations, that passes the module and all arguments to `call`.

    torch.fx and others read the signature from the code of a function, so that `*args` would not do.
    """
    empty, kinds = inspect.Parameter.empty, inspect.Parameter
    parameters = list(signature.parameters.values())
    bare = [parameter.replace(default=empty, annotation=empty) for parameter in parameters]
    positional, keywords = [], []
    for parameter in bare:
        if parameter.kind == kinds.VAR_POSITIONAL:
            positional.append(f"*{parameter.name}, ")
        elif parameter.kind == kinds.VAR_KEYWORD:
            keywords.append(f"**{parameter.name}")
        elif parameter.kind == kinds.KEYWORD_ONLY:
            keywords.append(f"{parameter.name!r}: {parameter.name}")
        else:
            positional.append(f"{parameter.name}, ")
    first_kind = kinds.POSITIONAL_ONLY if bare and bare[0].kind == kinds.POSITIONAL_ONLY else kinds.POSITIONAL_OR_KEYWORD
    head = inspect.Signature([inspect.Parameter("self", first_kind), *bare])
    names: dict[str, Any] = {"call_rewritten": call}
    exec(f"def forward{head}: return call_rewritten(self, (({''.join(positional)}), {{{', '.join(keywords)}}}))", names)
    forward = names["forward"]
    optional = [parameter for parameter in parameters if parameter.default is not empty]
    forward.__defaults__ = tuple(parameter.default for parameter in optional if parameter.kind != kinds.KEYWORD_ONLY) or None
    forward.__kwdefaults__ = {parameter.name: parameter.default for parameter in optional if parameter.kind == kinds.KEYWORD_ONLY} or None
    return forward
