"""Runs from result.json files: statistics, grouping, comparisons, and messages about runs that are left out."""

import csv
import json

import pytest
import torch
from carafepp.scripts.common.paper import read_paper
from carafepp.scripts.reporting import (
    compare_pictures,
    format_rows,
    format_time_taken,
    group_runs,
    read_runs,
    render_csv,
    render_tables,
    tabulate_kinds,
)
from carafepp.scripts.reporting.statistics import compare_paired, summarize, t_quantile
from report_runs import make_tables, write_run
from torchvision.utils import save_image


def test_quantiles_are_those_of_students_tables():
    found = [t_quantile(degrees) for degrees in (1, 2, 4, 9, 30, 1000)]
    assert found == pytest.approx([12.7062, 4.3027, 2.7764, 2.2622, 2.0423, 1.9623], rel=1e-4)
    assert t_quantile(5, 0.99) == pytest.approx(4.0321, rel=1e-4)


def test_differences_are_paired_over_common_seeds():
    ours, baseline = {0: 1.0, 1: 3.0, 2: 8.0, 7: 100.0}, {1: 1.0, 2: 4.0, 0: 0.0, 3: -50.0}
    difference = compare_paired(ours, baseline)
    assert (difference.mean, difference.seeds) == (pytest.approx(7 / 3), 3)
    # differences 1, 2, 4: deviation 1.5275
    assert difference.half == pytest.approx(4.3027 * 1.5275 / 3**0.5, rel=1e-4)
    assert compare_paired({0: 2.0, 1: 5.0}, {1: 4.0, 2: 0.0}) == (1.0, None, 1)
    assert compare_paired({0: 2.0}, {1: 4.0}) is None
    assert summarize({0: 2.0}) == (2.0, None)
    assert summarize({}) is None


def test_experiment_of_the_paper_is_its_table(tmp_path):
    for seed, (carafe, nearest) in enumerate([(0.30, 0.28), (0.33, 0.30), (0.31, 0.30)]):
        write_run(tmp_path / f"c{seed}", seed, {"val/box_AP": carafe, "val/box_AP50": 0.5}, row="table4/carafe")
        write_run(tmp_path / f"n{seed}", seed, {"val/box_AP": nearest, "val/box_AP50": 0.5}, row="table4/nearest")
    # runs with another protocol are in other tables
    write_run(tmp_path / "paper", 0, {"val/box_AP": 0.9}, row="table4/nearest", scale="paper")
    write_run(tmp_path / "long", 0, {"val/box_AP": 0.9}, "data.epochs=99", row="table4/nearest")
    # options of devices and logging do not make another setting
    write_run(tmp_path / "c3", 3, {"val/box_AP": 0.31, "val/box_AP50": 0.5}, "data.workers=2", "logger=tensorboard", row="table4/carafe")
    found = {table.protocol: table for table in make_tables(tmp_path)}
    assert set(found) == {"scale=small", "scale=paper", "scale=small data.epochs=99"}
    rows = format_rows(found["scale=small"])
    assert [row["row"] for row in rows][:2] == ["nearest", "bilinear"]
    assert len(rows) == 9
    nearest, carafe = rows[0], rows[-1]
    assert (nearest["AP paper"], carafe["AP paper"]) == ("36.5", "37.8")
    assert (nearest["AP"], nearest["runs"]) == ("29.33 ± 1.15", "3")
    assert (carafe["AP"], carafe["runs"]) == ("31.25 ± 1.26", "4")
    # the differences are 2, 3 and 1 over the three common seeds
    assert carafe["AP vs nearest"] == "+2.00 [-0.48, +4.48] (3 seeds)"
    assert nearest.get("AP vs nearest", "") == ""
    assert (carafe["parameters"], carafe["GFLOPs"], carafe["clock seconds"]) == ("1,234,567", "2.500", "60")
    assert rows[1]["AP"] == "", "no run of bilinear"
    (chosen,) = (table for table in make_tables(tmp_path, baseline="carafe") if table.protocol == "scale=small")
    assert format_rows(chosen)[0]["AP vs carafe"] == "-2.00 [-4.48, +0.48]"


