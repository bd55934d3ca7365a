"""The tables of measurements in docs/ are those of docs/measurements, and `make gpu` measures, whatever happens to its steps."""

import csv
import json
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from carafepp.scripts.benching.models import MODES, choose_rows
from carafepp.scripts.benching.samplers import count_flops_per_pixel, load_slots
from carafepp.scripts.common.paper import read_paper
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

ROOT = Path(__file__).parent.parent
PAGES = ("performance.md", "performance_gpu.md", "performance_networks.md", "samplers.md", "support.md")


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return import_module("measure")


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return import_module("tables")


@pytest.mark.parametrize("name", PAGES)
def test_pages_have_the_measured_tables(name, tables):
    text = (ROOT / "docs" / name).read_text()
    assert "<!-- measured" in text
    assert tables.fill_page(text) == text


@pytest.mark.parametrize("group", ["upsampler", "downsampler"])
def test_the_page_of_samplers_has_the_counts_of_every_sampler(group, tables):
    """A new sampler needs `carafepp-bench samplers` for docs/measurements, and a line in docs/sampler_sources.csv."""
    rows, _ = tables.read_run("cpu", "samplers.csv", ROOT / "docs" / "measurements")
    shape = tables.COMPARED[group]
    found = {row["sampler"]: row for row in rows if (row["group"], row["shape"]) == (group, shape)}
    slots = load_slots(group)
    assert set(tables.read_sources(group)) == set(found) == set(slots)
    for name, slot in slots.items():
        with torch.device("meta"):
            module = slot(256)
        assert int(found[name]["parameters"]) == sum(parameter.numel() for parameter in module.parameters()), name
        assert found[name]["guided"] == str(getattr(module, "needs_guide", False)), name
        assert float(found[name]["flops_per_pixel"]) == pytest.approx(count_flops_per_pixel(slot, json.loads(shape)), rel=1e-4), name


