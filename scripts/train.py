"""carafepp-train: train and evaluate a configuration, or resume an interrupted run."""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ..tasks.writing import write_atomically
from .common import sweep_folder
from .common.app import app, dispatch
from .common.arguments import NULLABLE, parse_override
from .common.comments import list_choices, read_defaults
from .common.jobs import check_interruption, interruptible_sweep, is_job, read_repeated_job, shares_process, train_in_subprocess
from .common.options import read_options
from .common.own_data import make_paths_absolute, read_own_data
from .common.paper import read_paper
from .common.plan import describe_plan, plan_sweeps
from .common.processes import is_first_process
from .common.results import is_finished
from .common.run_folders import lock_folder, read_config, record_failure
from .common.trust import find_foreign


def find_missing_keys(node: object, key: str = "") -> list[str]:
    """List the keys without a value in an unresolved configuration, including those that only interpolations refer to."""
    if isinstance(node, dict):
        return [missing for name, child in node.items() for missing in find_missing_keys(child, f"{key}.{name}".lstrip("."))]
    return [key] if node == "???" else []


def start_run(cfg: DictConfig, folder: Path) -> DictConfig:
    """Resolve the configuration of a new run and write it to the run folder.

    Raises:
        RuntimeError: the folder already holds a run.
        ValueError: a mandatory key has no value, the row is not one of the experiment, or the experiment, the setting or the network is
            one of another task.
    """
    first = is_first_process()
    if first and (folder / "config.yaml").exists():
        raise RuntimeError(f"{folder} already holds a run: continue it with resume={folder}, or choose another folder")
    with record_failure(folder):
        OmegaConf.set_struct(cfg, False)
        del cfg.resume, cfg.trust
        choices = {group: choice for group, choice in HydraConfig.get().runtime.choices.items() if not group.startswith("hydra/")}
        choices |= {group: None for group in NULLABLE if choices.get(group) == "none"}
        check_row(choices.get("experiment"), choices.get("row"))
        check_task(choices, cfg.pop("networks", ()))
        if missing := find_missing_keys(OmegaConf.to_container(cfg)):
            own = str(choices.get("setting")).endswith("_own")
            hint = "it is the folder of your own data" if own else "scale=small needs no data set"
            raise ValueError(f"this configuration needs {', '.join(f'{key}=...' for key in missing)}; {hint}")
        read_own_data(cfg)
        cfg.run = {"choices": choices, "overrides": list(HydraConfig.get().overrides.task)}
        OmegaConf.resolve(cfg)
        make_paths_absolute(cfg)
        if first:
            write_atomically(folder / "config.yaml", OmegaConf.to_yaml(cfg))
    return cfg


def check_row(experiment: str | None, row: str | None) -> None:
    """Check that a row of the paper's tables is given with the experiment of its table.

    Raises:
        ValueError: no experiment is given, or that of another table.
    """
    table, tables = (row or "").partition("/")[0], read_paper()[0]
    if table in tables and experiment != table and (experiment is None or experiment in tables):
        raise ValueError(f"row={row} needs experiment={table}, got experiment={experiment or 'null'}")


def check_task(choices: Mapping[str, str | None], networks: Sequence[str]) -> None:
    """Check that the task is that of the experiment, of the setting and of the network; choices of your own are not checked.

    Args:
        choices: the choice of every group.
        networks: the choices of `model` that learn the task.

    Raises:
        ValueError: the experiment, whose table would otherwise get a run without its scores, the setting or the network is that of another
            task.
    """
    task, experiment, setting, model = (choices.get(group) for group in ("task", "experiment", "setting", "model"))
    for entry in read_defaults(f"experiment/{experiment}"):
        if isinstance(entry, dict) and entry.get("override /task", task) != task:
            raise ValueError(f"experiment={experiment} has task={entry['override /task']}, got task={task}")
    if task not in list_choices("task"):
        return
    if setting in list_choices("setting") and setting.partition("_")[0] != task:
        raise ValueError(f"setting={setting} needs task={setting.partition('_')[0]}, got task={task}")
    if model in list_choices("model") and model not in networks:
        raise ValueError(f"model must be a network for task={task}, one of {', '.join(networks)}, got {model}")


def check_resume(arguments: Sequence[str]) -> None:
    """Check the folder of resume= before Hydra, whose output folder it is, creates it.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the path is a file, or there are several folders.
    """
    for argument in arguments:
        override = parse_override(argument)
        if override is None or override.key_or_group != "resume":
            continue
        value = override.value()
        if override.is_sweep_override() or {"-m", "--multirun"} & {*arguments}:
            raise ValueError(f"resume= continues one run, and takes neither several folders nor -m, got {' '.join(arguments)}")
        folder = Path(value if isinstance(value, str) else argument.partition("=")[2])
        if folder.is_file():
            raise ValueError(f"resume={folder} is a file: give the run folder, resume={folder.parent}")
        if not (folder / "config.yaml").is_file() and "${" not in argument:
            jobs = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
            hint = f"; it is the folder of a sweep, whose runs are {', '.join(jobs)}" if jobs else ""
            raise FileNotFoundError(f"resume={folder} is not a run folder: it has no config.yaml{hint}")


