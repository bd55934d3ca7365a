"""Arguments of a command before Hydra reads them: `~` is expanded, and a value that Hydra misreads is shown as it must be quoted."""

import os
import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException


def parse_override(argument: str) -> Override | None:
    """Parse an override, such as `data.root=FOLDER`; return None for an option, and for an override that Hydra cannot read."""
    if argument.startswith("-"):
        return None
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def expand_home(argument: str) -> str:
    """Replace `~` at the start of an override's value, or of an item of its list, by the home folder; the shell does so for words only."""
    key, equals, value = argument.partition("=")
    home = os.path.expanduser("~")
    if argument.startswith("-") or home == "~":
        return argument
    return key + equals + re.sub(r"""(^["']?|[\[,]["']?)~(?=/|["']?$|["']?[,\]])""", lambda match: match[1] + home, value)


def quote(argument: str) -> str:
    """Quote the value of an override for Hydra, and the whole for the shell."""
    key, _, value = argument.partition("=")
    # in a quoted value, only backslashes before a quote are doubled
    value = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + match[2].replace('"', '\\"'), value)
    return shlex.quote(f'{key}="{value}"')


def explain_values(arguments: Sequence[str]) -> list[str]:
    """List, for each override whose value Hydra cannot read, or reads as a sweep without -m, how to write the value as it stands."""
    lines = []
    for argument in arguments:
        if "=" not in argument or argument.startswith("-"):
            continue
        override = parse_override(argument)
        key, _, value = argument.partition("=")
        if override is None:
            lines.append(f"{key}: characters of {value} have a meaning for Hydra; to give the value as it stands, write {quote(argument)}")
        elif override.is_sweep_override() and not {"-m", "--multirun"} & {*arguments}:
            lines.append(f"{key}: {value} is a sweep, which needs -m; to give the value as it stands, write {quote(argument)}")
    return lines
