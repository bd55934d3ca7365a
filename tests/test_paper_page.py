"""docs/paper.md covers every section, table and figure of the paper, and what it names exists."""

import re
from pathlib import Path

import pytest
from carafepp.scripts.common.paper import list_rows, read_paper
from configurations import CONF

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text()
TABLES = read_paper()[0]
NUMERALS = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "XIV"]


def list_cells(heading: str) -> list[list[str]]:
    """List the rows of the table below a heading."""
    text = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")][1:]


def test_every_section_table_and_figure_has_a_row():
    sections = [number for cells in list_cells("Sections") for number in re.findall(r"\d(?:\.\d)?", cells[0].partition(":")[0])]
    assert sections == ["1", "2", "3.1", "3.2", "3.3", "3.4", "4.1", "4.2", "4.3", "5.1", "5.2", "5.3", "6"]
    equations = re.findall(r"equations? (\d)(?: and (\d))?", PAGE)
    assert {number for pair in equations for number in pair if number} == {"1", "2", "3"}
    assert [cells[0] for cells in list_cells("Tables")] == NUMERALS
    figures = [number for cells in list_cells("Figures") for number in re.findall(r"\d", cells[0].partition(":")[0])]
    assert figures == list("123456789")


def test_the_command_of_a_table_is_that_of_its_experiment():
    for number, (numeral, command, *_) in enumerate(list_cells("Tables"), 1):
        assert command.startswith(f"`carafepp-train -m experiment=table{number} data.root="), numeral
        assert (CONF / "experiment" / f"table{number}.yaml").is_file()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE))))
def test_files_that_the_page_links_to_exist(link):
    assert (ROOT / "docs" / link).is_file()


def test_the_page_counts_every_row():
    counted = [cells[0] for cells in list_cells("Parameters and FLOPs")]
    rows = [f"{table}/{row}" for table in TABLES for row in dict.fromkeys(row["row"] for row in list_rows(TABLES, table))]
    assert [row for line in counted for row in line.split(", ")] == rows
