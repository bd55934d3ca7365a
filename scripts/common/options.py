"""Options that name their values: numeric types, memory formats, and the sites of the operator."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from ...kernels.geometry import Spec, check_spec

Value = TypeVar("Value")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def look_up(option: str, names: Iterable[str], choices: Mapping[str, Value]) -> list[Value]:
    """Look up the values that an option names.

    Raises:
        ValueError: a name is not among the choices.
    """
    found = []
    for name in names:
        if name not in choices:
            raise ValueError(f"{option} must be among {', '.join(choices)}, got {name!r}")
        found.append(choices[name])
    return found


def read_site(site: Mapping[str, int], **options: str) -> tuple[tuple[int, int, int, int], Spec]:
    """Return the shape N, C, H, W of the features at a site (conf/sites) and the specification of the operator there.

    Args:
        site: n, channels, height, width, and fields of the specification.
        options: further fields of the specification.

    Raises:
        ValueError: the specification is not valid.
    """
    shape = site["n"], site["channels"], site["height"], site["width"]
    fields = {name: value for name, value in site.items() if name not in ("n", "channels", "height", "width")}
    spec = Spec(**fields | options)
    check_spec(spec)
    return shape, spec
