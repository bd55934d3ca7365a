"""The whole comparison at the small scale: its plan has every row once, after its classifier, and its command ends in tables."""

import json

import pytest
from carafepp.scripts.common.paper import list_equal_rows, read_paper, read_pretraining
from carafepp.scripts.common.plan import ADDED, describe_plan, find_start, find_table, plan_sweeps, read_rows, read_task
from commands import call, command_line, run_line
from configurations import CONF, compose_config
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from training import read_result

OPTIONS = OmegaConf.load(CONF / "train_paper.yaml")
TABLES = list(read_paper()[0])


def seeds_by_row(sweeps):
    """Return the number of seeds of every planned row."""
    return {row: sweep.seeds for sweep in sweeps for row in sweep.rows}


def test_every_row_of_every_table_is_planned_once_with_the_seeds_of_its_table():
    sweeps = plan_sweeps(OPTIONS.tables, OPTIONS.seeds)
    planned = seeds_by_row(sweeps)
    assert list(OPTIONS.tables) == TABLES
    assert sum(len(sweep.rows) for sweep in sweeps) == len(planned)
    for table in TABLES:
        for row in read_rows(table):
            places = [f"{other}/{name}" for other, name in list_equal_rows(*row.split("/"), "small")]
            found = [planned[place] for place in places if place in planned]
            assert len(found) == 1, row
            assert found[0] >= OPTIONS.seeds[table], row
    # five seeds where the paper claims an order
    assert {table for table, number in OPTIONS.seeds.items() if number == 5} == {f"table{n}" for n in (2, 3, 4, 7, 8, 9, 10)}


@pytest.mark.parametrize("tables", [TABLES, *([table] for table in TABLES)])
def test_classifiers_come_first_with_at_least_the_seeds_of_their_networks(tables):
    sweeps = plan_sweeps(tables, OPTIONS.seeds)
    earlier: dict[str, int] = {}
    for sweep in sweeps:
        starts = {find_start(row) for row in sweep.rows}
        # one override serves the whole sweep
        assert len({bool(start) for start in starts}) == 1
        assert all(earlier[start] >= sweep.seeds for start in starts if start)
        # a backbone of another depth would not be that of the small scale
        assert not any("resnet101" in start for start in starts)
        earlier |= dict.fromkeys(sweep.rows, sweep.seeds)


def test_rows_that_are_added_to_a_table_are_planned_with_it_from_the_classifier_of_its_baseline():
    for sweep in plan_sweeps(["table4", "table9"], OPTIONS.seeds):
        if sweep.table in ADDED:
            assert {*ADDED[sweep.table]} < {*sweep.rows}
    for table, rows in ADDED.items():
        assert {find_table(row) for row in rows} == {table}
        assert {find_start(row) for row in rows} == {find_start(f"{table}/{read_paper()[0][table]['baseline']}")} == {"table2/resnet50"}


def describe_backbone(table: str, row: str) -> dict:
    """Compose the backbone of a row of the study, without its weights and the layers that only a detector deforms."""
    config = compose_config("train", f"experiment={table}", f"row={row}", "scale=small", f"setting={read_task(table)}_study")
    backbone = OmegaConf.to_container(OmegaConf.masked_copy(config, ["backbone", "downsampler"]), resolve=True)["backbone"]
    return {key: value for key, value in backbone.items() if key not in ("_partial_", "weights", "deformable")}


def test_every_table_has_the_backbones_of_its_classifiers():
    planned = [row for sweep in plan_sweeps(TABLES, OPTIONS.seeds) for row in sweep.rows]
    pairs = {(find_table(row), start): row for row in planned if (start := find_start(row))}
    classifiers = {start: describe_backbone(find_table(start), start) for start in {start for _, start in pairs}}
    for (table, start), row in pairs.items():
        assert describe_backbone(table, row) == classifiers[start], row


def test_a_sweep_trains_all_rows_of_a_seed_before_the_next(tmp_path):
    sweep = plan_sweeps(["table14"], OPTIONS.seeds)[-1]
    parsed = OverridesParser.create().parse_overrides(sweep.write_arguments(tmp_path, 1)[1:])
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert [word for job in jobs for word in job if word.startswith("seed=")] == [f"seed={seed}" for seed in (0, 1, 2) for _ in sweep.rows]


