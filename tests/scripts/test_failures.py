"""Wrong uses of the commands: each gives one message, which says what is wrong, where, and what to do."""

import re
import sys

import pytest
from carafepp.scripts.common import failures
from carafepp.scripts.common.comments import list_choices, list_groups, read_all_comments, read_comments
from carafepp.scripts.common.hints import find_hints
from carafepp.scripts.train import check_task
from commands import call, run_command
from configurations import CONF
from hydra.errors import InstantiationException
from hydra.utils import instantiate

# the command line, and what the message must say
WRONG = [
    ("train", r"needs data.root=...; scale=small needs no data set"),
    ("train setting=detection_own", r"needs data.root=...; it is the folder of your own data"),
    ("train data.root=nowhere", r"data.train: FileNotFoundError: nowhere/images/training is missing"),
    ("train task=detection data.root=. data.train.annotations=x", r"data.train: FileNotFoundError: annotations=x does not exist"),
    ("train table4", r"table4: an argument is KEY=VALUE; --help lists the keys"),
    ("train upsmpler=carafe", r"upsmpler: 'upsmpler' is not in the configuration; did you mean 'upsampler'\?"),
    ("train scale=small data.train.lenght=3", r"'lenght' is not in 'data.train'; did you mean 'length'\?"),
    ("train scale=small data.train.length.x=3", r"'data.train.length' has no keys; add it: \+data.train.length.x=3"),
    ("train scale=tiny", r"scale=tiny does not exist\n  choices: paper, small"),
    ("train scale=small upsampler=carfe", r"upsampler=carfe does not exist; did you mean 'carafe'\?\n  choices: a2u, bilinear"),
    (
        "train scale=small upsampler=my.Sampler",
        r"my.Sampler does not exist\n.*\n  a class of your own: upsampler._target_=my.Sampler",
    ),
    (
        "train scale=small upsampler._target_=my.Sampler upsampler.width=2",
        r"'width' is not in 'upsampler'.*\n  keys .*\n  an option of the class that is not among them: \+upsampler.width=2",
    ),
    ("train -m scale=small upsampler=carfe,carafe", r"upsampler=carfe does not exist; did you mean 'carafe'\?"),
    ("train scale=small upsampler=carafe,bilinear", r"is a sweep, which needs -m"),
    ("train experiment=table44", r"experiment=table44 does not exist; did you mean 'table4'\?\n  choices: .*table2, .*table10"),
    ("train experiment=table4 scale=small row=table4/carfe", r"did you mean 'table4/carafe'\?\n  choices: table4/bilinear,"),
    ("train experiment=table4 scale=small row=carafe", r"row=carafe does not exist; did you mean 'table4/carafe'\?\n  choices: table4/bil"),
    ("train experiment=table4 scale=small row=table44/carafe", r"row=table44/carafe does not exist\n  choices: control.*none, .*table1/"),
    ("train scale=small row=table4/carafe", r"row=table4/carafe needs experiment=table4, got experiment=null"),
    ("train experiment=table3 scale=small row=table4/carafe", r"row=table4/carafe needs experiment=table4, got experiment=table3"),
    ("train experiment=table4 scale=small row=table4/carafe row=table4/gum", r"row is given 2 times: give it once"),
    ("train experiment=table4 scale=small row=[table4/carafe,table4/gum]", r"row takes one choice; -m row=table4/carafe,table4/gum runs"),
    ("train scale=small seed=x", r"seed=x: seed takes a number, such as 0"),
    ("train scale=small seed=true", r"seed takes a number"),
    ("train scale=small channels_last=yes", r"channels_last takes true or false, such as true"),
    ("train scale=small data.batch_size=many", r"data.batch_size takes a number, such as 16"),
    ("train scale=small data.epochs=", r"data.epochs takes a number"),
    (
        "train scale=small data.batch_size=4000",
        r"data.batch_size must not exceed .*, got 4000 .*: give data.batch_size=2000 or less",
    ),
    ("train scale=small data.epochs=0.001", r"data.epochs must be one step or more, got 0.001, of an epoch of 125 steps"),
    ("train scale=small data.epochs=-1", r"data.epochs must be a number above 0, got -1"),
    ("train scale=small data.batch_size=0", r"data.batch_size must be a whole number of at least 1, got 0"),
    ("train scale=small seed=-1", r"seed must be a whole number of at least 0, got -1"),
    ("train scale=small log_every_n_steps=0", r"log_every_n_steps must be a whole number of at least 1, got 0"),
    ("train scale=small trainer.val_check_interval=0", r"trainer.val_check_interval must be a number above 0, got 0"),
    ("train scale=small decoder.dim=0", r"decoder.dim must be a whole number of at least 1, got 0"),
    ("train scale=small decoder.ppm_dim=1.5", r"decoder.ppm_dim must be a whole number of at least 1, got 1.5"),
    ("train scale=small decoder.dim=null", r"decoder.dim must be a whole number of at least 1, got None"),
    ("train scale=small task=detection model.fpn_dim=-4", r"model.fpn_dim must be a whole number of at least 1, got -4"),
    ("train scale=small task=detection model.min_size=[64,96]", r"model.min_size must be a whole number of at least 1, got \[64, 96\]"),
    ("train scale=small task=detection model.anchor_sizes=[8,16]", r"model.anchor_sizes must be a list of 5 numbers, got \[8, 16\]"),
    ("train scale=small task=detection task.sides=[24]", r"task.sides must be a list of 2 numbers, got \[24\]"),
    ("train scale=small task=detection task.sides=24", r"task.sides takes a list, such as task.sides=\[24\]"),
    ("train scale=small task=inpainting task.hole_weight=-1", r"task.hole_weight must be a number of at least 0, got -1"),
    ("train scale=small optimizer.lr=-1", r"optimizer.lr must be a number of at least 0, got -1"),
    ("train scale=small optimizer.lr=nan", r"optimizer.lr must be a number of at least 0, got nan"),
    ("train scale=small +optimizer.betas=[0.9,1.5]", r"optimizer.betas must be a number of at least 0 and below 1, got \[0.9, 1.5\]"),
    ("train scale=small optimizer=null", r"TypeError: optimizer must be a function that builds one, .* got None"),
    ("train scale=small task.schedule.power=-1", r"task.schedule.power must be a number of at least 0, got -1"),
    ("train scale=small task.inference_resize=3", r"task: TypeError: inference_resize must be a function of images, .* got 3"),
    ("train scale=small backbone.deformable=[7]", r"task.model.backbone: deformable must be a list of layers, of 1 to 4, got \[7\]"),
    ("train scale=small model=faster_rcnn", r"model must be a network for task=segmentation, one of upernet, pspnet, psanet, got faster"),
    ("train scale=small task=detection model=upernet", r"model must be a network for task=detection, one of faster_rcnn, .*, got upernet"),
    ("train scale=small setting=detection_small", r"setting=detection_small needs task=detection, got task=segmentation"),
    ("train scale=small class_names=[a,b,c]", r"class_names must cover the 11 classes of data.train, got 3"),
    ("train scale=small task=detection class_names=[a,b]", r"class_names must cover the 10 classes of data.train, got 2"),
    ("train scale=small task=classification num_classes=3", r"num_classes must cover the 10 classes of data.train, got 3"),
    ("train scale=small trainer.max_epochs=null", r"trainer.max_epochs must be 1, because .*, got None"),
    ("train scale=small data.train.size=64.5", r"data.train: size must be a side or \(height, width\) of at least 16 pixels, got 64.5"),
    ("train scale=small trainer.max_epochs=3", r"trainer.max_epochs must be 1, because data.epochs is the number of passes .*, got 3"),
    ("train scale=small task=detection experiment=table9", r"experiment=table9 has task=segmentation, got task=detection"),
    ("train scale=small class_names=[a]", r"task: class_names must be a list of 2 or more names, such as \[cat,dog\], got \['a'\]"),
    ("train scale=small task=classification num_classes=1", r"task: num_classes must be at least 2, got 1"),
    ("train scale=small upsampler=shared", r"upsampler=shared: the slot upsampler@model.NAME=shared takes that of upsampler="),
    ("train scale=small data.epochs=${nokey}", r"data.epochs=\$\{nokey\}: Interpolation key 'nokey' not found"),
    ("train scale=small hydra.run.dir=${nokey}", r"Interpolation key 'nokey' not found"),
    (
        "train scale=small upsampler._target_=my.Sampler",
        r"_target_: my.Sampler cannot be imported .*No module named 'my'.*belongs in the folder of the command",
    ),
    ("train scale=small upsampler=carafe upsampler.kernel_size=4", r"task: kernel_size must be odd"),
    (
        "train scale=small upsampler=carafe +upsampler.foo=1",
        r"task: TypeError: CARAFE .*argument '?foo",
    ),
    ("train scale=small trainer.devices=3x", r"trainer: TypeError: `devices` selected with `CPUAccelerator` should be an int > 0"),
    ("train scale=small trainer.precision=8", r"trainer: Precision 8 is invalid"),
    ("train scale=small hydra/launcher=slurm", r"hydra/launcher=slurm does not exist\n  choices: basic"),
    ("train resume=nowhere", r"resume=nowhere is not a run folder"),
    ("train --config-dir nowhere scale=small", r"Additional config directory '.*nowhere' not found"),
    ("train --config-name nothing", r"nothing"),
    ("train scale=small hydra.run.dir=file/run", r"NotADirectoryError: .*file/run"),
    ("eval", r"give checkpoint=...\n  checkpoint: last.ckpt or best.ckpt of a run folder"),
    ("eval checkpoint=nowhere.ckpt", r"checkpoint=nowhere.ckpt does not exist; give the last.ckpt or best.ckpt of a run folder"),
    ("eval checkpoint=file device=cuda", r"'device' is not in the configuration"),
    ("predict", r"give checkpoint=... images=...\n  checkpoint: .*\n  images: a folder of JPEG and PNG files, or one file"),
    ("predict checkpoint=file images=.", r"checkpoint=file cannot be read \([^\n]*\); give the last.ckpt or best.ckpt of a run folder"),
    ("predict checkpoint=. images=.", r"checkpoint=. is a folder"),
    ("predict checkpoint=file images=. max_side=0", r"max_side must be at least 1 pixel, got 0"),
    ("predict checkpoint=file images=. device=foo", r"device must be cpu, or a device .*, got foo: Expected one of cpu, cuda"),
    ("export checkpoint=file format=onnx device=meta", r"device must be cpu, or a device .*, got meta: it computes nothing"),
    ("report paper digits=-1", r"digits must be a whole number of at least 0, got -1"),
    ("report runs=. metrics=AP", r"metrics takes a list, such as metrics=\[AP\]"),
    ("report runs=nowhere", r"runs=nowhere is not a folder"),
    ("report runs=. digits=x", r"digits takes a number, such as 4"),
    ("report paper format=pdf", r"format must be one of terminal, markdown, latex, or csv for runs, got 'pdf'"),
    ("validate", r"give data=FOLDER in COCO's layout, or annotations=FILE and images=FOLDER"),
    ("validate data=nowhere", r"data=nowhere has neither nowhere/annotations/instances_train2017.json nor"),
    ("validate annotations=file images=.", r"file is not valid JSON"),
    ("scenes", r"give layout=... out=...\n  layout: coco, ade20k, imagenet or places365"),
    ("scenes layout=coc out=x", r"layout must be one of coco, ade20k, imagenet, places365, got 'coc'"),
    ("scenes layout=coco out=file/x", r"NotADirectoryError: .*file"),
    ("scenes layout=coco out=x train=0", r"train must be a whole number of at least 1, got 0"),
    ("bench device=foo", r"device must be cpu, or a device .*, got foo"),
    ("bench threads=0", r"threads must be a whole number of at least 1, got 0"),
    ("bench op.shape=[1,0,8,8]", r"op.shape must be a whole number of at least 1, got \[1, 0, 8, 8\]"),
    ("bench providers=[]", r"providers must be a list of one or more of cpu, .*, got \[\]"),
    ("bench samplers rounds=0 names=[nearest] groups=[upsampler]", r"rounds must be at least 1, got 0"),
    ("bench models size=8 table=table9 rows=[fpn]", r"size must be \[height, width\] in pixels, or null, got 8"),
    ("bench op=up9", r"op=up9 does not exist; did you mean 'up2'\?\n  choices: down2, up2,"),
    ("bench op.shape=[1,2,3]", r"op.shape must be \[N, C, H, W\], got \[1, 2, 3\]"),
    ("bench dtype=float12", r"dtype must be among float16, .*, got 'float12'"),
    ("bench samplers names=[foo]", r"names must be among a2u, .*, got 'foo'"),
    ("bench models table=table99", r"table must be among table1, .*, got 'table99'"),
    ("inspect architectures=[sm_12]", r"architectures must be among sm_80, .*, got 'sm_12'"),
    ("inspect architectures=[]", r"architectures must be a list of one or more of sm_80, .*, got \[\]"),
    ("inspect +sites.x={n:1}", r"a site must have n, channels, height, width that are whole numbers of at least 1, got channels=None"),
    ("tune limit=0", r"limit must be a whole number of at least 1, got 0"),
    ("tune merge=tiles.json", r"merge must be a list of one or more tables of carafepp-tune, such as \[tiles.json\], got tiles.json"),
    ("tune dtypes=[int8]", r"dtypes must be among float16, bfloat16, float32, got 'int8'"),
]


