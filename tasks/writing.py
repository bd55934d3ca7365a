"""Writing of files in a run folder: a reader finds the earlier file or the whole new one, even after a kill or on a full disk."""

import contextlib
import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

# how the names of files end that are still being written
PARTIAL = ".partial"


@contextlib.contextmanager
def replace_file(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[Any]:
    """Open a text or binary file for writing under a temporary name in the same folder, and rename it to `path` at the end.

    Raises:
        OSError: the file cannot be written. The message names it, and an earlier file at `path` stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(temporary, mode) as file:
            yield file
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # a full disk shows in a write, whose error names no file
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed process left of files that it was writing in a folder."""
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file with `replace_file`."""
    with replace_file(path) as file:
        file.write(text)


def neutralize_formula(value: Any) -> Any:
    """Put an apostrophe before a text that a spreadsheet would run as a formula; numbers stay, also those written as text."""
    if not isinstance(value, str):
        return value
    # csv writes a carriage return without quotation marks, and a reader takes it for the end of the row
    text = value.replace("\r", " ")
    try:
        float(text)
    except ValueError:
        return f"'{text}" if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text
    return value


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows with `write_atomically`, with every column that any row has; a value that is None or missing is empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    table.writeheader()
    table.writerows({name: neutralize_formula(value) for name, value in row.items()} for row in rows)
    write_atomically(path, text.getvalue())
