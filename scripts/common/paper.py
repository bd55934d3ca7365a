"""The paper's tables, from conf/paper.yaml."""

from importlib.resources import files

from omegaconf import OmegaConf


def read_paper() -> tuple[dict, dict]:
    """The tables of conf/paper.yaml by name, and the names of their metrics by task and column."""
    tables = OmegaConf.to_container(OmegaConf.create(files("carafepp.conf").joinpath("paper.yaml").read_text()))
    return tables, tables.pop("metrics")


def list_rows(tables: dict, name: str) -> list[dict]:
    """The rows of one table as {column: figure}, each with its "row" and "task", those whose figures another table gives first."""
    table = tables[name]
    rows = []
    for row, place in table.get("elsewhere", {}).items():
        other, _, same = place.partition("/")
        rows += [figures | {"row": row} for figures in list_rows(tables, other) if figures["row"] == same]
    own = ({"task": table.get("task"), **dict(zip(table["columns"], row, strict=True))} for row in table["rows"])
    return [*rows, *own]


def baseline_of(table: dict, row: str) -> str | None:
    """The row that differences of `row` are taken to."""
    baseline = table["baseline"]
    return baseline if isinstance(baseline, str) else baseline.get(row)


def unit_factor(column: str) -> int:
    """What makes the paper's unit of a metric in result.json: per cent of a fraction, but dB stay."""
    return 1 if column.endswith("_db") else 100