def write_run(folder: Path, about: dict, name: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    (folder / "about.json").write_text(json.dumps(about))
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_table_is_that_of_the_newest_run_on_its_kind_of_machine(tmp_path, tables):
    shape = {"shape": [1, 8, 4, 6], "up": 2, "down": 1, "kernel_size": 5, "groups": 1, "dtype": "float16", "layout": "contiguous"}
    for date, kind, ms in (("2026-01-02", "gpu", 0.002), ("2026-01-03", "cpu", 5), ("2026-01-01", "gpu", 7)):
        rows = [
            {"provider": "triton", "mode": "forward", "ms": ms, "copies": 1.5, "relative": 1, **shape},
            {"provider": "bilinear", "mode": "forward", "ms": 2 * ms, "copies": 3, "relative": 2, **shape},
        ]
        write_run(tmp_path / f"{date}_{kind}", {"kind": kind, "date": date, "device": f"X {date}", "torch": "2.0"}, "times.csv", rows)
    # of the operator, an earlier run tells nothing
    figures = {"mode": "forward", "ms": 0.01, "copies": 9, "relative": 5, **shape}
    rows = [{"provider": name, **figures} for name in ("triton", "mmcv", "bilinear")]
    write_run(tmp_path / "others", {"kind": "gpu", "date": "2025-12-31"}, "others.csv", rows)
    page = tables.fill_page("# T\n\n<!-- measured operator gpu -->\nold\n<!-- end -->\n\nrest\n", tmp_path)
    assert "*X 2026-01-02, 2026-01-02, PyTorch 2.0.*" in page
    assert "**Forward**\n\n| features | type | us | x copy | bilinear | mmcv |" in page
    assert "| 1 x 8 x 4 x 6, up 2, k 5 | float16, NCHW | 2 | 1.5 | 2 | 5 |" in page
    assert "Backward" not in page
    assert "old" not in page
    assert page.endswith("<!-- end -->\n\nrest\n")
    assert tables.fill_page(page, tmp_path) == page
    with pytest.raises(FileNotFoundError, match=r"on a gpu has models\.csv"):
        tables.fill_page("<!-- measured networks gpu -->\n<!-- end -->", tmp_path)


def test_networks_have_ratios_with_intervals_and_shares(tables):
    row = {"table": "table4", "row": "carafe", "size": "[800, 1333]", "batch": "1", "step_batch": "2", "parameters": "41926480"}
    row |= {"flops": "436300000000", "inference_ms": "20.5", "inference_fps": "48.78", "inference_relative": "1.0449"}
    row |= {"inference_relative_low": "1.01", "inference_relative_high": "1.07", "inference_operator_share": "0.012"}
    row |= {"inference_rest_share": "0.034", "inference_peak_mb": "1234.5", "paper_fps": "12.2", "paper_relative": "1.0246"}
    counts, inference = [table.splitlines()[-1] for table in tables.tabulate_networks([row]).split("\n\n")[1::2]]
    assert counts == "| table4/carafe | 800 x 1333 | 41,926,480 | 436.3 |"
    assert inference == "| table4/carafe | 1 | 20.5 | 1.04 [1.01, 1.07] | 1.2 % | 3.4 % | 1,234 |"
    assert tables.tabulate_fps([row | {"paper_fps": ""}]) == "Not measured yet."
    assert tables.tabulate_fps([row]).splitlines()[-1] == "| table4/carafe | 800 x 1333 | 48.8 | 1.04 [1.01, 1.07] | 12.2 | 1.02 |"


def write_script(rows: int, then: str) -> tuple[str, ...]:
    """Return arguments of Python that write a table of some rows into the run folder of a step, then do something."""
    write = "; ".join(
        [
            "import pathlib, sys, time",
            "folder = pathlib.Path(sys.argv[1].removeprefix('hydra.sweep.dir=')) / '0'",
            "folder.mkdir(parents=True)",
            f"(folder / 'times.csv').write_text('a,b\\n' + {rows} * '1,2\\n')",
        ]
    )
    return ("-c", f"{write}; {then}")


def test_steps_run_whatever_happens_to_the_others(tmp_path, measure, capsys):
    child = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    steps = [
        measure.Step("first one", write_script(2, "pass"), 30, "times.csv"),
        measure.Step("broken", write_script(3, "sys.exit('no such device')"), 30, "times.csv"),
        measure.Step("hangs", write_script(4, child), 1, "times.csv"),
        # the last step has all of the remaining time
        measure.Step("last", write_script(1, "time.sleep(1.1)"), 1, "times.csv"),
    ]
    start = time.monotonic()
    outcomes = measure.run_steps(steps, tmp_path / "run", {"PATH": "/usr/bin"})
    assert time.monotonic() - start < 30
    assert [outcome.state for outcome in outcomes] == ["passed", "failed (1)", "out of time", "passed"]
    assert "no such device" in capsys.readouterr().out
    # only the figures of steps that passed count
    measure.write_measurements(outcomes, tmp_path / "figures", {"kind": "gpu"})
    assert (tmp_path / "figures" / "times.csv").read_text() == "a,b\n" + 3 * "1,2\n"
    assert json.loads((tmp_path / "figures" / "about.json").read_text()) == {"kind": "gpu"}


def test_no_step_starts_without_time(tmp_path, measure):
    (outcome,) = measure.run_steps([measure.Step("late", ("-c", "pass"), 30)], tmp_path, {}, budget=0)
    assert outcome.state == "no time left"
    measure.write_measurements([outcome], tmp_path / "figures", {})
    assert not (tmp_path / "figures").exists()


def test_limits_are_within_eight_minutes(measure):
    assert sum(step.seconds for step in measure.STEPS) <= measure.BUDGET == 480


def split_sweep(step) -> tuple[str, list[list[str]]]:
    """Return the configuration of a step and the overrides of each of its jobs."""
    words = step.arguments[step.arguments.index("carafepp.scripts.bench") + 1 :]
    command, overrides = ("", words) if words[0] == "-m" else (words[0], words[1:])
    assert overrides[:2] == ("-m", "device=cuda")
    name = f"bench_{command}" if command else "bench"
    parsed = OverridesParser.create().parse_overrides(list(overrides[1:]))
    (batch,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return name, batch


def test_every_step_composes(measure):
    tests, _, *benches = measure.STEPS
    assert all((ROOT / argument).exists() for argument in tests.arguments if argument.startswith("tests/"))
    jobs = []
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        for step in benches:
            name, batch = split_sweep(step)
            configs = [compose(name, overrides=overrides) for overrides in batch]
            jobs.append((step.csv, len(configs)))
            for config in configs:
                assert config.rounds >= 5
                if name == "bench_models":
                    assert choose_rows(read_paper()[0], config.table, config.rows)
                    assert set(config.modes) <= set(MODES)
                elif name in ("bench", "bench_module"):
                    assert len(config.op.shape) == 4
    assert jobs == [
        *[("times.csv", count) for count in (20, 16, 4, 1)],
        ("samplers.csv", 1),
        ("attention.csv", 1),
        ("module.csv", 2),
        ("module.csv", 2),
        ("models.csv", 2),
        ("models.csv", 1),
        ("models.csv", 1),
        ("models.csv", 4),
    ]


def test_the_kernels_of_the_bench_are_compiled_before(measure, monkeypatch):
    cases = list(import_module("compile_kernels").list_cases([*measure.STEPS[1].arguments[2:]]))
    # forward and backward in two data types and two memory formats
    assert len(cases) == 8 * sum(len(json.loads(f"[{shapes}]")) for shapes in measure.MAPS.values())
    compiled = []
    monkeypatch.setattr("triton.compile", lambda source, options: compiled.append((source.fn.__name__, options)))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    assert import_module("compile_kernels").compile_case(cases[0]) == len(compiled) == 1
    assert compiled[0][0] == "banded_forward"


def test_a_step_of_a_bench_leaves_its_table(tmp_path, measure, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    step = measure.bench("module", "tiny", 300, "op=up2", "op.shape=[1,4,3,3],[1,4,2,2]", "rounds=1", "threads=1")
    step = step._replace(arguments=tuple(argument.replace("cuda", "cpu") for argument in step.arguments))
    outcomes = measure.run_steps([step], tmp_path / "run", measure.find_packages(tmp_path / "packages"))
    assert [outcome.state for outcome in outcomes] == ["passed"], outcomes[0].log.read_text()
    measure.write_measurements(outcomes, tmp_path / "figures", {})
    rows = list(csv.DictReader((tmp_path / "figures" / "module.csv").open()))
    assert [(row["shape"], row["part"]) for row in rows if row["part"] == "module"] == [
        ("[1, 4, 3, 3]", "module"),
        ("[1, 4, 2, 2]", "module"),
    ]
    assert not (tmp_path / "packages").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_one_sentence_says_so(measure, capsys):
    assert measure.main() == 2
    assert capsys.readouterr().err == f"make gpu needs a GPU, and PyTorch {torch.__version__} finds none.\n"


def test_missing_packages_come_from_wheels(tmp_path, measure, monkeypatch, capsys):
    wheels = import_module("wheels")
    monkeypatch.setattr(wheels, "PACKAGES", {"carafepp_absent": "carafepp-absent"})
    monkeypatch.setattr(wheels, "WHEELS", tmp_path)
    environment = wheels.find_packages(tmp_path / "packages")
    assert "carafepp-absent is missing and could not be installed from wheels/" in capsys.readouterr().out
    assert environment["PYTHONPATH"].split(":")[:2] == [str(ROOT), str(tmp_path / "packages")]
