"""Failures of a command: one message says what is wrong, where, and what to do, and error.txt holds the stack."""

import contextlib
import difflib
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from .arguments import explain_values
from .comments import list_choices
from .hints import find_hints
from .run_folders import shorten_path

# longer messages, such as torch's about every tensor that does not fit, are cut; error.txt has the rest
MOST_LINES = 8
# groups whose choices are samplers
SLOTS = ("upsampler", "downsampler")


def describe_failure(error: Exception, config_name: str, arguments: Sequence[str]) -> str:
    """Say in a few lines why a command with these arguments failed."""
    composing = isinstance(error, HydraException | OmegaConfBaseException) and not isinstance(error, InstantiationException)
    if composing and (lines := explain_values(arguments)):
        return "\n".join(lines)
    # one misspelt choice or key is what the others follow from
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return describe_choice(error, arguments)
    if composing and (lines := find_hints(config_name, arguments)):
        return "\n".join(lines)
    # OmegaConf does not always know the key
    unresolved = [argument for argument in arguments if "${" in argument] if isinstance(error, OmegaConfBaseException) else []
    return shorten(": ".join([*unresolved, describe_error(error)])) + locate_own_line(error)


def describe_choice(error: MissingConfigException, arguments: Sequence[str] = ()) -> str:
    """Name the choices of a group for which a choice was given that does not exist; rows are those of a given experiment."""
    path = str(error.missing_cfg_file).removesuffix(".yaml")
    # Hydra's own groups are in folders, and rows are in a folder for each table
    group, _, name = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
    if not name:
        return f"there is no configuration {path}"
    experiments = [argument.partition("=")[2] for argument in arguments if argument.startswith("experiment=")]
    folder = name.rpartition("/")[0] or (experiments[-1] if group == "row" and experiments else "")
    options = list_choices(group, folder) or list_choices(group) or list(error.options or [])
    close = difflib.get_close_matches(name if "/" in name or not folder else f"{folder}/{name}", options, n=1)
    own = group in SLOTS and "." in name
    lines = [f"{group}={name} does not exist" + (f"; did you mean '{close[0]}'?" if close and not own else "")]
    lines += [f"  choices: {', '.join(options)}"] if options else []
    return "\n".join([*lines, *([f"  a class of your own: {group}._target_={name}"] if own else [])])


def describe_error(error: BaseException) -> str:
    """Describe an exception: the key that it is about, its type unless this is ValueError, and its message."""
    if isinstance(error, InstantiationException):
        return describe_instantiation(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=... is missing"
    if isinstance(error, OmegaConfBaseException):
        # the message goes on with lines about the object
        key = f"{error.full_key}: " if error.full_key else ""
        return key + str(error).partition("\n")[0]
    if isinstance(error, HydraException):
        return str(error).partition("\nSee https://")[0]
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return name + (str(error).strip() or "without a message")


def describe_instantiation(error: InstantiationException) -> str:
    """Describe what a class or function raised that the configuration names, with the key of the configuration."""
    text = str(error)
    key = re.search(r"full_key: (\S+)", text)
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    told = text.partition("\n")[0] if cause is error else describe_error(cause)
    target = re.search(r"target '([^']+)'", text)
    if isinstance(cause, ImportError | AttributeError) and target and "locating" in text:
        told = describe_import(cause, target[1])
        return f"{key[1]}._target_: {told}" if key else told
    return f"{key[1]}: {told}" if key else told


def describe_import(cause: ImportError | AttributeError, target: str) -> str:
    """Say why a class or function cannot be imported: its module lacks it, is not found, or fails itself."""
    path, _, name = target.rpartition(".")
    module = sys.modules.get(path)
    if module is not None and not hasattr(module, name):
        close = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=1)
        return f"{path} has no {name}" + (f"; did you mean '{close[0]}'?" if close else "")
    told = f"{target} cannot be imported ({describe_error(cause)})"
    if isinstance(cause, ModuleNotFoundError) and cause.name == target.partition(".")[0]:
        told += "; your own module belongs in the folder of the command, or on PYTHONPATH"
    return told


def locate_own_line(error: BaseException) -> str:
    """Name the last line of the user's own code that an exception or its causes passed through, such as " (my_module.py, line 7)".

    Own code is in the working folder, and not in a package that is installed there. Empty if there is no such line.
    """
    folder, found = Path.cwd(), ""
    cause: BaseException | None = error
    while cause is not None:
        for frame, line in traceback.walk_tb(cause.__traceback__):
            path, module = Path(frame.f_code.co_filename), frame.f_globals.get("__name__", "")
            if path.is_relative_to(folder) and "site-packages" not in path.parts and not module.startswith("carafepp."):
                found = f" ({path.relative_to(folder)}, line {line})"
        cause = cause.__cause__
    return found


def shorten(text: str) -> str:
    """Keep the first lines of a message that is too long, and the last."""
    lines = text.splitlines()
    return "\n".join(lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 2], "...", lines[-1]])


def record_stack(error: Exception, folder: Path) -> Path | None:
    """Write an exception to error.txt in the folder of a command, unless a run is in this folder; return the file that holds it, if any.

    A run in the folder records its own failures. The working directory is not a folder of the command.
    """
    record = folder / "error.txt"
    if not (folder / "config.yaml").exists() and not record.exists() and folder.resolve() != Path.cwd():
        with contextlib.suppress(OSError):
            record.write_text("".join([f"{type(error).__name__}: {' '.join(str(error).split())}\n\n", *traceback.format_exception(error)]))
    with contextlib.suppress(OSError):
        if record.read_text().startswith(type(error).__name__):
            return shorten_path(record)
    return None
