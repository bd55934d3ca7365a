"""Hydra applications: commands and sub-commands that read their configuration from `carafepp.conf`."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import hydra
from omegaconf import DictConfig

from .arguments import expand_home, explain_values
from .hints import find_hints


class Command(Protocol):
    """A command-line program. Its `arguments` default to those of the process."""

    def __call__(self, arguments: Sequence[str] | None = None) -> None:
        """Run the program."""


def app(
    config_name: str, *, check: Callable[[Sequence[str]], None] = lambda arguments: None
) -> Callable[[Callable[[DictConfig], None]], Command]:
    """Turn a function of the configuration `config_name` into a command; for a misspelt key, it prints the valid ones."""

    def decorate(task: Callable[[DictConfig], None]) -> Command:
        run = hydra.main(version_base="1.3", config_path="pkg://carafepp.conf", config_name=config_name)(task)

        @functools.wraps(task)
        def main(arguments: Sequence[str] | None = None) -> None:
            given = [expand_home(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
            try:
                check(given)
            except (OSError, ValueError) as error:
                sys.exit(f"{type(error).__name__}: {error}")
            try:
                with replace_arguments(given):
                    run()
            except SystemExit as stop:
                # Hydra's errors; a signal has another status
                if stop.code == 1:
                    print(*(explain_values(given) or find_hints(config_name, given)), sep="\n", file=sys.stderr)
                raise

        return main

    return decorate


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