# choices of your own are not known to the checks of tasks
OWN_CHOICES = {"task": "mine", "setting": "detection_small", "model": "upernet"}


@pytest.mark.parametrize("choices", [OWN_CHOICES, OWN_CHOICES | {"task": "detection", "model": "mine"}])
def test_tasks_and_networks_of_your_own_are_not_refused(choices):
    check_task(choices, ["faster_rcnn"])


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_use_gives_one_message(line, message, tmp_path, monkeypatch, capsys):
    name, *arguments = line.split()
    if name in ("tune", "inspect"):
        pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    (tmp_path / "file").write_text("text\n")
    with pytest.raises(SystemExit) as stop:
        call(name, *arguments, raises=False)
    text = str(stop.value.code)
    assert re.search(message, text), text
    said = capsys.readouterr().err + text
    assert "Traceback" not in said
    # torch's advice would run the code in a file
    assert "weights_only" not in said
    assert len(said.splitlines()) <= 10, said
    # the stack is where the message says
    for record in re.findall(r"^stack: (.*error.txt)$", text, re.MULTILINE):
        assert "Traceback (most recent call last)" in (tmp_path / record).read_text()


def test_a_command_prints_one_message_and_fails(tmp_path):
    done = run_command("train", "scale=small", "data.batch_size=4000", cwd=tmp_path)
    assert done.returncode == 1
    # Lightning and the graphics card may warn
    told = [line for line in done.stderr.splitlines() if "Warning" not in line and "warn" not in line]
    assert told[0].startswith("data.batch_size must not exceed the training samples")
    assert told[1].startswith("stack: runs/")
    assert len(told) == 2


