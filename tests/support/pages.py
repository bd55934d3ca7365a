"""Code blocks of the documentation, for tests that run a page as it is printed."""

import re
import shlex
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def read_blocks(page: str, language: str = "") -> list[str]:
    """Return the code blocks of a page in docs/ that have this language after their fence."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    return [text for found, text in blocks if found == language]


def read_commands(page: str) -> list[list[str]]:
    """Return the `carafepp-` commands in the blocks without a language, as words: the name, such as "train", and the arguments."""
    lines = "".join(read_blocks(page)).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("carafepp-")]
    return [[name.removeprefix("carafepp-"), *arguments] for name, *arguments in words]
