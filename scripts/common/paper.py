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


def read_pretraining(table: str, row: str) -> str:
    """Return the classifier that the backbone of a row starts from, such as "table2/resnet50_carafe", or "" if there is none."""
    conf = files("carafepp.conf")
    read = (OmegaConf.create(conf.joinpath(name).read_text()) for name in (f"row/{table}/{row}.yaml", f"experiment/{table}.yaml"))
    return next((str(config.pretraining) for config in read if "pretraining" in config), "")


def find_baseline(table: dict, row: str) -> str | None:
    """Return the name of the baseline of `row`, if there is one."""
    baseline = table["baseline"]
    return baseline if isinstance(baseline, str) else baseline.get(row)


def unit_factor(column: str) -> int:
    """Return the factor from a metric in result.json to the paper's unit: 100 from a fraction to per cent, 1 for dB."""
    return 1 if column.endswith("_db") else 100
