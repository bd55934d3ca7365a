"""carafepp-report: what it prints and writes."""

import csv
from pathlib import Path

import pytest
from carafepp.scripts.common.paper import read_paper
from carafepp.scripts.reporting import (
    format_rows,
    group_runs,
    read_runs,
    render_csv,
    render_tables,
    tabulate_paper,
)
from carafepp.scripts.reporting.plots import OURS, find_coordinates, find_ours, plot_bars, plot_curves, spread_out
from commands import call
from omegaconf import OmegaConf
from PIL import Image
from report_runs import make_tables, write_run


def test_runs_serve_every_table_that_has_their_configuration(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", seed, {"val/box_AP": 0.3}, row="table4/nearest", scale="paper")
        write_run(tmp_path / f"b{seed}", seed, {"val/box_AP": 0.4 + seed / 100}, row="table4/carafe", scale="paper")
        write_run(tmp_path / f"c{seed}", seed, {"val/box_AP": 0.35}, row="table11/cm16", scale="paper")
        write_run(tmp_path / f"d{seed}", seed, {"val/box_AP": 0.45}, row="table5/backbone", scale="paper")
    found = {table.name: {row["row"]: row for row in format_rows(table)} for table in make_tables(tmp_path)}
    assert list(found) == ["table4", "table5", "table11"]
    assert found["table11"]["cm64"]["AP"] == "40.50 ± 0.71"
    assert found["table11"]["cm16"]["AP vs cm64"].startswith("-5.50 [")
    assert found["table11"]["cm256"]["AP"] == ""
    assert [found["table5"][row]["AP"] for row in ("published", "fpn", "fpn_backbone")] == ["30.00 ± 0.00", "40.50 ± 0.71", ""]
    assert found["table5"]["fpn"]["AP vs published"].startswith("+10.50 [")
    # runs of the table itself take precedence
    write_run(tmp_path / "own", 0, {"val/box_AP": 0.1}, row="table11/cm64", scale="paper")
    eleven = next(table for table in make_tables(tmp_path) if table.name == "table11")
    assert {row["row"]: row["AP"] for row in format_rows(eleven)}["cm64"] == "10.00"
    lines = csv.DictReader(render_csv(make_tables(tmp_path)).splitlines())
    fpn = next(line for line in lines if (line["table"], line["row"], line["metric"]) == ("table5", "fpn", "AP"))
    assert (float(fpn["mean"]), fpn["baseline"]) == (pytest.approx(40.5), "nearest")
    shown = print_report(capsys, f"runs={tmp_path}")
    assert "fpn: runs of table4/carafe" in shown
    assert "cm64: runs of" not in shown


def print_report(capsys, *arguments: object) -> str:
    """Return what carafepp-report prints."""
    call("report", *arguments, raises=False)
    return capsys.readouterr().out


def test_command_prints_and_writes_every_format(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", seed, {"val/top1": 0.75 + seed / 100}, row="table2/resnet50")
        write_run(tmp_path / f"b{seed}", seed, {"val/top1": 0.77}, row="table2/resnet50_carafe")
    assert "resnet50_carafe   2     77.46" in print_report(capsys, f"runs={tmp_path}")
    latex = print_report(capsys, f"runs={tmp_path}", "format=latex")
    assert "resnet50\\_carafe  & 2 " in latex
    assert "76.43" in latex
    pipes = [line for line in print_report(capsys, f"runs={tmp_path}", "format=markdown").splitlines() if line.startswith("|")]
    assert len(pipes) == 2 + 4
    assert len({line.count("|") for line in pipes}) == 1
    assert pipes[3] in (tmp_path / "report.md").read_text()
    # nothing else is printed, not even by the plotting library
    assert print_report(capsys, f"runs={tmp_path}", "format=csv") == (tmp_path / "report.csv").read_text() + "\n"
    lines = list(csv.DictReader(print_report(capsys, f"runs={tmp_path}", "format=csv").splitlines()))
    line = next(line for line in lines if (line["row"], line["metric"]) == ("resnet50_carafe", "top1"))
    assert [float(line[key]) for key in ("paper", "mean", "difference", "low", "high")] == pytest.approx(
        [77.46, 77, 1.5, -4.853, 7.853], abs=1e-3
    )
    assert (line["baseline"], line["common_seeds"], line["parameters"]) == ("resnet50", "2", "1234567")
    # the file holds every figure of the paper, printed or not
    assert render_csv(make_tables(tmp_path)).count(",top5,") == 4


def test_scores_that_are_no_number_stay_so(tmp_path, capsys):
    for seed in (0, 1):
        for row, score in (("cm16", float("nan")), ("cm32", float("inf")), ("cm64", 0.3)):
            write_run(tmp_path / f"{row}{seed}", seed, {"val/box_AP": score}, row=f"table11/{row}")
    write_run(tmp_path / "alone", 0, {"val/box_AP": float("nan")}, row="table11/cm_none")
    shown = {line.split()[0]: line for line in print_report(capsys, f"runs={tmp_path}").splitlines() if line.startswith("cm")}
    assert "nan ± nan" in shown["cm16"]
    assert "inf ± nan" in shown["cm32"]
    assert "nan ±" not in shown["cm_none"]


def test_nothing_to_report_is_an_error(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(SystemExit, match="no finished run"):
        print_report(capsys, f"runs={tmp_path}")
    assert "unfinished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("format=html", "format must be one of terminal, markdown, latex, or csv"),
        ("metrics=[AP,mAP]", "metrics must be among AP, .*top1.*, got mAP"),
        ("baseline=carafe", "baseline must be a row, one of resnet50; .*, got carafe"),
    ],
)
def test_wrong_options_are_named(tmp_path, capsys, override, message):
    write_run(tmp_path / "0", 0, {"val/top1": 0.75}, row="table2/resnet50")
    with pytest.raises(SystemExit, match=message):
        print_report(capsys, f"runs={tmp_path}", override)


def test_paper_lists_every_row_with_ours(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", seed, {"val/top1": 0.75}, row="table2/resnet50")
        write_run(tmp_path / f"b{seed}", seed, {"val/top1": 0.76 + seed / 100}, row="table2/resnet50_carafe")
    write_run(tmp_path / "full", 0, {"val/top1": 0.77}, "data.root=/data", row="table2/resnet50", scale="paper")
    text = print_report(capsys, "paper", f"runs={tmp_path}", "format=markdown")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    commands = [row[-1] for row in rows if row[-1].startswith("carafepp-train")]
    # 96 rows, and two baselines that are rows of other tables
    assert len(commands) == 96 + 2
    assert "carafepp-train experiment=table9 row=table9/ppm_fpn weights_root=CLASSIFIERS" in commands
    assert "carafepp-train experiment=table2 row=table2/resnet50" in commands
    started = {row[0]: row[-2] for row in rows if row[-1].startswith("carafepp-train experiment=table3")}
    assert started["conv"] == "table2/resnet50"
    assert started["carafe"] == "table2/resnet50_carafe"
    assert started["lip"] == "pretraining/resnet50_lip"
    resnet, carafe = (row for row in rows if row[0] in ("resnet50", "resnet50_carafe"))
    assert resnet[1:-1] == ["76.43", "93.21", "", "77.00", "+0.57", "75.00 ± 0.00", ""]
    assert carafe[1:-1] == ["77.46", "93.63", "+1.03", "", "", "76.50 ± 0.71", "+1.50 [-4.85, +7.85]"]


def test_documented_rows_are_those_of_the_paper(monkeypatch, capsys, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "rows.md").read_text()
    # the command reads the runs of the working directory
    monkeypatch.chdir(tmp_path)
    assert print_report(capsys, "paper", "format=markdown").rstrip() in page


def test_ablations_are_plotted_over_their_numbers(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for seed in (0, 1):
        for row in ("table11/cm16", "table11/cm64", "table11/cm_none", "table13/encoder1_kernel3", "table13/encoder3_kernel5"):
            write_run(tmp_path / f"{row}{seed}", seed, {"val/box_AP": 0.3 + seed / 100}, row=row)
        for size in (3, 5):
            write_run(tmp_path / f"{size}_{seed}", seed, {"val/mIoU": 0.4}, f"upsampler.kernel_size={size}", "upsampler=carafe")
    found = {table.name: table for table in make_tables(tmp_path)}
    places = {name: [find_coordinates(line, table.axes) for line in table.lines] for name, table in found.items()}
    assert places["table11"] == [("16",), ("32",), ("64",), ("128",), ("256",), ("none",)]
    assert places["table13"][:2] == [("1", "3"), ("1", "5")]
    assert places["others"] == [("3",), ("5",)]
    print_report(capsys, f"runs={tmp_path}")
    kinds = ("ablation", "bars", "curves")
    for suffix in ("png", "pdf"):
        assert {path.name for path in tmp_path.glob(f"*.{suffix}")} == {f"{name}_{kind}.{suffix}" for name in found for kind in kinds}
    assert Image.open(tmp_path / "table11_bars.png").info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_curves_are_labelled_at_their_ends_with_ours_on_top(tmp_path):
    pytest.importorskip("matplotlib")
    for row, score in (("nearest", 0.3), ("carafe", 0.4), ("bilinear", 0.301)):
        write_run(tmp_path / row, 0, {"val/box_AP": score}, row=f"table4/{row}")
    (table,) = make_tables(tmp_path)
    assert find_ours(table) == {"carafe"}
    curves, bars = plot_curves(table), plot_bars(table)
    assert curves is not None
    assert bars is not None
    (axis,) = curves.axes
    carafe = max(axis.lines, key=lambda line: line.get_zorder())
    assert (carafe.get_ydata()[-1], carafe.get_color()) == (pytest.approx(40), OURS)
    assert sum(line.get_zorder() == carafe.get_zorder() for line in axis.lines) == 1
    places = {text.get_text(): text.xyann[1] for text in axis.texts}
    assert sorted(places, key=places.get, reverse=True) == ["carafe  40.00", "bilinear  30.10", "nearest  30.00"]
    # the ends of two curves are nearer than their names
    assert places["bilinear  30.10"] - places["nearest  30.00"] > 0.05
    (axis,) = bars.axes
    from matplotlib.colors import to_hex

    assert [text.get_text() for text in axis.texts] == ["30.00", "30.10", "40.00"]
    assert [to_hex(bar.get_facecolor()) == OURS for bar in axis.patches] == [False, False, True]


def test_names_are_moved_apart_in_their_order():
    heights = spread_out([0.5, 0.1, 0.5, 0.51, 0.9], 0.1)
    assert heights == pytest.approx([0.40333, 0.1, 0.50333, 0.60333, 0.9], abs=1e-4)
    assert spread_out([], 0.1) == []


def test_results_page_has_the_tables_of_its_runs():
    docs = Path(__file__).parents[2] / "docs"
    cfg = OmegaConf.load(docs.parent / "conf" / "report.yaml")
    runs, problems = read_runs([docs / "results"])
    settings, repeated = group_runs(runs, read_paper()[0])
    assert problems + repeated == []
    tables = tabulate_paper(settings, cfg.metrics, cfg.digits, cfg.baseline)
    for table in tables:
        # the page has the rows that ran
        table.lines = [line for line in table.lines if line.setting]
    assert render_tables(tables, "markdown").replace("## ", "### ") in (docs / "results.md").read_text()
