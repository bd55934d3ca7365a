"""The pages of results: their tables and figures are those of the runs in docs/results, and no table mixes the study with earlier runs."""

import html
import json
import re
from importlib import import_module

import pytest
from pages import DOCS
from report_runs import write_run

STUDY = ("setting=detection_study", "weights_root=runs")
# AP of rows by seed, in docs/results/FOLDER; the study has other scores than the earlier runs of the same seeds
SCORES = {
    "table4/nearest": {0: 0.30, 1: 0.32, 2: 0.31},
    "table4/carafe": {0: 0.36, 1: 0.35, 2: 0.37},
    "study/table3/conv": {0: 0.40, 1: 0.41, 2: 0.42, 3: 0.40},
    "study/table4/carafe": {0: 0.42, 1: 0.44, 2: 0.43},
    "study/control/shorter_training": {0: 0.35, 1: 0.36, 2: 0.38},
    "study/control/no_finest_level": {0: 0.41, 1: 0.39, 2: 0.42},
}


@pytest.fixture
def comparisons(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    return import_module("comparisons")


@pytest.fixture
def results(comparisons):
    return import_module("results")


@pytest.fixture
def protocol(comparisons):
    return import_module("protocol")


@pytest.fixture
def plots(comparisons):
    pytest.importorskip("matplotlib", reason="needs the extra `viz`")
    return import_module("plots")


@pytest.fixture
def few_runs(tmp_path, monkeypatch, comparisons, protocol):
    """Put earlier runs and runs of the study in the place of docs/results."""
    for place, scores in SCORES.items():
        row, study = place.removeprefix("study/"), place.startswith("study/")
        for seed, score in scores.items():
            metrics = {f"val/box_{name}": score for name in ("AP", "AP50", "APs", "APm", "APl")}
            folder = write_run(tmp_path / f"{place}_{seed}", seed, metrics, *(STUDY if study else ()), row=row)
            found = json.loads((folder / "result.json").read_text()) | {"cpu_seconds": 3600.0}
            # a control has another table than the folder of its row
            table = "table4" if row.startswith("control/") else row.partition("/")[0]
            found["choices"]["experiment"], found["overrides"][0] = table, f"experiment={table}"
            (folder / "result.json").write_text(json.dumps(found))
    for module in (comparisons, protocol):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    comparisons.read_settings.cache_clear()
    yield tmp_path
    comparisons.read_settings.cache_clear()


def test_plots_show_the_data_of_today(plots):
    for file, (collect, _) in plots.PLOTS.items():
        told = re.search(r"<dc:description>(.*?)</dc:description>", (DOCS / file).read_text(), re.DOTALL)
        assert json.loads(html.unescape(told[1])) == collect(), f"docs/{file} shows other data: run `python docs/plots.py`"


def test_pages_have_the_tables_of_the_runs(results):
    for page in results.PAGES:
        assert "<!-- results" in page.read_text()
        assert results.fill_page(page.read_text()) == page.read_text(), f"{page} is older than docs/results: run `python docs/results.py`"


def test_a_claim_is_shown_by_its_interval_alone(comparisons, results):
    found = [
        comparisons.judge(comparisons.Difference(mean, half, 3)) for mean, half in ((2, 1.9), (2, 2.1), (-2, 2.1), (-2, 1.9), (2, None))
    ]
    assert found == ["**shown**", "not shown", "not shown", "**contradicted**", "no runs"]
    claims = results.tabulate_claims().splitlines()
    # as the tables of docs/results.md and of the paper print them
    assert claims[4].endswith(" | +6.11 [+1.77, +10.44], 3 seeds | **shown** |")
    assert claims[5].endswith("dB | +1.35 |  | no runs | -0.11 [-0.68, +0.46], 3 seeds | not shown |")


def test_gains_are_those_of_the_tables(plots):
    gains = {(table, gain[0]): gain[1:] for table, found in plots.collect_gains().items() for gain in found["gains"]}
    # as docs/results.md and the paper print them
    assert gains["table4", "carafe"] == [6.92, 6.17, 1.3]
    assert gains["table7", "backbone, masks"] == [0.57, 2.64, 1.7]
    assert gains["table2", "resnet50_carafe"] == [0.28, 5.01, 1.03]
    assert gains["table10", "partial_conv_carafe"][2] == -0.36


def test_the_study_is_compared_with_the_study_and_earlier_runs_with_earlier_ones(few_runs, comparisons, results):
    # the baseline of the study is the same configuration in Table III
    assert comparisons.find_values("table4", "nearest", "bbox", "AP", study=True) == pytest.approx({0: 40, 1: 41, 2: 42, 3: 40})
    assert comparisons.find_values("table4", "nearest", "bbox", "AP") == pytest.approx({0: 30, 1: 32, 2: 31})
    assert comparisons.find_values("table4", "deconv", "bbox", "AP", study=True) == {}
    line = next(line for line in results.tabulate_claims().splitlines() if line.startswith("| better than interpolation"))
    # differences 6, 3, 6 of the earlier runs and 2, 3, 1 of the study, of which seed 3 has no pair
    earlier, study = "+5.00 [+0.70, +9.30], 3 seeds | **shown**", "+2.00 [-0.48, +4.48], 3 seeds | not shown"
    assert line.endswith(f"| +1.30 | {study} | {earlier} |")


def test_controls_are_compared_with_the_baseline_of_their_table(few_runs, protocol):
    shorter, *_, whole = protocol.tabulate_controls().splitlines()[2:]
    assert shorter.endswith("| 40.8 ± 1.0 | -5.0, -5.0, -4.0 | -4.7 [-6.1, -3.2] | **resolved** |")
    assert whole.endswith("| 40.8 ± 1.0 | +1.0, -2.0, +0.0 | -0.3 [-4.1, +3.5] | not resolved |")


def test_half_widths_before_and_after_have_the_seeds_and_hours_that_are_missing(few_runs, protocol, monkeypatch):
    upsamplers = [(comparison, wanted) for comparison, wanted in protocol.MAIN if comparison.words == "upsamplers"]
    monkeypatch.setattr(protocol, "MAIN", upsamplers)
    (line,) = protocol.tabulate_widths().splitlines()[2:]
    # a deviation of 1: four seeds have a half width of 3.18 / 2, three one of 4.30 / 1.73; a run takes an hour, a classifier as planned
    assert line.endswith("| 2.0 | 3 | 4.3 | 3 | 2.5 | 1.0 | 4 | 2.1 |"), line
    monkeypatch.setattr(protocol, "MAIN", [(protocol.Comparison("", "table7", "fpn", "published", "bbox", "AP"), 2.0)])
    with pytest.raises(FileNotFoundError, match="no pairs of table7/fpn and published"):
        protocol.tabulate_widths()


def test_the_plan_counts_the_runs_of_the_study(few_runs, protocol):
    lines = {line.split(" | ")[0].strip("| "): line for line in protocol.tabulate_plan().splitlines()[2:]}
    # three runs of each of three rows, of eleven with five seeds; two controls and CARAFE++ take an hour, the others as planned
    left = (3 * 2 * 3600 + 8 * 5 * protocol.OPTIONS.seconds.table4) / 3600
    assert lines["table4"] == f"| table4 | 11 | 5 | 55 | 9 | 9.00 | {left:.1f} |"
    assert lines["table3"].startswith("| table3 | 6 | 5 | 30 | 4 | 4.00 |")
    assert " | 13 | 13.00 | " in lines["all"]


def test_the_figure_has_the_gains_of_both_kinds_of_runs(few_runs, plots):
    found = plots.collect_gains()["table4"]
    assert [gain[:2] for gain in found["gains"]] == [["carafe", 5.0]]
    assert [gain[:2] for gain in found["study"]] == [["carafe", 2.0], ["no_finest_level", -0.33], ["shorter_training", -4.67]]
    assert plots.list_labels(found) == ["carafe", "no_finest_level", "shorter_training"]