def test_own_method_joins_the_table_and_its_baseline(tmp_path):
    for seed in (0, 1):
        # an experiment without a row is the baseline
        found = json.loads((write_run(tmp_path / f"n{seed}", seed, {"val/box_AP": 0.3}, row="table4/nearest") / "result.json").read_text())
        found["choices"]["row"], found["overrides"] = None, ["experiment=table4", "scale=small", f"seed={seed}"]
        (tmp_path / f"n{seed}" / "result.json").write_text(json.dumps(found))
        for name, score in (("mine", 0.4), ("yours", 0.2)):
            found["overrides"] = ["experiment=table4", "row=null", "scale=small", f"seed={seed}", f"upsampler@model.fpn={name}"]
            found["metrics"] = {"val/box_AP": score + seed / 100}
            (tmp_path / f"{name}{seed}").mkdir()
            (tmp_path / f"{name}{seed}" / "result.json").write_text(json.dumps(found))
        write_run(tmp_path / f"wide{seed}", seed, {"val/box_AP": 0.35}, "model.fpn_dim=9", row="table4/carafe")
    rows = {row["row"]: row for row in format_rows(make_tables(tmp_path)[0])}
    assert list(rows)[9:] == ["upsampler@model.fpn=mine", "carafe, model.fpn_dim=9", "upsampler@model.fpn=yours"]
    assert rows["nearest"]["AP"] == "30.00 ± 0.00"
    assert rows["upsampler@model.fpn=mine"]["AP vs nearest"].startswith("+10.50 [")
    assert rows["carafe, model.fpn_dim=9"]["AP vs nearest"].startswith("+5.00 [")


def test_tables_that_differ_at_a_scale_lend_no_runs_there(tmp_path):
    # in the paper, carafe of Table IV is cm64 of Table XI; at the small scale, C_m is scaled in Table XI alone
    for scale in ("small", "paper"):
        write_run(tmp_path / f"a_{scale}", 0, {"val/box_AP": 0.3}, row="table4/carafe", scale=scale)
        write_run(tmp_path / f"b_{scale}", 0, {"val/box_AP": 0.2}, row="table11/cm16", scale=scale)
    found = {table.protocol: format_rows(table) for table in make_tables(tmp_path) if table.name == "table11"}
    assert [found[f"scale={scale}"][2]["AP"] for scale in ("small", "paper")] == ["", "30.00"]
    lent = {table.protocol: format_rows(table) for table in make_tables(tmp_path) if table.name == "table14"}
    assert not lent, "a table without runs of its own is not shown"


def test_boxes_and_masks_are_lines_of_their_own(tmp_path):
    write_run(tmp_path / "0", 0, {"val/box_AP": 0.2, "val/mask_AP": 0.1}, row="table7/published")
    write_run(tmp_path / "1", 0, {"val/box_AP": 0.25, "val/mask_AP": 0.12}, row="table7/fpn")
    rows = format_rows(make_tables(tmp_path)[0])
    assert [(row["row"], row["task"], row["AP paper"], row["AP"], row["AP vs published"]) for row in rows[:4]] == [
        ("published", "bbox", "37.4", "20.00", ""),
        ("published", "segm", "34.2", "10.00", ""),
        ("fpn", "bbox", "38.6", "25.00", "+5.00"),
        ("fpn", "segm", "35.2", "12.00", "+2.00"),
    ]


def test_row_of_another_table_serves_as_baseline(tmp_path):
    write_run(tmp_path / "0", 0, {"val/mIoU": 0.4}, row="table8/upernet_resnet50")
    write_run(tmp_path / "1", 0, {"val/mIoU": 0.5}, row="table9/ppm")
    nine = next(table for table in make_tables(tmp_path) if table.name == "table9")
    first, second = format_rows(nine)[:2]
    assert (first["row"], first["mIoU paper"], first["mIoU"]) == ("published", "40.44", "40.00")
    assert second["mIoU vs published"] == "+10.00"


def test_other_runs_are_told_apart_by_their_overrides(tmp_path):
    for job, (sampler, seed, score) in enumerate([("published", 0, 0.4), ("published", 1, 0.5), ("carafe", 0, 0.5), ("carafe", 1, 0.7)]):
        write_run(tmp_path / str(job), seed, {"val/mIoU": score}, f"samplers={sampler}")
    first, second = format_rows(make_tables(tmp_path)[0])
    assert (first["samplers"], first["runs"], first["mIoU"]) == ("published", "2", "0.4500 ± 0.0707")
    assert second["mIoU vs first"] == "+0.1500 [-0.4853, +0.7853]"


