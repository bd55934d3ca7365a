"""Hints for overrides whose key does not exist, or whose value has the wrong type."""

import contextlib
import difflib
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .comments import list_groups, read_comments

# keys without a value that a command works without
OPTIONAL = {"resume"}
# lists that may be given as a single item
SINGLE = {"trust"}
# options of Hydra with which the command shows something and does not run
SHOWING = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc"}


def find_hints(config_name: str, arguments: Sequence[str]) -> list[str]:
    """List, for each override whose key does not exist, the keys that do; return nothing if the configuration cannot be composed."""
    config, overrides, groups = compose_defaults(config_name, arguments)
    values = [override for override in overrides if config and not selects_group(override, groups)]
    return [line for override in values for line in explain_key(override, config, list_groups(config_name))]


def find_problems(config_name: str, arguments: Sequence[str]) -> list[str]:
    """List what is wrong with the arguments before the command starts.

    These are keys at the top that need a value, values of a wrong type, groups that are given twice, and several choices of a group. The
    types of the trainer's options are not checked, because Lightning accepts several types for most of them.
    """
    if SHOWING & {*arguments}:
        return []
    config, overrides, groups = compose_defaults(config_name, arguments)
    given = [argument.lstrip("+").partition("=")[0] for argument in arguments if "=" in argument]
    missing = [key for key, value in config.items() if value == "???" and key not in {*given, *OPTIONAL}]
    lines = [f"give {' '.join(f'{key}=...' for key in missing)}"] if missing else []
    comments = read_comments(config_name)
    lines += [f"  {key}: {comments[key]}" for key in missing if key in comments]
    lines += [f"{key} is given {count} times: give it once" for key, count in Counter(given).items() if count > 1 and key in groups]
    for override in overrides:
        if selects_group(override, groups):
            lines += explain_choice(override)
        elif not override.key_or_group.startswith("trainer."):
            lines += explain_type(override, config)
    return lines


def compose_defaults(config_name: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[Override], list[str]]:
    """Compose a configuration with the groups that the arguments choose, and without the values that they set.

    Returns:
        The unresolved configuration, which is empty if it cannot be composed; the overrides without those of Hydra, and the groups of all
        commands, which are empty if the overrides cannot be read.
    """
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("carafepp.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = [group for group in loader.list_groups("") if group != "hydra"]
        try:
            overrides = OverridesParser.create().parse_overrides([a for a in arguments if "=" in a and a[0] not in "-+~"])
        except HydraException:
            return {}, [], []
        selections = [str(o.input_line) for o in overrides if selects_group(o, groups) and not o.is_sweep_override()]
        # most values that refer to others need a mandatory value, such as a folder
        plain: Any = {}
        with contextlib.suppress(HydraException, OmegaConfBaseException, ValueError):
            config = hydra.compose(config_name, overrides=[*find_search_path(arguments), *selections])
            plain = OmegaConf.to_container(config, resolve=False)
    return plain, [override for override in overrides if not override.key_or_group.startswith("hydra")], groups


def find_search_path(arguments: Sequence[str]) -> list[str]:
    """Return the override that is equal to --config-dir, if this option is among the arguments."""
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--config-dir", "-cd"):
            folder = value if equals else "".join(arguments[position + 1 : position + 2])
            return [f"hydra.searchpath=['file://{os.path.abspath(folder)}']"] if os.path.isdir(folder) else []
    return []


def selects_group(override: Override, groups: Sequence[str]) -> bool:
    """Return whether an override chooses a file of a group (`upsampler=carafe`, `upsampler@model.fpn=carafe`) instead of setting a
    value."""
    return override.key_or_group.split("@")[0] in groups


def explain_key(override: Override, config: dict[str, Any], groups: Sequence[str]) -> list[str]:
    """Name the first part of an override's key that is not in the configuration, and its valid alternatives."""
    key: str = override.key_or_group
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if refers(node):
            return []
        items = range(len(node)) if isinstance(node, list) else sorted(node) if isinstance(node, dict) else []
        known = {str(item): item for item in items}
        if part not in known:
            close = difflib.get_close_matches(part, [*known, *(groups if depth == 0 else [])], n=1)
            where = f"'{'.'.join(parts[:depth])}'" if depth else "the configuration"
            lines = [f"{key}: '{part}' is not in {where}" + (f"; did you mean '{close[0]}'?" if close else ".")]
            lines.append(f"  keys of {where}: {', '.join(known)}" if known else f"  {where} has no keys; add it: +{override.input_line}")
            if "_target_" in known:
                lines.append(f"  an option of the class that is not among them: +{override.input_line}")
            if depth == 0:
                lines.append(f"  groups (group=choice): {', '.join(sorted(groups))}")
            return lines
        node = node[known[part]]
    return []


def refers(node: Any) -> bool:
    """Return whether an unresolved value refers to another one, or is missing."""
    return isinstance(node, str) and ("${" in node or node == "???")


def explain_type(override: Override, config: dict[str, Any]) -> list[str]:
    """Say what an override must be that sets a text, or true or false, where the configuration has a number, true or false, and what one
    must be that sets a single value where it has a list.
    """
    node: Any = config
    for part in override.key_or_group.split("."):
        if not isinstance(node, dict) or part not in node:
            return []
        node = node[part]
    if override.is_sweep_override() or not isinstance(node, bool | int | float | list) or refers(given := override.value()):
        return []
    if isinstance(node, list):
        single = isinstance(given, str | bool | int | float) and override.key_or_group not in SINGLE
        told = f"{override.input_line}: {override.key_or_group} takes a list, such as {override.key_or_group}=[{given}]"
        return [told] if single else []
    wanted, wrong = ("true or false", str) if isinstance(node, bool) else ("a number", str | bool)
    line = f"{override.input_line}: {override.key_or_group} takes {wanted}, such as {str(node).lower()}"
    return [line] if isinstance(given, wrong) else []


def explain_choice(override: Override) -> list[str]:
    """Say what is wrong with a choice of a group: a list of them, or `shared` for all slots."""
    value = override.value()
    if override.key_or_group == "upsampler" and value == "shared":
        return [f"{override.input_line}: the slot upsampler@model.NAME=shared takes that of upsampler=, which cannot refer to itself"]
    if not isinstance(value, list):
        return []
    several = f"{override.key_or_group}={','.join(map(str, value))}"
    return [f"{override.input_line}: {override.key_or_group} takes one choice; -m {several} runs one after the other"]
