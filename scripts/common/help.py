"""The answer to `--help`: what a command does, the choices of its groups, and its keys with their values and comments."""

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from .comments import list_choices, list_groups, read_all_comments, read_text
from .hints import find_search_path

# columns of the keys, and of a value that is not cut
KEYS, LONGEST = 34, 60
FOOTER = """\
KEY=VALUE sets a value, +KEY=VALUE adds one, and -m runs every combination of values that commas separate. --cfg job prints the whole
configuration with these choices, and --config-dir FOLDER adds your own files of groups."""


def format_help(config_name: str, arguments: Sequence[str]) -> str:
    """Describe a command with the choices of its arguments.

    Raises:
        HydraException, OmegaConfBaseException: the configuration cannot be composed with these arguments.
    """
    width = shutil.get_terminal_size((120, 24)).columns
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("carafepp.conf", version_base="1.3"):
        config = hydra.compose(config_name, overrides=[*find_search_path(arguments), *overrides], return_hydra_config=True)
    plain: Any = OmegaConf.to_container(config, resolve=False)
    choices = plain["hydra"]["runtime"]["choices"]
    told = plain.pop("hydra")["help"]["template"].partition("$")[0].strip()
    comments = read_all_comments(config_name, choices)
    # the help of Hydra itself says nothing about the command
    if "_target_" in told or told.startswith("${") or not told:
        told = read_header(config_name)
    own = yaml.safe_load(read_text(config_name))
    groups = {group: listed for group in list_groups(config_name) if len(listed := list_choices(group)) > 1}
    lines = [
        format_entry(f"{group}={choices.get(group) or 'null'}", [comments.get(f"defaults.{group}", ""), ", ".join(listed)], width)
        for group, listed in groups.items()
    ]
    # the command's own keys come before those of its groups
    ordered = dict(sorted(plain.items(), key=lambda item: item[0] not in own))
    keys = [format_entry(f"{key}={value}", [comments.get(key, "")], width) for key, value in list_keys(ordered) if is_worth(value)]
    chosen = ["groups, what they choose, and their choices:", *lines, ""] if lines else []
    return "\n".join(
        [told, "", *chosen, "keys, their values and what they mean:", *keys, "", textwrap.fill(" ".join(FOOTER.split()), width)]
    )


def read_header(config_name: str) -> str:
    """Read the comment at the top of a configuration's file."""
    lines = read_text(config_name).splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.lstrip("# ") for line in lines[:end])


def is_worth(value: str) -> bool:
    """Return whether a value is shown: not a reference to another key, which connects two groups, and not an empty group."""
    return value != "{}" and not re.fullmatch(r"\$\{\w+(\.\w+)*\}", value)


def list_keys(node: dict[str, Any], key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys of an unresolved configuration with their values as text; what is below the second level is one entry."""
    for name, value in node.items():
        path = f"{key}.{name}".lstrip(".")
        if name in ("_target_", "_partial_"):
            continue
        if isinstance(value, dict) and value and not key:
            yield from list_keys(value, path)
        else:
            yield path, format_value(value)


def format_value(value: Any) -> str:
    """Format a value as on the command line; a long list, and the options of something that is built, are cut."""
    if isinstance(value, dict) and value:
        if "_target_" not in value:
            return f"{{{', '.join(f'{key}: {format_value(item)}' for key, item in value.items())}}}"
        return f"{value['_target_'].rpartition('.')[2]}({', '.join(key for key in value if key[0] != '_')})"
    if isinstance(value, list):
        texts = [format_value(item) for item in value]
        whole = f"[{','.join(texts)}]"
        return whole if len(whole) <= LONGEST else f"[{','.join(texts[:3])},...] ({len(texts)} values)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "..." if value == "???" else str(value)


def format_entry(entry: str, texts: Sequence[str], width: int) -> str:
    """Format an entry of the left column, and texts in the right one; each text starts a line, below the entry if that is too long."""
    first = f"  {entry}"
    room = max(width - KEYS, 30)
    lines = [line for text in texts for line in textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)]
    if lines and len(first) < KEYS:
        first = first.ljust(KEYS) + lines.pop(0)
    return "\n".join([first, *(" " * KEYS + line for line in lines)])
