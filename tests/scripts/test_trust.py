"""A checkpoint or run folder from elsewhere runs no code: it may name what conf/ names, and what the command line trusts."""

import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from carafepp.scripts.common.checkpoints import load_task
from carafepp.scripts.common.run_folders import read_config
from carafepp.scripts.common.trust import DOCUMENTED, check_config, find_foreign, known_targets, read_yaml
from carafepp.tasks.runs import BestCheckpoint
from commands import call
from configurations import choices, compose_config
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from training import read_result

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "data" / "run_of_0.1.0"
# what the attacks write; the test runs in an empty folder
OWNED = "owned"

ATTACKS = {
    "torch.hub.load": {"repo_or_dir": "hub", "model": "model", "source": "local", "trust_repo": True},
    "sympy.sympify": {"a": f"__import__('pathlib').Path('{OWNED}').touch()"},
    "numpy.save": {"file": f"./{OWNED}", "arr": [1]},
    "logging.FileHandler": {"filename": OWNED},
    "shutil.copyfile": {"src": "hub/hubconf.py", "dst": OWNED},
    "builtins.open": {"file": OWNED, "mode": "w"},
    "torch.save": {"obj": 1, "f": OWNED},
    "carafepp.tasks.runs.write_atomically": {"path": {"_target_": "pathlib.Path", "_args_": [OWNED]}, "text": "text"},
    "os.system": {"command": f"touch {OWNED}"},
    "subprocess.getoutput": {"cmd": f"touch {OWNED}"},
    "hydra.utils.get_method": {"path": "os.system"},
    "hydra.utils.get_object": {"path": "hubconf.model"},
    "hydra.utils.instantiate": {"config": {"_target_": "builtins.open", "file": OWNED, "mode": "w"}, "_recursive_": False},
    "functools.partial": {"_args_": [{"_target_": "hydra.utils.get_method", "path": "os.system"}, f"touch {OWNED}"]},
    "carafepp.tasks.runs.os.system": {"command": f"touch {OWNED}"},
    "carafepp.scripts.common.jobs.subprocess.getoutput": {"cmd": f"touch {OWNED}"},
    "carafepp.tasks.scenes.Scenes.__init__": {},
    "torch.optim.lr_scheduler.LambdaLR": {},
}
# attacks that Hydra itself does not stop
WORKING = ["torch.hub.load", "sympy.sympify", "numpy.save", "logging.FileHandler", "shutil.copyfile", "builtins.open", "torch.save"]
WORKING += ["carafepp.tasks.runs.write_atomically"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(f"def model():\n    open({OWNED!r}, 'w').close()\n")
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def put(config: dict, place: str, value: object) -> None:
    """Set the value at a dotted place of a configuration."""
    *parents, last = place.split(".")
    for name in parents:
        config = config[int(name)] if isinstance(config, list) else config.setdefault(name, {})
    config[last] = value


def poison(folder: Path, place: str, value: object) -> None:
    """Put a value into the configuration of a run folder and of its checkpoint."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    put(checkpoint["config"], place, value)
    torch.save(checkpoint, folder / "last.ckpt")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    put(config, place, value)
    (folder / "config.yaml").write_text(yaml.dump(config))


def use(command: str, folder: Path, *more: str) -> None:
    """Predict with, evaluate or resume the run of a folder."""
    where = f"hydra.run.dir={folder.parent}/out"
    image = ROOT / "docs" / "scenes.jpg"
    arguments = {
        "predict": [f"checkpoint={folder}/last.ckpt", f"images={image}", where],
        "eval": [f"checkpoint={folder}/last.ckpt", "trainer.enable_progress_bar=false", where],
        "train": [f"resume={folder}"],
    }[command]
    call(command, *arguments, *more)


def list_readers(folder: Path, command: str) -> list[Callable[[], object]]:
    """List the functions that read a run folder and a checkpoint, and a command, which calls one of them."""
    return [lambda: read_config(folder), lambda: load_task(folder / "last.ckpt"), lambda: use(command, folder)]


# each with one of the commands
COMMANDS = itertools.cycle(["predict", "eval", "train"])


@pytest.mark.parametrize(("target", "command"), zip(ATTACKS, COMMANDS, strict=False))
def test_an_attack_is_refused_by_name_before_anything_is_called(folder, command, target):
    poison(folder, "task.optimizer", {"_target_": target, **ATTACKS[target]})
    for read in list_readers(folder, command):
        with pytest.raises(ValueError, match=rf"names .*{re.escape(target)} \(task\.optimizer\._target_\)"):
            read()
    assert not list(Path.cwd().glob(f"{OWNED}*"))


@pytest.mark.parametrize("target", WORKING)
def test_the_attacks_are_real(folder, target):
    try:
        instantiate(OmegaConf.create({"_target_": target, **ATTACKS[target]}))
    except InstantiationException:
        assert target == "sympy.sympify", "its result is not an expression"
    assert list(Path.cwd().glob(f"{OWNED}*"))


OPEN = {"_target_": "builtins.open", "file": OWNED, "mode": "w"}
PLACES = [
    *("model", "data", "trainer", "logger", "backbone.block", "task", "task.schedule", "task.model.backbone.stem", "data.train.transforms"),
    *("data.collate", "trainer.plugins", "trainer.callbacks", "trainer.logger", "trainer.strategy", "extra", "run.choices.task"),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrap", ["bare", "in a list", "partial", "as an argument", "of a known partial"])
def test_an_attack_is_found_at_every_place(folder, place, wrap):
    value = {
        "bare": OPEN,
        "in a list": [1, [{"a": OPEN}]],
        "partial": OPEN | {"_partial_": True},
        "as an argument": {"_target_": "torchvision.transforms.v2.Compose", "_args_": [[OPEN]], "_recursive_": False},
        "of a known partial": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": OPEN},
    }[wrap]
    poison(folder, place, value)
    message = r"names builtins\.open \(" + re.escape(place)
    with pytest.raises(ValueError, match=message):
        read_config(folder)
    with pytest.raises(ValueError, match=message):
        load_task(folder / "last.ckpt")
    assert not list(Path.cwd().glob(f"{OWNED}*"))


@pytest.mark.parametrize(
    "spelling",
    ["os.system", " torch.optim.SGD", "torch.optim.SGD ", "torch..optim.SGD", "torch.optim", "", None, 1, ["torch.optim.SGD"], {}],
)
def test_a_target_is_known_by_its_exact_name_only(spelling):
    with pytest.raises(ValueError, match="names"):
        check_config({"task": {"_target_": spelling}}, (), "file")


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${data.train}", "a${now:%Y}", "${oc.decode:${x}}"])
@pytest.mark.parametrize("place", ["task.optimizer._target_", "data.root", "task.optimizer.lr"])
def test_interpolations_are_refused(folder, place, value):
    poison(folder, place, value)
    for read in (lambda: read_config(folder), lambda: load_task(folder / "last.ckpt")):
        with pytest.raises(ValueError, match=f"refers to something else at {place}"):
            read()


SHARDS = {"_target_": "carafepp.tasks.shards.Shards"}
ADDRESSES = ["pipe:touch owned", "{pipe,x}:touch owned", "a.tar::pipe:touch owned", "s3://b/{0..9}.tar", "https://host/a.tar", "file:a.tar"]


@pytest.mark.parametrize(("address", "command"), zip(ADDRESSES, COMMANDS, strict=False))
def test_shards_from_commands_and_addresses_are_refused(folder, command, address):
    for given, place in (({"shards": address}, "shards"), ({"_args_": [[address]], "_partial_": True}, "_args_.0.0")):
        poison(folder, "data.train", SHARDS | given)
        for read in list_readers(folder, command):
            with pytest.raises(ValueError, match=re.escape(f"(data.train.{place})")):
                read()
    assert not list(Path.cwd().glob(f"{OWNED}*"))


def test_addresses_are_trusted_by_scheme():
    config = {"data": {"train": SHARDS | {"shards": "pipe:aws s3 cp s3://bucket/{0..9}.tar -"}}}
    assert list(find_foreign(config)) == ["pipe:", "s3:"]
    check_config(config, ["pipe:", "s3:"], "file")
    with pytest.raises(ValueError, match="names pipe:"):
        check_config(config, "s3:", "file")
    check_config({"data": {"train": SHARDS | {"shards": "/data/train-{0000..0127}.tar"}}}, (), "file")


@pytest.mark.parametrize(
    "options",
    [
        *({"version": "/elsewhere"}, {"name": "../elsewhere"}, {"sub_dir": "~"}, {"filename_suffix": "/../x"}, {"log_dir": "a\\b"}),
        *({"settings": {"x_executable": "run"}}, {"settings": {"host": "h"}}, {"_args_": [{"x": "y"}]}, {"base_url": "https://host"}),
    ],
)
def test_a_logger_stays_in_the_run_folder(options):
    for name in ("TensorBoardLogger", "WandbLogger"):
        target = f"lightning.pytorch.loggers.{name}"
        with pytest.raises(ValueError, match="names"):
            check_config({"logger": {"_target_": target, **options}}, (), "file")
        check_config({"logger": {"_target_": target, "name": "", "version": "tensorboard", "offline": True, "tags": ["a"]}}, (), "file")


def test_own_modules_are_trusted_by_the_command_line(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder.parent)
    module = "import subprocess\nfrom carafepp.models.carafe import CARAFE\nclass Own(CARAFE): ...\n"
    (folder.parent / "trusted_samplers.py").write_text(module)
    (folder.parent / "trusted_other.py").write_text(module)
    poison(folder, "task.model.downsample._target_", "trusted_samplers.Own")
    for command in ("predict", "eval", "train"):
        with pytest.raises(ValueError, match=r"names trusted_samplers\.Own \(task\.model\.downsample\._target_\)"):
            use(command, folder)
        with pytest.raises(ValueError, match="names"):
            use(command, folder, "trust=trusted")
        use(command, folder, "trust=[trusted_other,trusted_samplers]")
    assert read_result(folder)["steps"] == 20
    # what a trusted module imports is not trusted
    for name in ("trusted_samplers.subprocess.getoutput", "trusted_samplers.Own.__init__.__globals__.get"):
        with pytest.raises(ValueError, match="names"):
            check_config({"task": {"_target_": name}}, "trusted_samplers", "file")


def test_resume_takes_no_other_override(folder):
    with pytest.raises(ValueError, match=r"no other override except trust= and data\.epochs=, got seed=1"):
        use("train", folder, "trust=torch.optim", "seed=1")


def test_paths_in_a_checkpoint_delete_nothing(folder):
    """Lightning deletes the file that the state of its callback names as the earlier best checkpoint, or the whole folder."""
    other = folder.parent / "other"
    other.mkdir()
    (other / "victim").touch()
    evil = f"{folder}/../other"
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("ModelCheckpoint"))
    checkpoint["callbacks"][key] |= {
        **dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), evil),
        **{"dirpath": str(folder), "best_k_models": {evil: torch.tensor(-1.0)}, "kth_value": torch.tensor(-1.0)},
    }
    torch.save(checkpoint, folder / "last.ckpt")
    # the state has an effect only if there is a best checkpoint
    shutil.copy(folder / "last.ckpt", folder / "best.ckpt")
    use("train", folder)
    assert (other / "victim").exists()
    assert read_result(folder)["steps"] == 20


@pytest.mark.parametrize("place", ["best_model_path", "kth_best_model_path", "last_model_path", "dirpath", "best_k_models"])
@pytest.mark.parametrize("evil", ["{}/../other/victim", "{}/..", "../victim", "/victim", "file:///victim", "memory://victim", "~"])
def test_paths_in_the_state_of_the_best_checkpoint_are_not_restored(folder, place, evil):
    (folder / "best.ckpt").touch()
    callback, best = BestCheckpoint(folder, "val/top1", "max"), str(folder / "best.ckpt")
    path, score = evil.format(folder), torch.tensor(0.5)
    honest = {"best_model_score": score, "kth_value": score, "best_k_models": {best: score}, "last_model_path": "", "dirpath": str(folder)}
    state = honest | {"best_model_path": best, "kth_best_model_path": best}
    callback.load_state_dict(state | {place: {path: score} if place == "best_k_models" else path})
    assert callback.best_k_models == {best: score}
    assert (callback.best_model_path, callback.kth_best_model_path, callback.last_model_path) == (best, best, "")
    assert (callback.dirpath, callback.kth_value) == (str(folder), score)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        *(BOMB, "a: &a\n  b: *a\n", "a: &a {b: 1}\nc:\n  <<: *a\n", "[" * 100_000, "- " * 100_000, "a: " + "{a: " * 50_000),
        *("x: y\n" * 1_000_000, "a: [1, 2", "- 1\n- 2\n", "text", "", "a: !!python/object/apply:os.system ['touch owned']", "a: 1\na: 2\n"),
        "x: " + "1" * 100_000,
    ],
)
def test_a_configuration_that_is_a_bomb_or_damaged_is_refused_in_a_second(folder, text):
    (folder / "config.yaml").write_text(text)
    start = time.thread_time()
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_config(folder)
    assert time.thread_time() - start < 1
    assert not list(Path.cwd().glob(f"{OWNED}*"))


def test_a_large_configuration_is_read_in_a_second(tmp_path):
    config = {"task": {"class_names": [f"class {i}" for i in range(10_000)]}}
    (tmp_path / "config.yaml").write_text(yaml.dump(config))
    start = time.thread_time()
    check_config(config, (), "file")
    assert time.thread_time() - start < 1
    assert read_yaml(tmp_path / "config.yaml") == config


def test_a_checkpoint_that_is_a_bomb_is_refused_in_a_second(folder):
    bomb: list = ["x"]
    for _ in range(30):
        bomb = [bomb] * 10
    endless: list = []
    endless.append(endless)
    for value in (bomb, endless, {1, 2}, torch.ones(2), "a: 1", b"x"):
        for place in ("data.train", "config"):
            checkpoint = torch.load(OLD / "last.ckpt", weights_only=True)
            put(checkpoint if place == "config" else checkpoint["config"], place, value)
            torch.save(checkpoint, folder / "last.ckpt")
            start = time.thread_time()
            if value == "a: 1" and place != "config":
                load_task(folder / "last.ckpt")
                continue
            with pytest.raises(ValueError, match=r"last\.ckpt"):
                load_task(folder / "last.ckpt")
            assert time.thread_time() - start < 2


def collect(node: object) -> set[str]:
    """The import paths that a configuration names."""
    if isinstance(node, list):
        return set().union(*map(collect, node))
    if not isinstance(node, dict):
        return set()
    return set().union(*map(collect, node.values())) | ({node["_target_"]} if "_target_" in node else set())


def test_a_file_may_name_exactly_what_the_configuration_names():
    named = set().union(*(collect(yaml.safe_load(path.read_text())) for path in (ROOT / "conf").rglob("*.yaml")))
    read_data = {f"carafepp.tasks.own_data.describe_{what}" for what in ("coco", "label_maps", "class_folders")}
    assert read_data < named
    assert known_targets() == named - read_data | DOCUMENTED
    assert not DOCUMENTED & named
    for name in sorted(known_targets()):
        home = get_object(name)
        assert callable(home)
        # a class or a builder of ours, a class of Lightning's or torch's: nothing that reads, writes or runs files by its name
        assert name.split(".")[0] in ("carafepp", "lightning", "torch", "torchvision")
        # find_classifier only looks for the path of a file, which the `weights` of a network read as tensors
        assert isinstance(home, type) or name.startswith(
            (
                *("carafepp.models.", "carafepp.tasks.optimization.", "carafepp.tasks.detection.collate"),
                "carafepp.tasks.pretrained.find_classifier",
            )
        )
    documented = {
        name for path in (ROOT / "docs").glob("*.md") for name in re.findall(r"_target_[=:] ?(carafepp\.[\w.]+)", path.read_text())
    }
    assert documented <= known_targets()


def test_old_import_paths_are_known():
    assert set((ROOT / "tests" / "data" / "targets_of_0.1.0.txt").read_text().split()) <= known_targets()


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_can_be_resumed(experiment):
    for more in (["scale=small", "logger=tensorboard"], ["scale=paper", "logger=wandb", "data.root=/data"]):
        cfg = compose_config("train", f"experiment={experiment}", *more)
        OmegaConf.set_struct(cfg, False)
        del cfg.resume
        check_config(OmegaConf.to_container(cfg, resolve=True), (), "file")


def test_a_sweep_trusts_what_its_command_line_names(tmp_path, monkeypatch):
    (tmp_path / "swept_samplers.py").write_text("from carafepp.models.samplers import Bilinear\nclass Own(Bilinear): ...\n")
    arguments = ["scale=small", "data.train.length=8", "data.train.size=32", "data.val.length=2", "data.val.size=32", "data.batch_size=4"]
    arguments += ["data.epochs=1", "upsampler._target_=swept_samplers.Own", "+upsampler._partial_=true"]
    monkeypatch.syspath_prepend(tmp_path)
    # of the process of the job
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    call("train", "-m", *arguments, f"hydra.sweep.dir={tmp_path}/sweep")
    assert read_result(tmp_path / "sweep" / "0")["steps"] == 2
