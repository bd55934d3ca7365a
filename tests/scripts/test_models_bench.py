"""carafepp-bench models: figures that can be computed by hand."""

import csv

import pytest
from carafepp.scripts.benching.models import measure_networks
from commands import call
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra


@pytest.fixture(autouse=True)
def hydra():
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        yield


def rows(*overrides: str) -> dict[str, dict]:
    found = measure_networks(compose("bench_models", overrides=["overrides=['scale=small']", "rounds=1", *overrides]))
    return {row["row"]: row for row in found}


def test_carafe_in_a_detector_adds_its_own_parameters_and_flops():
    found = rows("table=table4", "rows=[carafe]", "size=[96,96]")
    assert list(found) == ["nearest", "carafe"]
    baseline, carafe = found.values()
    # compressor and encoder with biases, on three levels of 32 channels
    assert carafe["parameters"] - baseline["parameters"] == 3 * (33 * 64 + (64 * 9 + 1) * 100)
    # 2 FLOPs for a multiply-add of compressor, encoder and reassembly, for each source pixel of 12 x 12, 6 x 6 and 3 x 3
    assert carafe["flops"] - baseline["flops"] == 2 * (32 * 64 + 64 * 9 * 100 + 100 * 32) * (144 + 36 + 9)
    assert baseline["relative"] == 1
    assert carafe["relative"] == pytest.approx(carafe["ms"] / baseline["ms"])
    assert carafe["paper_relative"] == pytest.approx(12.5 / 12.2)


@pytest.mark.parametrize(("table", "row", "size"), [("table2", "resnet50_carafe", 64), ("table8", "upernet_resnet50_carafe", 64)])
def test_other_tasks_are_measured_alike(table, row, size):
    found = rows(f"table={table}", f"rows=[{row}]", f"size=[{size},{size}]", "rounds=0")
    baseline = row.removesuffix("_carafe")
    assert set(found) == {baseline, row}
    for name in ("parameters", "flops"):
        assert found[row][name] > found[baseline][name]
    assert found[row]["relative"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("table=table15", "table must be among table1, table2.*'table15'"),
        ("rows=[caraffe]", "rows must be among nearest, .*carafe, got 'caraffe'"),
    ],
)
def test_unknown_names_are_answered_with_the_known(override, message):
    with pytest.raises(ValueError, match=message):
        rows(override)


def test_command_writes_its_table(tmp_path, capsys):
    GlobalHydra.instance().clear()
    options = ["table=table3", "rows=[max_pool]", "overrides=['scale=small']", "size=[96,96]", "rounds=1", f"hydra.run.dir={tmp_path}"]
    call("bench", "models", *options)
    assert "max_pool" in capsys.readouterr().out
    with (tmp_path / "models.csv").open() as file:
        assert [row["row"] for row in csv.DictReader(file)] == ["conv", "max_pool"]
