"""Hydra applications: commands and sub-commands that read their configuration from `carafepp.conf`."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from .arguments import expand_home, name_empty_choices
from .bounds import check_bounds
from .device import check_device
from .failures import describe_failure, record_stack
from .help import format_help
from .hints import find_problems
from .own_code import admit_own_code

# Hydra raises an exception if this variable is 1, and otherwise prints it and exits
FULL_ERROR = "HYDRA_FULL_ERROR"


class Command(Protocol):
    """A command-line program. Its `arguments` default to those of the process."""

    def __call__(self, arguments: Sequence[str] | None = None) -> None:
        """Run the program."""


def app(
    config_name: str, *, check: Callable[[Sequence[str]], None] = lambda arguments: None
) -> Callable[[Callable[[DictConfig], None]], Command]:
    """Turn a function of the configuration `config_name` into a command.

    A failure ends the command with exit status 1 and one message: what is wrong, where, and what to do. The stack is in error.txt in the
    run folder; with HYDRA_FULL_ERROR=1, the exception is raised.

    Args:
        config_name: name of the file in conf/.
        check: a function of the arguments that raises an OSError or ValueError before Hydra creates a folder.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Command:
        @functools.wraps(task)
        def main(arguments: Sequence[str] | None = None) -> None:
            given = [name_empty_choices(expand_home(a)) for a in (sys.argv[1:] if arguments is None else arguments)]
            raises = os.environ.get(FULL_ERROR) == "1"
            job = make_job(task, config_name, given, raises)
            run = hydra.main(version_base="1.3", config_path="pkg://carafepp.conf", config_name=config_name)(job)
            try:
                if {"--help", "-h"} & {*given}:
                    print(format_help(config_name, given))
                    return
                check(given)
                if problems := find_problems(config_name, given):
                    raise ValueError("\n".join(problems))
                with replace_arguments(given), full_errors(True):
                    run()
            except Exception as error:
                if raises:
                    raise
                raise SystemExit(describe_failure(error, config_name, given)) from error

        return main

    return decorate


def make_job(task: Callable[[DictConfig], None], config_name: str, given: Sequence[str], raises: bool) -> Callable[[DictConfig], None]:
    """Return the function that Hydra runs: checks of the configuration and the task, whose exceptions are recorded in error.txt.

    A launcher may run it in another process, which inherits the variable that `main` has set.
    """

    @functools.wraps(task)
    def job(cfg: DictConfig) -> None:
        try:
            with full_errors(raises):
                check_bounds(cfg)
                if "device" in cfg:
                    check_device(cfg.device)
                admit_own_code(cfg)
                task(cfg)
        except Exception as error:
            record = record_stack(error, Path(HydraConfig.get().runtime.output_dir))
            # a sweep goes on with its other jobs
            if raises or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            raise SystemExit(f"{describe_failure(error, config_name, given)}\nstack: {record or f'{FULL_ERROR}=1 shows it'}") from error

    return job


@contextlib.contextmanager
def full_errors(wanted: bool) -> Iterator[None]:
    """Set whether Hydra raises exceptions, and restore this at the end."""
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = str(int(wanted))
    try:
        yield
    finally:
        if before is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = before


def dispatch(default: Command, **subcommands: Command) -> Command:
    """Return a command that runs the sub-command named by its first argument, or `default` if the first argument names none."""

    def main(arguments: Sequence[str] | None = None) -> None:
        given = list(sys.argv[1:] if arguments is None else arguments)
        if given and given[0] in subcommands:
            subcommands[given[0]](given[1:])
        else:
            default(given)

    return main


@contextlib.contextmanager
def replace_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Replace the arguments of the process, the only place that Hydra reads them from, and restore them at the end."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before
