"""The paper's tables, from conf/paper.yaml."""

import functools
from importlib.resources import files
from typing import cast

from omegaconf import DictConfig, OmegaConf

from .options import read_options


# a report needs it several times, and reading takes a tenth of a second
@functools.cache
def read_paper() -> tuple[dict, dict]:
    """Read the tables of the paper by name, and the names of metrics in runs by task and column."""
    tables = read_options(cast(DictConfig, OmegaConf.create(files("carafepp.conf").joinpath("paper.yaml").read_text())))
    return tables, tables.pop("metrics")


def list_rows(tables: dict, name: str) -> list[dict]:
    """List the rows of a table as {column: figure} with "row" and "task"; rows whose figures another table gives come first."""
    table = tables[name]
    rows = []
    for row, source in table.get("elsewhere", {}).items():
        other, _, same = source.partition("/")
        rows += [figures | {"row": row} for figures in list_rows(tables, other) if figures["row"] == same]
    own = ({"task": table.get("task"), **dict(zip(table["columns"], row, strict=True))} for row in table["rows"])
    return [*rows, *own]


@functools.cache
def read_figures() -> dict[tuple[str, str], dict[tuple[str, str], float]]:
    """Read the scores of every row, as {(table, row): {(task, column): figure}}."""
    tables, metrics = read_paper()
    figures: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for name in tables:
        for row in list_rows(tables, name):
            published = {(row["task"], column): row[column] for column in metrics[row["task"]] if column in row}
            figures.setdefault((name, row["row"]), {}).update(published)
    return figures


def list_equal_rows(table: str, row: str, scale: str | None) -> list[tuple[str, str]]:
    """List the row and the rows of other tables with the same configuration at a scale, as (table, row).

    Rows with the same figures in two tables are the same configuration, except at the scales at which a table differs (`own_scales`).
    """
    tables, figures = read_paper()[0], read_figures()
    own = figures.get((table, row), {})
    differing = {name for name, content in tables.items() if scale in content.get("own_scales", [])}
    others = [
        place
        for place, theirs in figures.items()
        if place[0] == table or not differing & {table, place[0]}
        if (common := own.keys() & theirs.keys()) and all(own[key] == theirs[key] for key in common)
    ]
    return [(table, row), *(place for place in others if place != (table, row))]


def read_pretraining(table: str, row: str, scale: str = "paper") -> str:
    """Return the classifier that the backbone of a row starts from, such as "table2/resnet50_carafe", or "" if there is none."""
    conf = files("carafepp.conf")
    paths = (conf.joinpath(f"{name}.yaml") for name in (f"at_scale/{scale}/{table}/{row}", f"row/{table}/{row}", f"experiment/{table}"))
    read = (OmegaConf.create(path.read_text()) for path in paths if path.is_file())
    return next((str(config.pretraining) for config in read if "pretraining" in config), "")


def find_baseline(table: dict, row: str) -> str | None:
    """Return the name of the baseline of `row`, if there is one."""
    baseline = table["baseline"]
    return baseline if isinstance(baseline, str) else baseline.get(row)


def unit_factor(column: str) -> int:
    """Return the factor from a metric in result.json to the paper's unit: 100 from a fraction to per cent, 1 for dB."""
    return 1 if column.endswith("_db") else 100
