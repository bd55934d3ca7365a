"""A sweep on a Slurm cluster: a job of two tasks is preempted, requeued and resumed."""

import json
import os
import signal
import subprocess
import time

import pytest
from carafepp.scripts.reporting import read_runs
from commands import command_line, count_rows, find_processes
from slurm_cluster import available, cluster
from training import TINY

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="needs root, and Debian's slurm-wlm and munge"),
]

LAUNCHER = ["hydra/launcher=submitit_slurm", "hydra.launcher.setup=[]", "hydra.launcher.timeout_min=10", "hydra.launcher.max_num_timeout=3"]
TASKS = ["hydra.launcher.tasks_per_node=2", "hydra.launcher.cpus_per_task=1", "trainer.devices=2"]


def test_preempted_job_of_two_tasks_is_requeued_and_resumed(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    sweep = tmp_path / "sweep"
    (tmp_path / "slurm").mkdir()
    arguments = [*LAUNCHER, *TASKS, f"hydra.sweep.dir={sweep}", *TINY, "data.batch_size=4", "data.epochs=20", "seed=0"]
    with cluster(tmp_path / "slurm") as environment:
        options = {"env": environment | {"OMP_NUM_THREADS": "1"}, "cwd": tmp_path}
        command = command_line("train", "-m", *arguments)
        with open(tmp_path / "said", "w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, **options)
        deadline = time.monotonic() + 600
        while count_rows(sweep / "0") < 12:
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.02)
        # the tasks are stopped until Slurm kills them, so that the job cannot finish first
        for task in find_processes("submitit.core._submit", str(sweep)):
            os.kill(task, signal.SIGSTOP)
        # this job takes both CPUs, so Slurm requeues the first
        subprocess.run(["sbatch", "--wait", "-p", "high", "-n2", "-o", "/dev/null", "--wrap", "true"], check=True, timeout=300, **options)
        # without this, Slurm waits two minutes before it restarts a job
        subprocess.run(["scontrol", "update", "JobId=1", "StartTime=now"], check=True, **options)
        assert count_rows(sweep / "0") < 200, "the job must be preempted before its end for this test to say anything"
        assert process.wait(600) == 0, (tmp_path / "said").read_text()
    # Slurm appends the output of a requeued job to its earlier output
    logs = "".join(path.read_text() for path in sweep.glob(".submitit/*/*_0_log.out"))
    assert logs.count("Starting with JobEnvironment") == 2
    runs, problems = read_runs([sweep])
    assert problems == []
    assert json.loads((runs[0].folder / "result.json").read_text())["steps"] == 200
    steps = [int(line.split(",")[0]) for line in (runs[0].folder / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == [*range(1, 201), 200]
