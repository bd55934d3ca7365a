"""Files of a run are whole at every moment: also when their disk is full, or when a run ends while it writes them."""

import contextlib
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from carafepp.scripts.common.run_folders import lock_folder, record_failure
from carafepp.scripts.running.train import train
from carafepp.tasks.checkpoint_files import CheckpointFiles
from carafepp.tasks.pictures import Pictures
from carafepp.tasks.runs import LastCheckpoint
from carafepp.tasks.writing import remove_partial_files, replace_file, write_atomically
from omegaconf import OmegaConf
from training import TINY, read_result, train_in


@contextlib.contextmanager
def limit_files(size: int):
    """Let this process write no file beyond `size` bytes, so that a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("before", [None, "earlier"])
def test_file_that_cannot_be_written_is_named_and_the_earlier_one_stays(before, tmp_path):
    path = tmp_path / "result.json"
    if before:
        write_atomically(path, before)
    with limit_files(1000), pytest.raises(OSError, match=r"File too large: '.*/result\.json'"):
        write_atomically(path, "a" * 100_000)
    with pytest.raises(ZeroDivisionError), replace_file(path) as file:
        file.write(f"half {1 / 0}")
    assert [found.read_text() for found in tmp_path.iterdir()] == ([before] if before else [])


def test_checkpoint_on_a_full_disk_leaves_the_earlier_one_and_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    path, files = tmp_path / "run" / "last.ckpt", CheckpointFiles()
    files.save_checkpoint({"step": 1}, path)
    with limit_files(10_000), pytest.raises(OSError, match=r"File too large: '.*/last\.ckpt'"):
        files.save_checkpoint({"step": torch.zeros(10_000)}, path)
    assert files.load_checkpoint(path) == {"step": 1}
    assert [found.name for found in path.parent.iterdir()] == ["last.ckpt"]
    files.save_checkpoint({"step": 2}, str(path))
    assert files.load_checkpoint(path) == {"step": 2}


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    for name in (".metrics.csv.12.partial", ".last.ckpt.3.partial", "last.ckpt", ".hidden"):
        (tmp_path / name).touch()
    with lock_folder(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", ".hidden", ".lock"}
    remove_partial_files(tmp_path / "missing")


def test_reason_of_a_failure_survives_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="reason"), record_failure(tmp_path / "missing"):
        raise ValueError("the reason")


def test_run_that_ends_between_two_of_its_files_writes_the_others_when_it_continues(tmp_path, monkeypatch):
    """At the end of the only validation after best.ckpt and last.ckpt, and at the end of the training before the pictures."""
    # a disk for temporary files is not needed, be it full or not
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    folder = tmp_path / "run"

    def end(*arguments: object) -> None:
        raise RuntimeError("ends here")

    with monkeypatch.context() as patch:
        saves = LastCheckpoint.on_validation_end
        patch.setattr(LastCheckpoint, "on_validation_end", lambda *arguments: (saves(*arguments), end()))
        with pytest.raises(RuntimeError, match="ends here"):
            train_in(folder, *TINY, "data.batch_size=4", "data.epochs=0.5")
    cfg = OmegaConf.load(folder / "config.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "on_fit_end", end)
        with pytest.raises(RuntimeError, match="ends here"):
            train(cfg, folder)
    assert not (folder / "result.json").exists(), "a run without pictures would count as finished"
    train(cfg, folder)
    whole = train_in(tmp_path / "whole", *TINY, "data.batch_size=4", "data.epochs=0.5")
    assert read_result(folder)["weights_sha256"] == read_result(whole)["weights_sha256"]
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (folder, whole)]
    assert names[0] == names[1] > {"best.ckpt", "pictures.png"}
    best = [torch.load(run / "best.ckpt", weights_only=True) for run in (folder, whole)]
    assert best[0]["global_step"] == best[1]["global_step"] == 5
    assert Path(folder / "pictures.png").read_bytes() == (whole / "pictures.png").read_bytes()
