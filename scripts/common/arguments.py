"""Arguments of a command before Hydra reads them: `~` is expanded, and a value that Hydra misreads is shown as it must be quoted."""

import os
import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

# options of Hydra that take a value
VALUED = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--package", "-p", "--info", "-i")
# groups that need no choice; each has a file none.yaml
NULLABLE = ("experiment", "logger", "row", "samplers")


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


def name_empty_choices(argument: str) -> str:
    """Replace null as the choice of a group by "none", the name of its empty file, because Hydra takes only names there.

    `~row` becomes the same: Hydra would remove the group from the configuration, and not from the sweep of an experiment.
    """
    if argument.startswith("~"):
        group = argument[1:].partition("=")[0]
        return f"{group}=none" if group in NULLABLE else argument
    group, equals, value = argument.partition("=")
    return group + equals + re.sub(r"(^|,)null(?=,|$)", r"\1none", value) if group in NULLABLE else argument


def quote(argument: str) -> str:
    """Quote the value of an override for Hydra, and the whole for the shell."""
    key, _, value = argument.partition("=")
    # in a quoted value, only backslashes before a quote are doubled
    value = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + match[2].replace('"', '\\"'), value)
    return shlex.quote(f'{key}="{value}"')


def explain_values(arguments: Sequence[str]) -> list[str]:
    """List, for each override whose value Hydra cannot read, or reads as a sweep without -m, how to write the value as it stands."""
    lines = []
    for position, argument in enumerate(arguments):
        if argument.startswith(("-", "~")) or (position and arguments[position - 1] in VALUED):
            continue
        if "=" not in argument:
            lines.append(f"{argument}: an argument is KEY=VALUE; --help lists the keys")
            continue
        override = parse_override(argument)
        key, _, value = argument.partition("=")
        if override is None:
            lines.append(f"{key}: characters of {value} have a meaning for Hydra; to give the value as it stands, write {quote(argument)}")
        elif override.is_sweep_override() and not {"-m", "--multirun"} & {*arguments}:
            lines.append(f"{key}: {value} is a sweep, which needs -m; to give the value as it stands, write {quote(argument)}")
    return lines
