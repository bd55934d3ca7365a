"""The files of the configuration as `--help` and messages show them: their comments, and the choices of their groups."""

import re
from collections.abc import Mapping
from importlib.resources import files

import yaml

KEY = re.compile(r"( *)([\w.@/-]+):(?: |$)")


def read_text(name: str) -> str:
    """Read a file of conf/, such as "train" or "trainer/default"; a file that is elsewhere, such as in a folder of your own, is empty."""
    path = files("carafepp.conf").joinpath(f"{name}.yaml")
    return path.read_text() if path.is_file() else ""


def read_comments(name: str, package: str = "") -> dict[str, str]:
    """Read the comments above the keys of a file of conf/, by key ("data.epochs").

    Comments in the list of defaults belong to their group ("defaults.row") or to the key that a group fills ("ppm" for
    "/upsampler@ppm"). A blank line ends the comment at the top of a file.

    Args:
        name: see `read_text`.
        package: the key below which the values of the file are.
    """
    found, parents, lines = {}, [], []
    for line in read_text(name).splitlines():
        text = line.strip()
        if text.startswith("#"):
            lines += [text.lstrip("# ")] if not text.startswith("# @package") else []
            continue
        if text and (key := KEY.match(line.replace("- ", "  ", 1))):
            depth = len(key[1])
            parents = [(indent, parent) for indent, parent in parents if indent < depth]
            parents.append((depth, key[2]))
            path = [parent for _, parent in parents]
            if key[2].startswith("/") and "@" in key[2]:
                path = [key[2].partition("@")[2]]
            if lines:
                found[".".join([*([package] if package else []), *path])] = " ".join(lines)
        lines = []
    return found


def read_all_comments(name: str, choices: Mapping[str, str | None]) -> dict[str, str]:
    """Read the comments of a configuration by key: those of its file, and of the file of every choice of a group.

    Args:
        name: name of the file.
        choices: choices by group, "upsampler" or "upsampler@model.fpn".
    """
    comments = read_comments(name)
    for group, choice in choices.items():
        folder, _, package = group.partition("@")
        if "@package _global_" in read_text(f"{folder}/{choice}"):
            package = ""
        elif not package:
            package = folder.replace("/", ".")
        # a file that extends another of its group names it in its defaults
        extended = [entry for entry in read_defaults(f"{folder}/{choice}") if isinstance(entry, str) and entry != "_self_"]
        for file in [*extended, choice]:
            comments |= read_comments(f"{folder}/{file}", package)
    return comments


def read_defaults(name: str) -> list[str | dict[str, str]]:
    """Read the list of defaults of a file of conf/."""
    return (yaml.safe_load(read_text(name)) or {}).get("defaults", [])


def list_groups(name: str) -> list[str]:
    """List the groups in the defaults of a file of conf/, such as "upsampler"."""
    entries = [key.partition("@")[0] for entry in read_defaults(name) if isinstance(entry, dict) for key in entry]
    return [entry for entry in entries if not entry.startswith(("override ", "optional "))]


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
