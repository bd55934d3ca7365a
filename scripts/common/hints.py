"""Hints for overrides of keys that do not exist."""

import difflib

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf


def find_hints(config_name: str, arguments: list[str]) -> list[str]:
    """Say of each override whose key does not exist which keys do."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("carafepp.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = [group for group in loader.list_groups("") if group != "hydra"]
        try:
            overrides = OverridesParser.create().parse_overrides([a for a in arguments if "=" in a and a[0] not in "-+~"])
            chosen = [o.input_line for o in overrides if o.key_or_group.split("@")[0] in groups and not o.is_sweep_override()]
            config = hydra.compose(config_name, overrides=chosen)
        except HydraException:
            return []
    lines = []
    for override in overrides:
        key, node = override.key_or_group, config
        if key.split("@")[0] in groups or key.startswith("hydra"):
            continue
        parts = key.split(".")
        for depth, part in enumerate(parts):
            # not `part in node`, which denies a key whose mandatory value is missing
            items = range(len(node)) if isinstance(node, ListConfig) else sorted(node) if isinstance(node, DictConfig) else []
            known = {str(item): item for item in items}
            if part not in known:
                close = difflib.get_close_matches(part, [*known, *(groups if depth == 0 else [])], n=1)
                where = f"'{'.'.join(parts[:depth])}'" if depth else "the configuration"
                lines.append(f"{key}: '{part}' is not in {where}" + (f"; did you mean '{close[0]}'?" if close else "."))
                lines.append(f"  keys of {where}: {', '.join(known)}" if known else f"  {where} has none; add it: +{override.input_line}")
                if depth == 0:
                    lines.append(f"  groups (group=choice): {', '.join(groups)}")
                break
            node = None if OmegaConf.is_missing(node, known[part]) else node[known[part]]
    return lines
