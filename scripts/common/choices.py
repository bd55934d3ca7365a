"""Options whose values are looked up by name."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

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
