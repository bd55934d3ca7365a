"""Samplers by name: those of `conf/upsampler` and `conf/downsampler`, as on the command line."""

from collections.abc import Callable
from importlib import resources
from typing import cast

import torch.nn as nn

Sampler = Callable[[int], nn.Module]

GROUPS = {"up": "upsampler", "down": "downsampler"}
# choices that name no sampler of their own
EMPTY = ("published", "shared")


def list_samplers(direction: str) -> list[str]:
    """List the names of the samplers of a direction, "up" or "down"."""
    folder = resources.files("carafepp.conf") / GROUPS[direction]
    names = (file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    return sorted(name for name in names if name not in EMPTY)


def load_sampler(direction: str, name: str) -> Sampler:
    """Load the sampler `name` of a direction, "up" or "down": a callable that takes channels and returns a module.

    Raises:
        ValueError: there is no such sampler; the message lists those that exist.
    """
    if name not in list_samplers(direction):
        raise ValueError(f"{direction} must be a callable or one of {', '.join(list_samplers(direction))}, got {name!r}")
    import hydra
    from omegaconf import OmegaConf

    text = (resources.files("carafepp.conf") / GROUPS[direction] / f"{name}.yaml").read_text()
    return cast(Sampler, hydra.utils.instantiate(OmegaConf.create(text)))


def choose_samplers(up: Sampler | str | None, down: Sampler | str | None) -> dict[str, Sampler]:
    """Return the samplers of the directions that have one.

    Raises:
        TypeError: a choice is neither a callable nor a name.
        ValueError: there is no sampler of this name, or it needs the finer map as its guide.
    """
    slots = {}
    for direction, choice in (("up", up), ("down", down)):
        if choice is None:
            continue
        slot = load_sampler(direction, choice) if isinstance(choice, str) else choice
        if not callable(slot) or isinstance(slot, nn.Module):
            raise TypeError(f"{direction} must be a callable that takes channels, or a name, got {type(slot).__name__}")
        if needs_guide(slot):
            raise ValueError(explain_guide(direction, choice))
        slots[direction] = slot
    return slots


def needs_guide(slot: Sampler | nn.Module) -> bool:
    """Return whether a sampler, or those of a slot, are guided."""
    # a partial hides its class in .func
    return getattr(getattr(slot, "func", slot), "needs_guide", False)


def explain_guide(direction: str, choice: object) -> str:
    """Say what to choose instead of a guided sampler."""
    free = (name for name in list_samplers(direction) if not needs_guide(load_sampler(direction, name)))
    return (
        f"{direction}={choice!r} needs the finer map as its guide, and a layer of another network gets only one map; "
        f"samplers without a guide: {', '.join(free)}"
    )
