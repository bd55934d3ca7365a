"""The files of the configuration as `--help` and messages show them: their comments, and the choices of their groups."""

import re
from importlib.resources import files

import yaml

KEY = re.compile(r"( *)([\w.@/-]+):(?: |$)")


def read_comments(name: str) -> dict[str, str]:
    """Read the comments above the keys of a file of conf/, such as "train" or "trainer/default", by key ("data.epochs").

    Comments in the list of defaults belong to their group.
    """
    found, parents, lines = {}, [], []
    for line in files("carafepp.conf").joinpath(f"{name}.yaml").read_text().splitlines():
        text = line.strip()
        if not text:
            lines = []
        if text.startswith("#"):
            lines += [text.lstrip("# ")] if not text.startswith("# @package") else []
            continue
        entry = line.replace("- ", "  ", 1) if text.startswith("- ") else line
        if key := KEY.match(entry):
            depth = len(key[1])
            parents = [(indent, parent) for indent, parent in parents if indent < depth]
            parents.append((depth, key[2]))
            if lines:
                found[".".join(parent for _, parent in parents)] = " ".join(lines)
        lines = []
    return found


def list_groups(name: str) -> list[str]:
    """List the groups in the defaults of a file of conf/, such as "upsampler"."""
    defaults = yaml.safe_load(files("carafepp.conf").joinpath(f"{name}.yaml").read_text()).get("defaults", [])
    return [key.partition("@")[0] for entry in defaults if isinstance(entry, dict) for key in entry if not key.startswith("override ")]


def list_choices(group: str, folder: str = "") -> list[str]:
    """List the choices of a group, or those in one of its folders, with table2 before table10; the group need not exist.

    A folder with choices is listed as "table4/...".
    """
    place = files("carafepp.conf").joinpath(group, folder)
    if not place.is_dir():
        return []
    prefix = f"{folder}/" if folder else ""
    names = [prefix + path.name.removesuffix(".yaml") for path in place.iterdir() if path.name.endswith(".yaml")]
    names += [f"{path.name}/..." for path in place.iterdir() if path.is_dir() and path.name != "__pycache__"]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
