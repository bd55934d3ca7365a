"""Runs from the command line repeat bit by bit, survive a kill and never share a folder; their checkpoints can be used afterwards."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from carafepp.tasks.runs import RunRecord
from commands import call, command_line, run_command, wait_for_rows
from PIL import Image
from training import ON_CPU, read_result

SMALL = [
    "scale=small",
    *("data.train.length=64", "data.train.size=48", "data.val.length=8", "data.val.size=48"),
    *("data.batch_size=4", "data.val_batch_size=8", "data.epochs=2", "model.fpn_dim=16", "model.ppm_dim=8"),
    *("log_every_n_steps=1", "checkpoint_every_n_steps=3", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"),
]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """One run from start to end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run_command("train", *SMALL, "samplers=carafe", f"hydra.run.dir={folder}", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


def test_run_folder_is_complete(whole_run):
    assert {"config.yaml", "metrics.csv", "result.json", "last.ckpt", "best.ckpt", "pictures.png"} <= set(os.listdir(whole_run))
    found = read_result(whole_run)
    assert found["choices"]["samplers"] == "carafe"
    assert found["steps"] == 32
    assert 0 <= found["metrics"]["val/mIoU"] <= 1
    assert found["parameters"] > 0
    assert found["flops"] > 0
    rows = (whole_run / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 32 + 4  # a header, a row for each step, a row for each validation


def test_checkpoints_hold_only_tensors_and_primitives(whole_run):
    checkpoint = torch.load(whole_run / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_resumes_bit_identically(whole_run, tmp_path, workers):
    folder = tmp_path / "killed"
    arguments = [*SMALL, "samplers=carafe", f"data.workers={workers}", f"hydra.run.dir={folder}"]
    process = subprocess.Popen(command_line("train", *arguments), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = 11 + 9 * bool(workers)  # in the middle of an epoch, between two checkpoints
    wait_for_rows(folder, rows, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "result.json").exists(), "the run must be killed before its end for this test to say anything"
    done = run_command("train", f"resume={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_result(folder)["weights_sha256"] == read_result(whole_run)["weights_sha256"]
    assert (folder / "metrics.csv").read_text() == (whole_run / "metrics.csv").read_text()
    assert read_result(folder)["metrics"] == read_result(whole_run)["metrics"]


def test_multirun_writes_a_folder_a_job_and_report_tables_them(tmp_path, capsys):
    call("train", "-m", *SMALL, "data.epochs=1", "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep")
    first, second = read_result(tmp_path / "sweep" / "0"), read_result(tmp_path / "sweep" / "1")
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["weights_sha256"] != second["weights_sha256"]

    (tmp_path / "sweep" / "broken").mkdir()
    (tmp_path / "sweep" / "broken" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "sweep" / "broken" / "result.json").write_text('{"metrics": ')
    (tmp_path / "sweep" / "unfinished").mkdir()
    (tmp_path / "sweep" / "unfinished" / "config.yaml").write_text("seed: 0\n")
    capsys.readouterr()
    call("report", f"runs={tmp_path}/sweep")
    said = capsys.readouterr().out
    assert f"{tmp_path}/sweep/broken/result.json: broken" in said
    assert f"{tmp_path}/sweep/unfinished: unfinished" in said
    mean = (first["metrics"]["val/mIoU"] + second["metrics"]["val/mIoU"]) / 2
    assert f"{mean:.4f} ±" in said
    assert (tmp_path / "sweep" / "compare.png").exists()


def test_folder_in_use_or_finished_is_not_shared(whole_run, tmp_path):
    with pytest.raises(RuntimeError, match="already holds a run"):
        call("train", *SMALL, f"hydra.run.dir={whole_run}")
    code = "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-P", "-c", code, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match="in use by another run"):
        call("train", *SMALL, f"hydra.run.dir={tmp_path}")
    holder.communicate("\n")


def test_eval_repeats_the_run_scores(whole_run, tmp_path):
    call("eval", f"checkpoint={whole_run}/last.ckpt", *ON_CPU, f"hydra.run.dir={tmp_path}")
    scores = json.loads((tmp_path / "eval.json").read_text())["metrics"]
    assert scores["val/mIoU"] == pytest.approx(read_result(whole_run)["metrics"]["val/mIoU"], rel=1e-6)


def test_predict_takes_any_photographs(whole_run, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (61, 47, 4), dtype=np.uint8)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    Image.fromarray(pixels[..., :3]).save(photographs / "odd.jpg")
    Image.fromarray(pixels[..., 0]).save(photographs / "grey.png")
    Image.fromarray(pixels).save(photographs / "rgba.png")
    Image.fromarray(pixels[:1, :1, :3]).save(photographs / "pixel.png")
    rotated = Image.fromarray(pixels[..., :3])
    exif = rotated.getexif()
    exif[274] = 6  # orientation: turned by 90 degrees
    rotated.save(photographs / "turned.jpeg", exif=exif)
    (photographs / "broken.jpg").write_bytes((photographs / "odd.jpg").read_bytes()[:200])
    (photographs / "notes.txt").write_text("not an image")
    out = tmp_path / "out"
    call("predict", f"checkpoint={whole_run}/best.ckpt", f"images={photographs}", f"hydra.run.dir={out}")
    said = capsys.readouterr().out
    assert f"skipped: image {photographs}/broken.jpg" in said
    assert "5 of 6 images predicted" in said
    sizes = {path.name: Image.open(path).size for path in out.glob("*.png") if path.name != "figure.png"}
    # small photographs are enlarged to a side of at least 320
    widths = {"odd.jpg.png": 6 * 47, "grey.png.png": 6 * 47, "rgba.png.png": 6 * 47, "pixel.png.png": 320, "turned.jpeg.png": 6 * 61}
    assert {name: width for name, (width, _) in sizes.items()} == widths
    # the legend of the classes that were found is below
    heights = {"odd.jpg.png": 6 * 61, "grey.png.png": 6 * 61, "rgba.png.png": 6 * 61, "pixel.png.png": 320, "turned.jpeg.png": 6 * 47}
    assert all(sizes[name][1] >= height for name, height in heights.items())
    assert any(sizes[name][1] > height for name, height in heights.items())


# the losses of inpainting have other names than the others, and a task of one's own may log a loss of its validation
@pytest.mark.parametrize(
    ("name", "value"), [("train/loss", "nan"), ("train/loss", "inf"), ("train/adversarial", "nan"), ("val/loss", "nan")]
)
def test_a_loss_that_is_not_a_number_is_named(name, value, tmp_path, caplog):
    prefix = f"{name.split('/')[0]}/"
    metrics = {name: torch.tensor(float(value)), "train/loss_box_reg": torch.tensor(1.0), "val/AP": torch.tensor(float("nan"))}
    record = RunRecord(tmp_path, 1, {})
    record._add(SimpleNamespace(callback_metrics=metrics, global_step=20, is_global_zero=True), prefix, {})
    (warning,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert warning.getMessage().startswith(f"step 20: {name} is NaN or infinite; if it stays so, the training has diverged")
