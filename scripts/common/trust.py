"""The names that a checkpoint or a run folder may contain: its configuration is checked before anything in it is called.

A configuration names the classes to build and the functions to call. The command line may name anything. A file that other people may have
written may contain only names from the configuration of carafepp (`conf/`) and names that the command line trusts with `trust=`.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# classes that the documentation gives for the command line, and the class of the backbones in conf/backbone
DOCUMENTED = {"carafepp.models.resnet.ResNet", "carafepp.tasks.masks.Box", "carafepp.tasks.masks.MaskFiles"}
# webdataset runs the text after pipe: in a shell, and commands such as curl for other addresses
OPENS_ADDRESSES = "carafepp.tasks.shards.Shards"
# they look into the folder of a new run's data, and config.yaml has what they found
NEVER_STORED = "carafepp.tasks.own_data."
LOGGERS = "lightning.pytorch.loggers."
# paths, and settings of the service that wandb starts
LEADS_AWAY = re.compile(r"[/\\~{]|\.\.")

# a configuration of carafepp-train has some hundred values, 10 levels and 5 kB of text
MOST_BYTES, MOST_VALUES, MOST_LEVELS = 200_000, 100_000, 40


@functools.cache
def known_targets() -> frozenset[str]:
    """Return the import paths that conf/ and the documentation name, without the functions that a run calls only before it is stored."""
    named = re.compile(r"^[ -]*_target_: (\S+)", re.MULTILINE)
    found = DOCUMENTED.union(*(named.findall(file.read_text()) for file in list_yaml(files("carafepp.conf"))))
    return frozenset(name for name in found if not name.startswith(NEVER_STORED))


def list_yaml(folder: Traversable) -> Iterator[Traversable]:
    """Yield the YAML files below a folder of a package."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from list_yaml(path)
        elif path.name.endswith(".yaml"):
            yield path


def list_values(config: Any, source: str) -> list[tuple[str, Any, str]]:
    """List every value below a configuration of dictionaries and lists: its key, the value, and the `_target_` around it.

    Raises:
        ValueError: a value is not a dictionary, a list or a plain value, or there are too many values or levels.
    """
    found, left = [], [("", config, "", 0)]
    while left:
        key, value, target, level = left.pop()
        # a value to which several others refer counts each time
        if len(found) > MOST_VALUES or level > MOST_LEVELS:
            raise ValueError(f"{source} holds more than {MOST_VALUES} values or {MOST_LEVELS} levels, more than any configuration")
        if type(value) is dict:
            target = str(value.get("_target_", target))
            left += [(f"{key}.{name}".lstrip("."), child, target, level + 1) for name, child in value.items()]
        elif type(value) is list:
            left += [(f"{key}.{index}", child, target, level + 1) for index, child in enumerate(value)]
        elif not (value is None or type(value) in (str, bool, int, float)):
            raise ValueError(f"{source} holds a {type(value).__name__} at {key}; a configuration holds plain values only")
        found.append((key, value, target))
    return found


def find_foreign(config: Any, source: str = "the configuration") -> dict[str, str]:
    """Find the names in a configuration of dictionaries and lists that are not in conf/, with the key of each.

    These are import paths, schemes of addresses such as "pipe:", and loggers with options that could lead out of the run folder.

    Raises:
        ValueError: see `list_values`.
    """
    foreign = {}
    for key, value, target in list_values(config, source):
        if key.rpartition(".")[2] == "_target_":
            if str(value) not in known_targets():
                foreign[str(value)] = key
        elif type(value) is dict:
            if target.startswith(LOGGERS) and any(LEADS_AWAY.search(str(option)) for name, option in value.items() if name != "_target_"):
                foreign[target] = key
        # the overrides of a run are only its label, and are not read again
        elif isinstance(value, str) and not key.startswith("run.") and ("://" in value or (target == OPENS_ADDRESSES and ":" in value)):
            foreign |= dict.fromkeys(re.findall(r"[^\s:/]*:", value), key)
    return foreign


def is_trusted(name: str, trust: Iterable[str]) -> bool:
    """Return whether `trust` holds a name, or the module that defines its object; objects that a trusted module imports are not trusted."""
    if name in trust:
        return True
    modules = [entry for entry in trust if name.startswith(f"{entry}.")]
    home = getattr(get_object(name), "__module__", None) if modules else None
    return any(f"{home}.".startswith(f"{module}.") for module in modules)


def check_config(config: Any, trust: str | Iterable[str], source: str) -> None:
    """Refuse a stored configuration with a name that is not in conf/ and that the command line does not trust.

    Args:
        config: the configuration as dictionaries and lists.
        trust: modules, import paths and schemes of addresses, or one of these.
        source: the file, for messages.

    Raises:
        ValueError: a name is not trusted, or the configuration has interpolations; see also `list_values`.
    """
    trust = [trust] if isinstance(trust, str) else list(trust)
    if type(config) is not dict:
        raise ValueError(f"{source} holds a {type(config).__name__} as its configuration instead of a dictionary")
    for key, value, _ in list_values(config, source):
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{source} refers to something else at {key}: {value}; carafepp-train stores resolved values only")
    if foreign := {name: key for name, key in find_foreign(config, source).items() if not is_trusted(name, trust)}:
        names = ", ".join(f"{name} ({key})" for name, key in foreign.items())
        raise ValueError(
            f"{source} names {names}, and the configuration of carafepp does not. A file from elsewhere can run any code in this way. "
            f"If this is your own code, name its module: trust=my.module; several: trust=[my.module,other.module]"
        )


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read the YAML file of a configuration without aliases, into dictionaries and lists.

    Raises:
        ValueError: the file is not YAML, uses aliases, is too large, or does not hold a mapping.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any configuration ({MOST_BYTES})")
    try:
        text = path.read_text()
        level = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            # a few aliases of aliases can represent billions of values
            if isinstance(event, yaml.AliasEvent) or level > MOST_LEVELS:
                raise ValueError(f"aliases, or more than {MOST_LEVELS} levels, at line {event.start_mark.line + 1}")
            if isinstance(event, yaml.ScalarEvent) and level == 0:
                raise ValueError("it does not hold a mapping")
        config = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{path} is not a configuration of carafepp-train: {error}") from error
    if not isinstance(config, DictConfig) or not config:
        raise ValueError(f"{path} is not a configuration of carafepp-train: it does not hold a mapping")
    return cast(dict[Any, Any], OmegaConf.to_container(config))
