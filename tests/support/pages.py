"""Code blocks and commands of the documentation, for tests that run a page as it is printed."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# languages of blocks whose lines are commands
SHELL = ("", "sh", "bash")
# programs whose commands may stand in a sentence
INLINE = re.compile(r"(?:[A-Z_]+=\S+ )?(?:carafepp-(?:train|eval|predict|export|report|validate|scenes|bench|tune|inspect)|pip|make) [^.]")


@dataclass(frozen=True)
class Command:
    """A command as a page prints it.

    Attributes:
        page: path of the page below the root of the repository.
        words: program and arguments, as a shell splits them, without variables of the environment before them.
        comment: the comment behind the command, or on the lines above it; for a command in a sentence, its paragraph.
    """

    page: str
    words: tuple[str, ...]
    comment: str = ""

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def list_pages() -> list[Path]:
    """List the pages of the repository."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("api/*.md"))]


def find_blocks(text: str) -> list[tuple[str, str]]:
    """Return language and content of the code blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def read_blocks(page: str, language: str = "") -> list[str]:
    """Return the code blocks of a page in docs/ that have this language after their fence."""
    return [content for found, content in find_blocks((DOCS / page).read_text()) if found == language]


def read_commands(page: str) -> list[list[str]]:
    """Return the `carafepp-` commands in the blocks without a language, as words: the name, such as "train", and the arguments."""
    words = [command.words for block in read_blocks(page) for command in split_block(page, block)]
    return [[name.removeprefix("carafepp-"), *arguments] for name, *arguments in words if name.startswith("carafepp-")]


def list_printed_commands() -> list[Command]:
    """List the commands in the shell blocks of all pages, and those with arguments in their sentences and tables, each once."""
    found = [command for path in list_pages() for command in read_printed_commands(path)]
    return list({str(command): command for command in found}.values())


def read_printed_commands(path: Path) -> Iterator[Command]:
    """Yield the commands of a page."""
    page, text = str(path.relative_to(ROOT)), path.read_text()
    for language, content in find_blocks(text):
        if language in SHELL:
            yield from split_block(page, content)
    for paragraph in re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).split("\n\n"):
        for code in re.findall(r"`([^`]+)`", paragraph):
            # three dots stand for any arguments
            if INLINE.match(code) and "..." not in code:
                yield from (replace(command, comment=paragraph) for command in split_block(page, code.replace("\n", " ")))


def split_block(page: str, content: str) -> Iterator[Command]:
    """Yield the commands of a block of lines."""
    above: list[str] = []
    for line in content.replace("\\\n", " ").splitlines():
        if line.startswith("#"):
            above.append(line.strip("# "))
            continue
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        if words:
            yield Command(page, tuple(words), " ".join([*above, *line.partition("  #")[2:]]).strip())
        above = []
