"""Sweeps of real trainings: a failed or killed job is recorded and stops no other, and the same command finishes the missing jobs."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from carafepp.scripts.reporting import read_runs
from commands import call, command_line, count_rows, find_processes, run_line
from omegaconf import OmegaConf
from training import TINY


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc, which only Linux has")
def test_joblib_sweep_with_a_failed_and_a_killed_job_is_killed_and_resumed_to_completion(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = tmp_path / "sweep"
    # job 0 fails: its batch is larger than the training set
    arguments = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={sweep}", *TINY, "data.batch_size=400,4,5"]
    command = command_line("train", *arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=tmp_path, env=environment
    )
    trained = {1: False, 2: False}
    deadline = time.monotonic() + 600
    while not all(trained.values()) or not (sweep / "1" / "error.txt").exists():
        assert first.poll() is None, "the sweep ended before its jobs had trained"
        assert time.monotonic() < deadline
        # job 1 is killed; job 2 is stopped, so that it is unfinished when the whole sweep is killed
        for job, how in ((1, signal.SIGKILL), (2, signal.SIGSTOP)):
            if not trained[job] and count_rows(sweep / str(job)) >= 4:
                for process in find_processes(f"resume='{sweep}/{job}'"):
                    os.kill(process, how)
                trained[job] = True
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    while find_processes(str(sweep)):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    runs, problems = read_runs([sweep])
    assert runs == []
    assert f"{sweep}/0: failed (" in problems[0]
    assert "batch_size must not exceed the training samples" in problems[0]
    assert f"{sweep}/1: failed (killed by SIGKILL" in problems[1]
    assert f"{sweep}/2: unfinished" in problems[2]
    trained_before = count_rows(sweep / "2")

    second = run_line(command, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert second.returncode != 0, "job 0 still cannot be"
    runs, problems = read_runs([sweep])
    assert [run.folder.name for run in runs] == ["1", "2"]
    assert len(problems) == 1
    for run, steps in zip(runs, (60, 48), strict=True):
        assert json.loads((run.folder / "result.json").read_text())["steps"] == steps
        # every step appears once, and one validation
        assert [int(line.split(",")[0]) for line in (run.folder / "metrics.csv").read_text().splitlines()[1:]] == [
            *range(1, steps + 1),
            steps,
        ]
    assert trained_before < count_rows(sweep / "2")


FINISHED = {"choices": {}, "overrides": [], "metrics": {}, "parameters": 1, "flops": 1, "seconds": 1.0}


def test_sweep_leaves_finished_jobs_and_refuses_folders_of_others(tmp_path, capsys):
    told = ["scale=small", "data.epochs=1"]
    for job, seed in enumerate((0, 7)):
        folder = tmp_path / str(job)
        folder.mkdir()
        OmegaConf.save({"run": {"overrides": [f"seed={seed}", *told]}}, folder / "config.yaml")
        (folder / "result.json").write_text(json.dumps(FINISHED | {"seed": seed}))
    with pytest.raises(SystemExit, match=f"{tmp_path}/1 holds a run of seed=7 scale=small data.epochs=1: choose another folder"):
        call("train", "-m", *told, "seed=0,1", f"hydra.sweep.dir={tmp_path}", raises=False)
    said = capsys.readouterr()
    assert f"{tmp_path}/0 is finished" in said.out
    assert not (tmp_path / "1" / "error.txt").exists(), "the run that lies there has not failed"
