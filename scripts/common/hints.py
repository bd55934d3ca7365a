"""Hints for overrides whose key does not exist."""

import difflib
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf


def find_hints(config_name: str, arguments: Sequence[str]) -> list[str]:
    """List, for each override whose key does not exist, the keys that do; return nothing if the configuration cannot be composed."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("carafepp.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = [group for group in loader.list_groups("") if group != "hydra"]
        try:
            overrides = OverridesParser.create().parse_overrides([a for a in arguments if "=" in a and a[0] not in "-+~"])
            selections = [str(o.input_line) for o in overrides if selects_group(o, groups) and not o.is_sweep_override()]
            config = hydra.compose(config_name, overrides=selections)
        except HydraException:
            return []
    values = [o for o in overrides if not selects_group(o, groups) and not o.key_or_group.startswith("hydra")]
    return [line for override in values for line in explain_key(override, config, groups)]


def selects_group(override: Override, groups: Sequence[str]) -> bool:
    """Return whether an override chooses a file of a group (`upsampler=carafe`, `upsampler@model.fpn=carafe`) instead of setting a
    value."""
    return override.key_or_group.split("@")[0] in groups


def explain_key(override: Override, config: DictConfig, groups: Sequence[str]) -> list[str]:
    """Name the first part of an override's key that is not in the configuration, and its valid alternatives."""
    key: str = override.key_or_group
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        # `part in node` would be false for a key whose mandatory value is missing
        items = range(len(node)) if isinstance(node, ListConfig) else sorted(node) if isinstance(node, DictConfig) else []
        known = {str(item): item for item in items}
        if part not in known:
            close = difflib.get_close_matches(part, [*known, *(groups if depth == 0 else [])], n=1)
            where = f"'{'.'.join(parts[:depth])}'" if depth else "the configuration"
            lines = [f"{key}: '{part}' is not in {where}" + (f"; did you mean '{close[0]}'?" if close else ".")]
            lines.append(f"  keys of {where}: {', '.join(known)}" if known else f"  {where} has no keys; add it: +{override.input_line}")
            if depth == 0:
                lines.append(f"  groups (group=choice): {', '.join(groups)}")
            return lines
        node = None if OmegaConf.is_missing(node, known[part]) else node[known[part]]
    return []
