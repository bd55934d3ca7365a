"""What a training shows while it runs, and what trainings and sweeps print at their end."""

import csv
import io
import json
import logging
import sys
import time
from types import SimpleNamespace

import pytest
from carafepp.scripts.common import sweep_folder
from carafepp.scripts.running import progress
from carafepp.scripts.running.ending import describe_sweep
from carafepp.scripts.running.progress import PassesBar
from commands import call
from report_runs import write_run
from training import TINY, train_in

SHOWN = [word for word in TINY if "enable_progress_bar" not in word and "data.epochs" not in word]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train 15 steps in one and a half passes over 40 images."""
    folder = tmp_path_factory.mktemp("endings") / "run"
    handler, lines = logging.Handler(), []
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("carafepp.tasks.runs")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        train_in(folder, *SHOWN, "data.batch_size=4", "data.epochs=1.5")
    logger.removeHandler(handler)
    return folder, lines


def test_log_and_table_hold_losses_rates_and_scores(run):
    folder, lines = run
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    steps = [row for row in rows if row["train/loss"]]
    assert len(steps) == 15
    assert all(float(row["lr"]) > 0 for row in steps[:-1])
    assert len(lines) == len(rows)
    assert lines[0].startswith(f"step 1: train/loss {float(rows[0]['train/loss']):.6g}")
    assert ", lr 0.00" in lines[0]
    assert any("val/mIoU" in line for line in lines)


def test_bar_counts_steps_and_passes_and_goes_on_after_a_resume(run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    monkeypatch.chdir(folder.parent)
    call("train", f"resume={folder}", "data.epochs=2")
    said = capsys.readouterr()
    lines = [line for line in said.err.replace("\r", "\n").splitlines() if "step" in line]
    assert lines[0].startswith("pass 2 of 2:")
    assert "15/20" in lines[0]
    assert "20/20" in lines[-1]
    assert "mIoU=" in lines[-1]
    assert "Epoch" not in said.err
    # only a terminal has a bar of the validation
    assert "validation" not in said.err
    scores = json.loads((folder / "result.json").read_text())["metrics"]
    assert f"scores:      mIoU {scores['val/mIoU']:.4f}, pixel_accuracy {scores['val/pixel_accuracy']:.4f}" in said.out
    assert "best:        mIoU " in said.out
    assert "pictures:    run/pictures.png" in said.out
    assert "carafepp-predict checkpoint=run/best.ckpt images=PHOTOGRAPHS" in said.out
    assert (folder / "pictures.png").exists()
    assert "carafepp-report runs=run" in said.out


@pytest.mark.parametrize(("terminal", "drawn"), [(True, 5), (False, 2)])
def test_a_file_gets_few_lines_of_the_bar(terminal, drawn, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    bar = PassesBar()
    data = SimpleNamespace(train=[0] * 40, batch_size=4, epochs=1.5)
    batches = SimpleNamespace(total=SimpleNamespace(processed=0))
    fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=batches))
    options = {"num_training_batches": 4, "accumulate_grad_batches": 1, "progress_bar_metrics": {}, "datamodule": data}
    trainer = SimpleNamespace(fit_loop=fit_loop, **options)
    monkeypatch.setattr(progress, "get_data", lambda trainer: data)
    bar.on_train_start(trainer, None)
    for step in range(1, 5):
        batches.total.processed = step
        time.sleep(0.12)
        bar.on_train_batch_end(trainer, None, None, None, step)
    bar.on_train_end(trainer, None)
    lines = {line.strip() for line in stream.getvalue().split("\r")} - {""}
    assert len({line.partition("[")[0] for line in lines}) == drawn
    assert any("4/4" in line for line in lines)


def test_sweep_ends_with_its_table_and_the_next_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def finish(folder, trust):
        job = int(folder.name)
        (folder / "config.yaml").unlink()
        if job == 1:
            (folder / "error.txt").write_text("ValueError: no such thing\n")
            raise RuntimeError(f"{folder}: ValueError: no such thing")
        done = write_run(folder / "done", job, {"val/mIoU": 0.5 + job / 10}, "samplers=carafe")
        (done / "result.json").rename(folder / "result.json")

    monkeypatch.setattr("carafepp.scripts.train.train_in_subprocess", finish)
    with pytest.raises(SystemExit, match="ValueError: no such thing"):
        call("train", "-m", "scale=small", "seed=0,1,2", "hydra.sweep.dir=sweep", raises=False)
    out = capsys.readouterr().out
    assert "sweep/1: failed (ValueError: no such thing)" in out
    assert "0.6000 ± 0.1414" in out
    assert "carafepp-report runs=sweep writes the table, plots and pictures" in out
    assert sweep_folder.started == []


def test_sweep_without_a_finished_run_or_a_folder_has_no_table(tmp_path):
    assert describe_sweep(tmp_path / "nowhere") == ""
    assert describe_sweep(tmp_path) == ""