def test_time_is_of_the_processor_where_every_line_has_it(tmp_path):
    for row, spent in (("table2/resnet50", 40.0), ("table2/resnet50_carafe", 50.0), ("table8/upernet_resnet50", 1800.0)):
        path = write_run(tmp_path / row, 0, {"val/top1": 0.7, "val/mIoU": 0.4}, row=row) / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"cpu_seconds": spent}))
    write_run(tmp_path / "old", 1, {"val/top1": 0.7}, row="table2/resnet50")
    # the baseline of Table IX is the run of Table VIII
    write_run(tmp_path / "ppm", 0, {"val/mIoU": 0.4}, row="table9/ppm")
    two, eight, nine = found = make_tables(tmp_path)
    assert [row.get("CPU seconds") for row in format_rows(two)] == ["40", "50", None, None]
    assert next(row for row in format_rows(eight) if row["runs"])["CPU seconds"] == "1800"
    assert not any("CPU seconds" in row for row in format_rows(nine))
    assert format_time_taken([eight]) == "1 run: 0.50 hours of CPU time"
    assert format_time_taken(found) == "5 runs: 0.53 hours of CPU time and 0.03 hours of wall-clock time for the 2 without CPU time"
    assert render_tables(found, "latex").endswith(f"\n% {format_time_taken(found)}\n")
    times = {(line["row"], line["seconds"], line["cpu_seconds"]) for line in csv.DictReader(render_csv([two]).splitlines())}
    assert {("resnet50", "60.0", "40.0"), ("resnet50_carafe", "60.0", "50.0")} < times


