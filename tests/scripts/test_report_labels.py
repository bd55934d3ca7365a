"""Texts in runs that come from elsewhere are only text in reports: no formula, HTML, link, control character or mathematics."""

import csv
import re

import pytest
from carafepp.scripts.reporting import render_csv
from carafepp.tasks.writing import write_csv
from commands import call
from report_runs import make_tables, write_run

FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1"]


@pytest.mark.parametrize("text", [*FORMULAS, "-", "+a", "-0.3 x"])
def test_a_cell_is_not_a_formula(tmp_path, text):
    write_csv(tmp_path / "table.csv", [{"class": text, "AP": -0.3}])
    (row,) = csv.DictReader((tmp_path / "table.csv").open(newline=""))
    assert row == {"class": f"'{text}".replace("\r", " "), "AP": "-0.3"}
    for seed, value in enumerate((text.strip(), "b")):
        write_run(tmp_path / f"{seed}", 0, {"val/a": 0.5 - seed}, f"x={value}", f"y={value}")
    lines = render_csv(make_tables(tmp_path))
    assert not re.search(r"(^|,)\"?[=@\t\r]", lines, re.MULTILINE)


def test_numbers_stay_numbers(tmp_path):
    values = [-0.3, "-0.3", "+1e-5", "-inf", 4, "0", None, "a=b", "a-b"]
    write_csv(tmp_path / "table.csv", [{"a": value} for value in values])
    assert [row["a"] for row in csv.DictReader((tmp_path / "table.csv").open())] == ["" if v is None else str(v) for v in values]


HOSTILE = [
    "$",
    "$$",
    "$\\frac{$",
    "\\",
    "<script>alert(1)</script>",
    "![a](http://host/a.png)",
    "[a](javascript:b)",
    "a|b",
    "\x1b[2J",
    "\x00",
]
HOSTILE += ["a\nb", "\u202ea", "\ud800", "\x9b31m", "a" * 20_000, "{}", "%s %(a)s", "_^&#~"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_labels_are_only_text(tmp_path, capsys, text):
    for seed, value in enumerate((text, "b")):
        write_run(tmp_path / f"{seed}", 0, {"val/a": 0.5 - seed, f"val/{text}": 0.1}, f"x={value}", f"{text}={value}")
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "error.txt").write_text(text, errors="replace")
    call("report", f"runs={tmp_path}", "hydra.run.dir=.")
    written = [(tmp_path / name).read_text() for name in ("report.md", "report.tex", "report.csv")]
    for found in (capsys.readouterr().out, *written):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", found)
    assert "<script" not in written[0]
    assert "](http" not in written[0]
    assert "](java" not in written[0]
    # no text adds a line: heading, rule, two runs
    assert len([line for line in written[0].splitlines() if line.startswith("|")]) == 4
    assert (tmp_path / "others_curves.png").exists()
