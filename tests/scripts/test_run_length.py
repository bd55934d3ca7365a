"""Training a run longer than it was: `resume=RUN data.epochs=N`."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from carafepp.scripts.common import run_length
from carafepp.scripts.common.results import is_finished
from carafepp.scripts.reporting import read_runs
from carafepp.tasks.optimization import fast_forward, linear_scaling, stepped
from carafepp.tasks.runs import LastCheckpoint
from carafepp.tasks.segmentation import Segmentation
from commands import call
from omegaconf import OmegaConf
from torch.optim.lr_scheduler import PolynomialLR
from training import TASKS, read_result, train_in

# a validation at the same steps in a training of any length
EVERY_5 = "trainer.val_check_interval=5"


def read_rates(folder: Path) -> list[float]:
    """The learning rate of every step, from metrics.csv."""
    return [float(row["lr"]) for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines()) if row["lr"]]


def read_labels(folder: Path) -> list[str]:
    """The overrides of a run that concern its length."""
    return [label for label in OmegaConf.load(folder / "config.yaml").run.overrides if label.startswith(("data.epochs", "lengthened"))]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished segmentation run of 10 steps, whose schedule ends at 0."""
    return train_in(tmp_path_factory.mktemp("short") / "run", *TASKS["segmentation"], EVERY_5, "data.epochs=1")


@pytest.fixture
def run(short, tmp_path):
    """A copy of the run of 10 steps."""
    return Path(shutil.copytree(short, tmp_path / "run"))


@pytest.mark.parametrize("task", TASKS)
def test_longer_run_with_a_constant_rate_is_that_of_one_training(task, tmp_path):
    arguments = [*TASKS[task], "task.schedule=null", EVERY_5]
    run = train_in(tmp_path / "run", *arguments, "data.epochs=1")
    before = (run / "result.json").read_text()
    call("train", f"resume={run}", "data.epochs=2")
    whole = train_in(tmp_path / "whole", *arguments, "data.epochs=2")
    assert read_result(run)["steps"] == 20
    for name in ("weights_sha256", "metrics", "curve", "steps"):
        assert read_result(run)[name] == read_result(whole)[name]
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    best = [torch.load(folder / "best.ckpt", weights_only=True)["global_step"] for folder in (run, whole)]
    assert best[0] == best[1]
    assert (run / "result_10_steps.json").read_text() == before


def test_longer_run_has_the_rates_of_the_longer_schedule(run, tmp_path, capsys):
    whole = train_in(tmp_path / "whole", *TASKS["segmentation"], EVERY_5, "data.epochs=1.5")
    capsys.readouterr()
    call("train", f"resume={run}", "data.epochs=1.5")
    rates, expected = read_rates(run), read_rates(whole)
    assert len(rates) == 15
    assert rates[:10] != expected[:10]
    assert rates[10:] == expected[10:]
    said = next(line for line in capsys.readouterr().out.splitlines() if "continues with data.epochs=1.5" in line)
    assert said.startswith(f"{run}: 10 of 15 steps are trained, with data.epochs=1;")
    assert said.endswith(f"the learning rate changes from {rates[9]:.6g} to {expected[9]:.6g}")


def test_run_is_lengthened_again_and_its_files_agree(run):
    for epochs in (1.5, 2):
        call("train", f"resume={run}", f"data.epochs={epochs}")
        config = OmegaConf.load(run / "config.yaml")
        assert config.data.epochs == epochs
        assert is_finished(run)
        assert read_result(run)["overrides"] == config.run.overrides
        assert torch.load(run / "last.ckpt", weights_only=True)["config"] == OmegaConf.to_container(config)
    assert read_labels(run) == ["lengthened_from=1", "data.epochs=2", "lengthened_from=1.5"]
    assert [json.loads((run / f"result_{steps}_steps.json").read_text())["steps"] for steps in (10, 15)] == [10, 15]
    rows = [int(row["step"]) for row in csv.DictReader((run / "metrics.csv").read_text().splitlines())]
    assert rows == sorted([*range(1, 21), 5, 10, 15, 20])
    assert [found.folder for found in read_runs([run])[0]] == [run]


def test_length_that_is_the_same_changes_nothing(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.iterdir() if path.suffix != ".log"}
    call("train", f"resume={run}", "data.epochs=1")
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("place", ["before the configuration", "before a step", "between two checkpoints", "after a validation"])
def test_a_kill_neither_loses_the_shorter_result_nor_takes_it_for_the_longer(run, place, monkeypatch):
    shorter = (run / "result.json").read_text()

    def kill(*arguments):
        raise RuntimeError("killed")

    def kill_late(self, trainer, *arguments):
        if trainer.global_step == (13 if place == "between two checkpoints" else 16):
            kill()
        whole(self, trainer, *arguments)

    whole = LastCheckpoint.on_train_batch_end
    with monkeypatch.context() as patch:
        if place == "before the configuration":
            patch.setattr(run_length, "write_atomically", kill)
        elif place == "before a step":
            patch.setattr(LastCheckpoint, "on_train_batch_start", kill)
        else:
            patch.setattr(LastCheckpoint, "on_train_batch_end", kill_late)
        with pytest.raises(RuntimeError, match="killed"):
            call("train", f"resume={run}", "data.epochs=2")
    assert not is_finished(run)
    assert (run / "result_10_steps.json").read_text() == shorter
    assert read_runs([run])[0] == []
    assert (run / "last.ckpt").exists()
    # without its configuration, the longer training has not begun
    longer = [] if place != "before the configuration" else ["data.epochs=2"]
    call("train", f"resume={run}", *longer)
    assert not (run / "error.txt").exists()
    assert (read_result(run)["steps"], len(read_rates(run))) == (20, 20)
    assert read_labels(run) == ["data.epochs=2", "lengthened_from=1"]
    assert read_rates(run)[10] > 0
    assert (run / "result_10_steps.json").read_text() == shorter


