"""Options of a configuration: plain values, values chosen by name, and the sites of the operator."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from omegaconf import DictConfig, OmegaConf

from ...kernels.geometry import Spec, check_spec

Value = TypeVar("Value")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def read_options(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a configuration into dictionaries, lists and plain values.

    Raises:
        MissingMandatoryValue: a mandatory key has no value.
    """
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


def look_up(option: str, names: Iterable[str], choices: Mapping[str, Value]) -> list[Value]:
    """Look up the values whose names an option gives.

    Raises:
        ValueError: a name is not among the choices.
    """
    found = []
    for name in names:
        if name not in choices:
            raise ValueError(f"{option} must be among {', '.join(choices)}, got {name!r}")
        found.append(choices[name])
    return found


def read_site(site: Mapping[str, Any], **options: Any) -> tuple[tuple[int, int, int, int], Spec]:
    """Return the shape N, C, H, W of the features at a site (conf/sites) and the specification of the operator there.

    Args:
        site: n, channels, height, width, and fields of the specification.
        options: further fields of the specification.

    Raises:
        ValueError: the specification is not valid.
    """
    shape = site["n"], site["channels"], site["height"], site["width"]
    fields: dict[str, Any] = {name: value for name, value in site.items() if name not in ("n", "channels", "height", "width")}
    spec = Spec(**fields | options)
    check_spec(spec)
    return shape, spec