def test_a_failing_job_of_a_sweep_is_named_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit, match=r"needs data\.root="):
        call("train", "-m", "seed=0,1", raises=False)
    assert "Traceback" not in capsys.readouterr().err
    assert len(list(tmp_path.glob("runs/*/*/error.txt"))) == 2


def test_the_exception_itself_is_raised_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="runs=nowhere is not a folder"):
        call("report", "runs=nowhere")


@pytest.mark.parametrize("words", [["row=null"], ["~row", "logger=null", "samplers=null"], ["row=null", "-m"], ["~row", "-m"]])
def test_no_choice_of_a_group_is_one_run_of_the_baseline(words, tmp_path, monkeypatch):
    from carafepp.scripts import train
    from carafepp.scripts.running import train as running

    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "train", lambda cfg, folder: started.append(cfg) or (folder / "result.json").write_text("{}"))
    monkeypatch.setattr(train, "is_finished", lambda folder: (folder / "result.json").exists())
    monkeypatch.setattr(train, "train_in_subprocess", lambda folder, trust: started.append(train.read_config(folder)))
    call("train", "experiment=table4", "scale=small", *words)
    (cfg,) = started
    assert cfg.run.choices.row is None
    assert cfg.model.fpn.slot._target_ == "carafepp.models.samplers.published"
    assert not cfg.get("logger")


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("import does_not_exist", "own.Sampler", r"own.Sampler cannot be imported \(.*'does_not_exist'\) \(own.py, line 1\)$"),
        ("class Sampler(", "own.Sampler", r"SyntaxError: .*\(own.py, line 1\)$"),
        ("class Other: pass", "own.sampler", r"own has no sampler$"),
        ("class Sampler: pass", "own.sampler", r"own has no sampler; did you mean 'Sampler'\?$"),
        ("def sampler():\n    return 1 / 0", "own.sampler", r"ZeroDivisionError: .* \(own.py, line 2\)$"),
    ],
)
def test_the_line_of_your_own_code_is_named(text, target, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text(text + "\n")
    with pytest.raises(InstantiationException) as caught:
        instantiate({"slot": {"_target_": target}})
    told = failures.describe_failure(caught.value, "train", [])
    sys.modules.pop("own", None)
    assert re.search(message, told), told
    assert "belongs in" not in told


def test_hints_need_no_mandatory_value():
    assert find_hints("train", ["task=detection", "data.root=.", "data.train.annotations=x"]) == []
    assert "did you mean 'annotations'" in find_hints("train", ["task=detection", "data.train.anotations=x"])[0]


def test_long_messages_are_cut():
    text = failures.shorten("\n".join(map(str, range(100))))
    assert text.splitlines() == ["0", "1", "2", "3", "4", "5", "...", "99"]


def test_comments_belong_to_the_key_below_them():
    comments = read_comments("train")
    assert comments["defaults.row"].startswith("one row of an experiment's table")
    assert comments["channels_last"].startswith("whether tensors have")
    assert "checkpoint_every_n_steps" not in comments
    assert read_comments("trainer/default")["max_epochs"].startswith("the whole training is one Lightning epoch")
    # the comment above a group in a list of defaults is that of the key which the group fills, also from a file that is extended
    assert read_comments("model/upernet", "model")["model.fpn"].startswith("the sampler of the feature pyramid")
    assert read_comments("model/pspnet")["model.ppm"].startswith("the sampler of the pyramid pooling module")
    assert {"model.fpn", "model.mask_head", "model.min_size"} < {*read_all_comments("train", {"model": "mask_rcnn"})}


def test_groups_and_choices_are_those_of_the_files():
    assert list_groups("bench") == ["op"]
    assert {"upsampler", "row", "setting"} < set(list_groups("train"))
    assert list_choices("upsampler") == sorted(path.stem for path in (CONF / "upsampler").glob("*.yaml"))
    assert list_choices("experiment")[-1] == "table14"
    assert list_choices("row", "table5") == [f"table5/{path.stem}" for path in sorted((CONF / "row/table5").glob("*.yaml"))]
    assert list_choices("nothing") == []
