"""Options of a configuration: plain values, and values chosen by name."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf

Value = TypeVar("Value")


def read_options(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a configuration into dictionaries, lists and plain values.

    Raises:
        MissingMandatoryValue: a mandatory key has no value.
    """
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


def look_up(option: str, names: Iterable[str], choices: Mapping[str, Value]) -> list[Value]:
    """Look up the values whose names an option gives.

    Raises:
        ValueError: there is no name, a single name is given instead of a list, or a name is not among the choices.
    """
    if isinstance(names, str) or not [*names]:
        raise ValueError(f"{option} must be a list of one or more of {', '.join(choices)}, got {names}")
    found = []
    for name in names:
        if name not in choices:
            raise ValueError(f"{option} must be among {', '.join(choices)}, got {name!r}")
        found.append(choices[name])
    return found
