"""`replace`: puts samplers where a network upsamples or downsamples."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn as nn

from .choices import Sampler, choose_samplers
from .observing import Forward, call_with, observe, undisturbed
from .places import Place, find_places, is_sampler, select_places, walk
from .planning import Plan, Unfit, make_plan, read_scale
from .refusals import check_model
from .report import Left, Report
from .rewriting import Rewriting, plan_rewriting, rewrite


@dataclass
class Target:
    """A module whose forward can be rewritten.

    Attributes:
        owner: the module.
        rewriting: how.
        numbers: the numbers of the nodes of its events.
    """

    owner: nn.Module
    rewriting: Rewriting
    numbers: dict[tuple[nn.Module, int], int]


# by module; a module that is traced together with the one around it has the target of that one
Targets = dict[nn.Module, Target]


def replace(
    model: nn.Module,
    *,
    up: Sampler | str | None = None,
    down: Sampler | str | None = None,
    where: str | Sequence[str] | None = None,
    example: Any = None,
    dry_run: bool = False,
) -> Report:
    """Put samplers where a network upsamples or downsamples. All other layers keep their weights.

    Args:
        model: any network. It is changed in place.
        up, down: the samplers for upsampling and downsampling: a callable that takes channels and returns a module, such as
            `partial(CARAFE, up=2)`, or the name of a file in `conf/upsampler` or `conf/downsampler`, such as "carafe". With None, nothing
            is replaced in this direction.
        where: the places to replace: a path in the model or a glob pattern, or several. The path of a module chooses everything below it.
        example: an input of the model: a tuple of positional arguments, a mapping of keyword arguments, or the only argument. The model
            runs once with it, in evaluation mode, and does not change. Without an example, the channels of interpolation and pooling and
            the calls of functions are unknown, and these places are not replaced.
        dry_run: whether only to report what would be replaced.

    Returns:
        The report: `print` shows it, `.model` is the network, and `.undo()` puts the original modules back.

    Raises:
        TypeError, ValueError: an argument is wrong, the model cannot be changed (see `carafepp.integrations.refusals`), or nothing can be
            replaced. The message gives the reason, and what would be right.
        RuntimeError: the network does not run with the samplers, or does not call them (see `verify`). The model is not changed.
    """
    check_model(model)
    slots = choose_samplers(up, down)
    if not slots and not dry_run:
        raise ValueError('give up=, down= or both: a callable that takes channels, or a name such as "carafe"')
    forwards = [] if example is None else observe(model, example)
    taken = [path for path, module in walk(model) if is_sampler(module)]
    places = select_places(find_places(model, forwards), where, taken)
    with undisturbed(model) if dry_run else nullcontext():
        plans, left, targets = plan_places(model, places, slots, where, forwards)
    report = Report(model, [plan.row for plan in plans], left, dry_run, make_notes(taken, example is not None))
    if not dry_run:
        if not plans and not taken:
            raise ValueError(f"nothing can be replaced.\n{report}")
        report.model, report.restore = install(model, plans, targets)
        if example is not None:
            verify(report, example, plans)
    return report


def plan_places(
    model: nn.Module, places: Sequence[Place], slots: Mapping[str, Sampler], where: str | Sequence[str] | None, forwards: Sequence[Forward]
) -> tuple[list[Plan], list[Left], Targets]:
    """Decide for every place what comes there, or why it is left, and trace the forwards that have to be rewritten."""
    plans: list[Plan] = []
    left: list[Left] = []
    targets: Targets = {}
    named = {where} if isinstance(where, str) else set(where or ())
    for place in places:
        try:
            direction, scale = read_scale(place, bool(forwards))
            if direction not in slots:
                raise Unfit(f"{direction}= is not given")
            if place.found.reads_image and not named & set(place.paths):
                raise Unfit("it reads the image, where the paper keeps the convolution; its name in where= replaces it")
            if place.owner is not None:
                trace_owner(place, forwards, targets)
            plans.append(make_plan(place, direction, scale, slots[direction], find_reference(model, place)))
        except Unfit as reason:
            left.append(Left(place.paths, place.found.name, str(reason)))
    return plans, left, targets


def trace_owner(place: Place, forwards: Sequence[Forward], targets: Targets) -> None:
    """Trace the forward in which a place is a call, unless it is traced.

    Raises:
        Unfit: torch.fx cannot trace it.
    """
    owner = place.owner
    if owner is None:
        return
    if owner not in targets:
        first, *others = (forward for forward in forwards if forward.module is owner)
        if not all(first.resembles(other) for other in others):
            raise Unfit("its module is called with different arguments")
        try:
            rewriting, numbers = plan_rewriting(first)
        except ValueError as error:
            raise Unfit(str(error)) from error
        targets.update({inner: Target(owner, rewriting, numbers) for inner, _ in numbers})
    # the sampler of a call in a module that is traced with the one around it belongs to that one
    inner = next(path for path, module in walk(targets[owner].owner) if module is owner)
    name = ".".join(filter(None, [inner, place.paths[0].rpartition(".")[2]]))
    place.paths = tuple(path.removesuffix(name) + name.replace(".", "_") for path in place.paths)


def find_reference(model: nn.Module, place: Place) -> nn.Parameter | None:
    """Return a parameter near a place: the first one of the innermost module around it that has any."""
    path = place.paths[0]
    while path:
        path = path.rpartition(".")[0]
        for parameter in model.get_submodule(path).parameters():
            if parameter.is_floating_point():
                return parameter
    return None


def install(model: nn.Module, plans: Sequence[Plan], targets: Targets) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """Put the modules of the plans in their places; return the network, and a function that puts the originals back."""
    root, undo = model, []
    samplers: dict[nn.Module, dict[int, tuple[str, nn.Module]]] = {}
    for plan in plans:
        place = plan.place
        if place.owner is not None:
            target = targets[place.owner]
            name = place.paths[0].rpartition(".")[2]
            samplers.setdefault(target.owner, {})[target.numbers[place.owner, place.index]] = name, plan.module
            continue
        for path in place.paths:
            if not path:
                root = plan.module
                continue
            parent, _, name = path.rpartition(".")
            children = model.get_submodule(parent)._modules
            undo.append(partial(children.__setitem__, name, children[name]))
            children[name] = plan.module
    undo += [rewrite(owner, targets[owner].rewriting, calls) for owner, calls in samplers.items()]

    def restore() -> nn.Module:
        for step in reversed(undo):
            step()
        return model

    return root, restore


def verify(report: Report, example: Any, plans: Sequence[Plan]) -> None:
    """Run the network with the example, and check that its samplers are called; otherwise undo all.

    Raises:
        RuntimeError: the network does not run, or calls the original of a sampler, which it must hold elsewhere, too.
    """
    called = set()
    hooks = [plan.module.register_forward_hook(lambda module, args, y: called.add(module)) for plan in plans]
    try:
        with undisturbed(report.model):
            call_with(report.model, example)
    except Exception as error:
        report.undo()
        raise RuntimeError(f"the network does not run with the samplers, and is as before: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    idle = [plan.row.path for plan in plans if plan.place.maps and plan.module not in called]
    if idle:
        report.undo()
        raise RuntimeError(
            f"the network still calls what was at {', '.join(idle)}, which it must also hold outside its modules; it is as before. "
            "Replace there by hand, or leave these places out with where="
        )


def make_notes(taken: Sequence[str], has_example: bool) -> list[str]:
    """Write the remarks on the whole."""
    notes = []
    if taken:
        notes.append(f"samplers already: {', '.join(path or 'the model' for path in taken)}")
    if not has_example:
        notes.append("without example=, calls of functions such as F.interpolate are not found, and FLOPs are not counted")
    return notes
