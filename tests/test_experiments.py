"""Every row of the paper's tables is a configuration that composes and builds, and two rows are the same only where the paper says so."""

import itertools
from pathlib import Path

import pytest
import torch
from carafepp.scripts.report_tables import published, published_rows
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).parent.parent / "conf"
TABLES, METRICS = published()
ROWS = [f"{table}/{row}" for table in TABLES for row in dict.fromkeys(row["row"] for row in published_rows(TABLES, table))]


def made_of(*overrides: str) -> dict:
    """What a run with these overrides trains, and on what."""
    config = compose("train", overrides=[*overrides, "data.root=FOLDER"] if "scale=small" not in overrides else list(overrides))
    return {key: OmegaConf.to_container(config[key], resolve=True) for key in ("task", "data", "trainer")}


@pytest.fixture(scope="module")
def configs():
    """The rows, "table4/carafe", and the experiments alone, "table4", in the paper's settings."""
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        rows = {row: made_of(f"experiment={row.split('/')[0]}", f"row={row}") for row in ROWS}
        return rows | {table: made_of(f"experiment={table}") for table in TABLES}


def figures(place: str) -> dict[tuple[str, str], float]:
    """The paper's accuracy of a row, by task and column."""
    table, row = place.split("/")
    found = [f for f in published_rows(TABLES, table) if f["row"] == row]
    return {(f["task"], column): f[column] for f in found for column in METRICS[f["task"]] if column in f}


def test_there_is_a_file_for_each_of_the_96_rows():
    assert sum(len(table["rows"]) for table in TABLES.values()) == 96
    assert {f"{path.parent.name}/{path.stem}" for path in (CONF / "row").glob("*/*.yaml")} == set(ROWS)
    assert {path.stem for path in (CONF / "experiment").glob("table*.yaml")} == set(TABLES)


@pytest.mark.parametrize("table", TABLES)
def test_every_row_builds(configs, table):
    built = {}
    for row in (row for row in ROWS if row.startswith(f"{table}/")):
        # rows that the tables share are built once
        with torch.device("meta"):
            task = instantiate(OmegaConf.create(configs[row]["task"]))
        built[row] = sum(p.numel() for p in task.parameters())
        assert task.monitor in METRICS[next(iter(figures(row)))[0]].values() or task.monitor == "val/box_AP"
    assert min(built.values()) > 1e6


@pytest.mark.parametrize("table", TABLES)
def test_every_experiment_builds_in_small(table):
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        rows = [row for row in ROWS if row.startswith(f"{table}/")]
        small = made_of(f"experiment={table}", f"row={rows[-1]}", "scale=small")
    with torch.device("meta"):
        task = instantiate(OmegaConf.create(small["task"]))
    assert 1e5 < sum(p.numel() for p in task.parameters()) < 2e7


def test_rows_are_the_same_run_where_the_paper_gives_the_same_figures(configs):
    same, expected = set(), set()
    for pair in itertools.combinations(ROWS, 2):
        first, second = map(figures, pair)
        common = first.keys() & second.keys()
        if common and all(first[key] == second[key] for key in common):
            expected.add(pair)
        if configs[pair[0]] == configs[pair[1]]:
            same.add(pair)
    assert ("table4/carafe", "table5/fpn") in expected
    assert same == expected
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        shared = dict.fromkeys(row for pair in expected for row in pair)
        small = {row: made_of(f"experiment={row.split('/')[0]}", f"row={row}", "scale=small") for row in shared}
    # so the runs of one serve as those of the other at either scale
    assert all(small[first] == small[second] for first, second in expected)


@pytest.mark.parametrize("table", TABLES)
def test_experiment_alone_is_its_baseline(configs, table):
    baseline = TABLES[table]["baseline"]
    rows = [baseline] if isinstance(baseline, str) else list(baseline.values())
    assert any(configs[table] == configs[f"{table}/{row}"] for row in rows)


def test_sweep_runs_the_rows_in_the_papers_order():
    for table in TABLES:
        sweeper = OmegaConf.load(CONF / "experiment" / f"{table}.yaml").hydra.sweeper.params.row
        swept = [row.strip() for row in sweeper.split(",")]
        rows = [row for row in ROWS if row.startswith(f"{table}/")]
        assert swept == [row for row in rows if row in swept]
        # in small, ResNet-101 is the same tiny network
        assert all("resnet101" in row for row in rows if row not in swept)
