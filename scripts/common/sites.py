"""The sites of the operator in a configuration, and values that are chosen by name."""

from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.geometry import Spec, check_spec

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# the keys of a site besides the fields of the specification
SIDES = ("n", "channels", "height", "width")
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def read_site(site: Mapping[str, Any], **options: Any) -> tuple[tuple[int, int, int, int], Spec]:
    """Return the shape N, C, H, W of the features at a site (conf/sites) and the specification of the operator there.

    Args:
        site: n, channels, height, width, and fields of the specification.
        options: further fields of the specification.

    Raises:
        ValueError: a side is missing or below 1, a key is unknown, or the specification is not valid.
    """
    if wrong := [name for name in SIDES if not isinstance(site.get(name), int) or site[name] < 1]:
        raise ValueError(f"a site must have {', '.join(SIDES)} that are whole numbers of at least 1, got {wrong[0]}={site.get(wrong[0])}")
    if unknown := [name for name in site if name not in (*SIDES, *Spec._fields)]:
        raise ValueError(f"a site must have no other keys than {', '.join((*SIDES, *Spec._fields))}, got {unknown[0]}")
    shape = site["n"], site["channels"], site["height"], site["width"]
    fields: dict[str, Any] = {name: value for name, value in site.items() if name not in SIDES}
    spec = Spec(**fields | options)
    check_spec(spec)
    return shape, spec