@pytest.mark.parametrize(
    "content",
    [
        *("", "[1]", "null", '{"metrics": ', "{}", "\x00\xff"),
        *('{"metrics": {"val/top1": "high"}}', '{"metrics": {"val/top1": null}}'),
        *('{"choices": {"experiment": ["table2"]}}', '{"curve": [{"val/top1": 0.5}]}'),
    ],
)
def test_broken_unfinished_and_failed_runs_are_named_and_the_rest_is_reported(tmp_path, content):
    good = write_run(tmp_path / "good", 0, {"val/top1": 0.75}, row="table2/resnet50")
    broken = write_run(tmp_path / "broken", 1, {"val/top1": 0.75}, row="table2/resnet50")
    if content[:2] == '{"' and content[-1] == "}":
        content = json.dumps(json.loads((good / "result.json").read_text()) | json.loads(content))
    (broken / "result.json").write_bytes(content.encode("latin-1"))
    for name in ("unfinished", "failed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
    (tmp_path / "failed" / "error.txt").write_text("ValueError: no such thing\n\nTraceback ...\n")
    (tmp_path / "failed" / "metrics.csv").write_text("step\n1\n")
    write_run(tmp_path / "twice", 0, {"val/top1": 0.8}, row="table2/resnet50")
    runs, problems = read_runs([tmp_path, tmp_path / "good"])
    assert [run.folder for run in runs] == [good, tmp_path / "twice"]
    assert problems[0].startswith(f"{broken}/result.json: broken (")
    assert problems[1] == f"{tmp_path}/failed: failed (ValueError: no such thing)"
    assert problems[2].startswith(f"{tmp_path}/unfinished: unfinished")
    (setting,), repeated = group_runs(runs, read_paper()[0])
    assert list(setting.runs) == [0]
    assert repeated == [f"{tmp_path}/twice: omitted, because it repeats seed 0 of {good}"]


def test_pictures_of_the_lines_stand_beside_each_other(tmp_path):
    for row in ("published", "fpn"):
        folder = write_run(tmp_path / row, 0, {"val/box_AP": 0.3}, row=f"table7/{row}") / "pictures"
        folder.mkdir()
        for index in range(2):
            for shade, name in enumerate(("image", "truth", "prediction")):
                save_image(torch.full((3, 60, 90), shade / 5 + (row == "fpn") / 2), folder / f"{index}_{name}.png")
    (tmp_path / "fpn" / "pictures" / "1_prediction.png").unlink()
    (table,) = make_tables(tmp_path)
    pictures = compare_pictures(table)
    assert pictures is not None
    # a row of four pictures, enlarged threefold; the second sample is not drawn by both runs
    height, width = pictures.shape[1:]
    assert 180 < height < 2 * 180 + 140
    assert 4 * 270 < width < 5 * 270
    # below the pictures, a note says what the columns are
    bottom = int(torch.nonzero((pictures[0, :, 30:250] == 0).all(1))[-1])
    assert (pictures[0, bottom + 1 :] < 0.5).any()
    row = pictures[0, bottom - 90]
    shades = [row[(i + 1) * width // 4 - 135].item() for i in range(4)]
    assert shades == pytest.approx([0, 0.2, 0.4, 0.9], abs=0.01)
    # every column has a title, and the names and scores of the lines fit in theirs
    titles = pictures[0, : bottom - 190] < 0.5
    assert all(titles[:, i * width // 4 : (i + 1) * width // 4].any() for i in range(4))
    assert not titles[:, -3:].any()


def test_names_that_mean_something_in_a_format_are_escaped(tmp_path):
    for job, name in enumerate(["[a|b]", "50%_a&b#c$d~e^f{g}<h\\i"]):
        write_run(tmp_path / str(job), 0, {"val/mIoU": 0.4}, f"note={name}")
    found = make_tables(tmp_path)
    pipes = [line.replace("\\|", "") for line in render_tables(found, "markdown").splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in pipes}) == 1
    lines = [line.split(" & ")[0].strip() for line in render_tables(found, "latex").splitlines()]
    assert "{[}a\\textbar{}b]" in lines
    assert "50\\%\\_a\\&b\\#c\\$d\\textasciitilde{}e\\textasciicircum{}f\\{g\\}\\textless{}h\\textbackslash{}i" in lines
    assert "note=[a|b]" in render_csv(found)


def test_failed_starts_are_not_runs(tmp_path):
    write_run(tmp_path / "good", 0, {"val/top1": 0.75}, row="table2/resnet50")
    for name in ("start", "sweep/0", "eval-now", "stopped"):
        (tmp_path / name).mkdir(parents=True)
        reason = "interrupted by SIGTERM" if name == "stopped" else "ValueError: no such thing"
        (tmp_path / name / "error.txt").write_text(f"{reason}\n")
    (tmp_path / "start" / "config.yaml").write_text("")
    (tmp_path / "sweep" / "multirun.yaml").write_text("")
    problems = read_runs([tmp_path])[1]
    # a missing row of a sweep is named, and so is a run that can go on
    assert [problem.partition(":")[0] for problem in problems] == [str(tmp_path / "stopped"), str(tmp_path / "sweep/0")]
    assert read_runs([tmp_path / "start"])[1] == [f"{tmp_path / 'start'}: failed (ValueError: no such thing)"]


def test_runs_of_other_data_networks_or_tasks_are_neither_averaged_nor_in_one_table(tmp_path):
    accuracy, scores = {"val/top1": 0.75}, {"val/mIoU": 0.5}
    write_run(tmp_path / "0", 0, accuracy, "task=classification", "data.root=/data/cats")
    write_run(tmp_path / "1", 1, accuracy, "task=classification", "data.root=/data/dogs")
    write_run(tmp_path / "2", 1, accuracy, "task=classification", "data.root=/elsewhere/cats")
    write_run(tmp_path / "3", 0, scores)
    other = write_run(tmp_path / "4", 1, scores)
    content = json.loads((other / "result.json").read_text()) | {"parameters": 7}
    (other / "result.json").write_text(json.dumps(content))
    settings, repeated = group_runs(read_runs([tmp_path])[0], read_paper()[0])
    assert repeated == []
    assert [sorted(setting.runs) for setting in settings] == [[0, 1], [1], [0], [1]]
    tables = tabulate_kinds(settings, 4, None)
    assert [len(table.lines) for table in tables] == [1, 1, 2]
    assert ["data.root=cats" in table.protocol for table in tables] == [True, False, False]
    # every metric of a table is one of each of its lines
    for table in tables:
        assert len({tuple(line.cells) for line in table.lines}) == 1