def check_resume_overrides(overrides: Iterable[str]) -> None:
    """Check that a resumed run keeps its own configuration, except for its length.

    Raises:
        ValueError: an override is none of resume=, trust= and data.epochs=.
    """
    if others := [override for override in overrides if not override.startswith(("resume=", "trust=", "data.epochs="))]:
        raise ValueError(
            "resume= continues a run with its own configuration and takes no other override except trust= and data.epochs=, "
            f"got {' '.join(others)}"
        )


@app("train", check=check_resume)
def run(cfg: DictConfig) -> None:
    """Train in Hydra's output folder.

    `resume=FOLDER` continues the run of that folder, with `data.epochs=N` to another length. A repeated sweep continues its unfinished
    runs.
    """
    check_interruption()
    folder = Path(HydraConfig.get().runtime.output_dir)
    if not is_first_process():
        # only the first process reports progress; every process reports warnings and errors
        logging.disable(logging.INFO)
    overrides, lengthens = HydraConfig.get().overrides.task, False
    with lock_folder(folder):
        if not OmegaConf.is_missing(cfg, "resume"):
            check_resume_overrides(overrides)
            trust, epochs = cfg.trust, OmegaConf.select(cfg, "data.epochs")
            cfg = read_config(folder, trust)
            if any(override.startswith("data.epochs=") for override in overrides):
                from .common.run_length import change_length

                lengthens = change_length(cfg, epochs, folder)
        elif is_job() and (folder / "config.yaml").exists():
            # the folder may contain the names of this command line
            trust = find_foreign(OmegaConf.to_container(cfg, resolve=True))
            cfg = read_repeated_job(folder, trust)
        else:
            cfg = start_run(cfg, folder)
            trust = find_foreign(read_options(cfg))
        if is_finished(folder) and not lengthens:
            if is_first_process():
                print(f"{folder} is finished: see result.json")
            return
        if not shares_process():
            with record_failure(folder):
                # torch takes seconds to import, and everything before needs none of it
                from .running.train import train

                train(cfg, folder)
                if is_first_process() and not is_finished(folder):
                    raise RuntimeError(f"the training ended without {folder / 'result.json'}: continue it with resume={folder}")
            if is_first_process():
                print(f"run folder: {folder}")
            return
    train_in_subprocess(folder, trust)


def print_sweep() -> None:
    """Print the table of the sweep that this process has run, if it has run one."""
    if sweep_folder.started:
        from .running.ending import describe_sweep

        print(describe_sweep(sweep_folder.started.pop()))


# the arguments of the sweeps that `plan_paper` has printed, and the folder of their runs
planned: list[tuple[list[list[str]], Path]] = []


@app("train_paper")
def plan_paper(cfg: DictConfig) -> None:
    """Print the plan of all tables, and keep it for `train_paper`, because Hydra cannot start a sweep inside another command."""
    out, sweeps = Path(cfg.out), plan_sweeps(cfg.tables, cfg.seeds)
    print(describe_plan(sweeps, out, cfg.seconds, cfg.jobs), flush=True)
    if not cfg.plan:
        left = (sweep for sweep in sweeps if sweep.count_left(out))
        planned.append(([sweep.write_arguments(out, cfg.jobs) for sweep in left], out))


def train_paper(arguments: Sequence[str] | None = None) -> None:
    """Train all tables of the paper, one sweep after the other, and print the tables. A failed job stops no other.

    Arguments after "--" are overrides of every training.
    """
    given = list(sys.argv[2:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    plan_paper(given[:end])
    if not planned:
        return
    sweeps, out = planned.pop()
    # the same bits for any number of trainings at a time
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failures = []
    with interruptible_sweep():
        for sweep in ([*sweep, *given[end + 1 :]] for sweep in sweeps):
            check_interruption()
            print(f"carafepp-train {' '.join(map(shlex.quote, sweep))}", flush=True)
            try:
                run(sweep)
            except SystemExit as stop:
                if not isinstance(stop.code, str):
                    raise
                failures.append(stop.code)
    sweep_folder.started.clear()
    sweep_folder.started.append(out)
    print_sweep()
    if failures:
        raise SystemExit("\n".join([*failures, "the same command continues what is unfinished or failed"]))


def train(arguments: Sequence[str] | None = None) -> None:
    """Run one configuration, or a sweep. Its `arguments` default to those of the process."""
    sweeps = {"-m", "--multirun"} & {*(sys.argv[1:] if arguments is None else arguments)}
    try:
        with interruptible_sweep() if sweeps else contextlib.nullcontext():
            run(arguments)
    except SystemExit as stop:
        # a job has failed; after a signal, the code is a number
        if isinstance(stop.code, str):
            print_sweep()
        raise
    print_sweep()


main = dispatch(train, paper=train_paper)

if __name__ == "__main__":
    main()