def test_jobs_compose_to_the_settings_of_the_study(tmp_path):
    tasks = {}
    for sweep in plan_sweeps(["table5", "table6", "table9", "table10"], OPTIONS.seeds):
        arguments = sweep.write_arguments(tmp_path, 2)
        assert {"hydra/launcher=joblib", "hydra.launcher.n_jobs=2"} < {*arguments}
        single = [word.partition(",")[0] for word in arguments if not word.startswith(("-m", "hydra"))]
        config = compose_config("train", *single)
        tasks[read_task(sweep.table)] = config
        assert config.trainer.val_check_interval == 1.0
        assert bool(config.weights_root) == bool(read_pretraining(*sweep.rows[0].split("/"), "small"))
    lengths = {task: (config.data.val.get("images") or config.data.val).length for task, config in tasks.items()}
    assert lengths == {"classification": 4000, "detection": 800, "segmentation": 800, "inpainting": 800}


def test_the_plan_states_the_hours_of_what_is_left(tmp_path):
    sweeps = plan_sweeps(["table14"], OPTIONS.seeds)
    assert [(sweep.table, len(sweep.rows), sweep.seeds) for sweep in sweeps] == [("table2", 1, 3), ("table14", 3, 3)]
    text = describe_plan(sweeps, tmp_path, {"table2": 1200, "table14": 3600}, 2)
    assert text.splitlines()[-1].startswith("12 runs left: 10.0 hours of CPU time, 5.0 hours with jobs=2")
    folder = tmp_path / "table14" / "softmax_2"
    folder.mkdir(parents=True)
    finished = {"choices": {}, "overrides": [], "metrics": {}, "parameters": 1, "flops": 1, "seconds": 1.0, "seed": 2}
    (folder / "result.json").write_text(json.dumps(finished))
    assert "11 runs left: 9.0 hours" in describe_plan(sweeps, tmp_path, {"table2": 1200, "table14": 3600}, 2)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["tables=[table4,table15]"], "tables must be among table1, .*, table14, got 'table15'"),
        (["seeds.table4=0"], "seeds must give every table a whole number of at least 1, got 0 for table4"),
        (["jobs=0"], "jobs must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_trained(tmp_path, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        call("train", "paper", f"out={tmp_path / 'runs'}", *arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_one_command_trains_classifiers_and_tables_repeats_nothing_and_any_row_has_the_same_bits(tmp_path):
    tiny = ["data.batch_size=4", "data.epochs=1", "data.train.length=8", "data.val.length=4", "data.val_batch_size=4"]
    tiny += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    command = command_line("train", "paper", "out=runs", "tables=[table14]", "seeds.table14=1", "--", *tiny)
    first = run_line(command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "4 runs left" in first.stdout
    runs = tmp_path / "runs"
    results = {path.parent.name: read_result(path.parent) for path in runs.glob("*/*/result.json")}
    assert set(results) == {"resnet50_0", "sigmoid_0", "sigmoid_normalized_0", "softmax_0"}
    assert "table14: Kernel normaliser" in first.stdout

    second = run_line(command, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "0 runs left" in second.stdout
    assert {path.parent.name: read_result(path.parent) for path in runs.glob("*/*/result.json")} == results

    again = command_line("train", *results["softmax_0"]["overrides"], "hydra.run.dir=again")
    assert run_line(again, cwd=tmp_path).returncode == 0
    assert read_result(tmp_path / "again")["weights_sha256"] == results["softmax_0"]["weights_sha256"]
    # without the classifier, the bits are others
    scratch = [word for word in again if not word.startswith(("weights_root=", "hydra.run.dir="))]
    assert run_line([*scratch, "hydra.run.dir=scratch"], cwd=tmp_path).returncode == 0
    assert read_result(tmp_path / "scratch")["weights_sha256"] != results["softmax_0"]["weights_sha256"]
