"""A Slurm cluster on this machine alone, with the Debian packages slurm-wlm and munge, for the tests marked `slurm`."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


def available() -> bool:
    """Return whether the programs are installed and can be started; slurmd requires root."""
    return os.name == "posix" and os.geteuid() == 0 and all(map(shutil.which, PROGRAMS))


def find_free_port() -> int:
    """Return a port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start a cluster of one node with two CPUs, and yield the environment variables that its commands need.

    It has two partitions: jobs of `high` preempt jobs of `low`, the default.
    """
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(f"""
ClusterName=one
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={find_free_port()}
SlurmdPort={find_free_port()}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 MaxTime=60 State=UP
PartitionName=high Nodes=localhost PriorityTier=2 PreemptMode=OFF MaxTime=60 State=UP
""")
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    with contextlib.ExitStack() as stack:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            time.sleep(0.5)
        deadline = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, env=environment).stdout:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the cluster has not started after a minute: see the logs in {folder}")
            time.sleep(0.5)
        # jobs would outlive the daemons
        stack.callback(cancel_jobs, environment)
        yield environment


def cancel_jobs(environment: dict[str, str]) -> None:
    """Cancel all jobs and wait until they are gone."""
    subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=environment)
    subprocess.run(["scancel", "--user=root"], env=environment)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and subprocess.run(["squeue", "-h"], capture_output=True, env=environment).stdout:
        time.sleep(0.5)