def test_a_kill_before_the_new_configuration_leaves_the_shorter_run(run, monkeypatch):
    shorter = read_result(run)
    (run / "result.json").rename(run / "result_10_steps.json")
    call("train", f"resume={run}")
    assert {**read_result(run), "seconds": 0, "cpu_seconds": 0} == {**shorter, "seconds": 0, "cpu_seconds": 0}


def test_length_of_an_unfinished_run_changes(tmp_path, monkeypatch, capsys):
    whole = LastCheckpoint.on_train_batch_end

    def kill(self, trainer, *arguments):
        if trainer.global_step == 7:
            raise RuntimeError("killed")
        whole(self, trainer, *arguments)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_end", kill)
        with pytest.raises(RuntimeError, match="killed"):
            train_in(run, *TASKS["segmentation"], EVERY_5, "data.epochs=2")
    before = (run / "config.yaml").read_text()
    with pytest.raises(ValueError, match=rf"data\.epochs=0\.6 is 6 steps, and {run} has trained 6: give more"):
        call("train", f"resume={run}", "data.epochs=0.6")
    assert (run / "config.yaml").read_text() == before
    call("train", f"resume={run}", "data.epochs=1")
    assert f"{run}: 6 of 10 steps are trained, with data.epochs=2" in capsys.readouterr().out
    assert read_result(run)["steps"] == 10
    assert read_rates(run)[-1] == 0
    assert not list(run.glob("result_*"))


def test_best_checkpoint_of_a_moved_run_stays_the_best(run, monkeypatch):
    """last.ckpt holds the best score up to its own validation, and a worse one does not replace best.ckpt."""
    rows = torch.load(run / "last.ckpt", weights_only=True)["callbacks"]["RunRecord"]["rows"]
    scores = [row["val/mIoU"] for row in rows if "val/mIoU" in row]
    best = max(range(len(scores)), key=scores.__getitem__)
    state = torch.load(run / "last.ckpt", weights_only=True)["callbacks"]
    (kept,) = (value for key, value in state.items() if key.startswith("ModelCheckpoint"))
    assert kept == {"best_model_score": torch.tensor(scores[best])}
    content = (run / "best.ckpt").read_bytes()
    log = Segmentation.log
    monkeypatch.setattr(Segmentation, "log", lambda self, name, value, **options: log(self, name, value * 0 - 1, **options))
    call("train", f"resume={run}", "data.epochs=2")
    assert read_result(run)["metrics"]["val/mIoU"] == -1
    assert (run / "best.ckpt").read_bytes() == content


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.epochs=0.5", r"data\.epochs=0\.5 is less than .*run has trained, data\.epochs=1: give more than 1"),
        ("data.epochs=0", "data.epochs must be a number above 0, got 0"),
        ("data.epochs=-1", "data.epochs must be a number above 0, got -1"),
        ("data.epochs=inf", "data.epochs must be a number above 0, got inf"),
        ("data.epochs=nan", "data.epochs must be a number above 0, got nan"),
        ("data.epochs=many", r"data\.epochs=many: data\.epochs takes a number, such as"),
        ("data.epochs=true", r"data\.epochs=true: data\.epochs takes a number, such as"),
        ("data.epochs=null", "data.epochs must be a number above 0, got None"),
        ("data.batch_size=8", r"no other override except trust= and data\.epochs=, got data\.batch_size=8"),
    ],
)
def test_wrong_length_is_named_and_leaves_the_run(run, override, message):
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.suffix != ".log"}
    with pytest.raises(ValueError, match=message):
        call("train", f"resume={run}", override)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not (run / "error.txt").exists()


def test_finished_run_without_its_checkpoint_is_not_trained_again(run):
    (run / "last.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"cannot be trained longer without its last checkpoint, .*last\.ckpt"):
        call("train", f"resume={run}", "data.epochs=2")
    assert is_finished(run)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: PolynomialLR(optimizer, total_iters=50, power=0.9),
        lambda optimizer: linear_scaling(optimizer, 50, batch_size=512),
        lambda optimizer: stepped(optimizer, 50, warmup_iters=10),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50),
    ],
)
@pytest.mark.parametrize("steps", [0, 1, 30, 50])
def test_schedule_forwarded_is_the_schedule_at_that_step(make, steps):
    def build():
        parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": parameters[0]}, {"params": parameters[1], "lr": 0.3}], lr=0.1, momentum=0.9)
        return optimizer, make(optimizer)

    stepped_one, schedule = build()
    for _ in range(steps):
        stepped_one.step()
        schedule.step()
    forwarded, other = build()
    # rates that a checkpoint has left
    for group in forwarded.param_groups:
        group["lr"] = 0
    fast_forward(other, steps)
    assert [group["lr"] for group in forwarded.param_groups] == [group["lr"] for group in stepped_one.param_groups]
    assert other.last_epoch == schedule.last_epoch
