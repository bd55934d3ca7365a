"""Several processes, accumulation, starting weights and the other switches of a training, by override alone."""

import shutil
from pathlib import Path

import pytest
import torch
from carafepp.scripts.common.checkpoints import load_task
from commands import command_line, run_line, torchrun_line
from training import read_result, read_weights, train_in

SMALL = ["scale=small", "data.train.length=16", "data.val.length=6", "data.val_batch_size=2", "data.batch_size=8", "data.epochs=2"]
SMALL += ["data.train.size=32", "data.val.size=32", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
# norms with fixed statistics do not depend on how a batch is cut, and in double precision nothing else differs visibly
EXACT = [
    *SMALL,
    "experiment=table2",
    "downsampler=carafe",
    "downsampler.compressor_norm=false",
    "trainer.precision=64-true",
    "log_every_n_steps=1",
]
EXACT += ["+backbone.norm_layer={_target_:torchvision.ops.FrozenBatchNorm2d,_partial_:true}"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run with one process and one batch per step."""
    return train_in(tmp_path_factory.mktemp("alone") / "run", *EXACT)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A run of one epoch, in single precision."""
    overrides = ["experiment=table2", "downsampler=carafe", "data.epochs=1"]
    return train_in(tmp_path_factory.mktemp("classifier") / "run", *SMALL, *overrides)


def assert_same(folder, alone):
    assert read_result(folder)["steps"] == read_result(alone)["steps"] == 4
    torch.testing.assert_close(read_weights(folder), read_weights(alone), rtol=1e-9, atol=1e-9)
    assert read_result(folder)["metrics"] == pytest.approx(read_result(alone)["metrics"])


def test_accumulation_takes_the_step_of_the_whole_batch(alone, tmp_path):
    assert_same(train_in(tmp_path / "run", *EXACT, "trainer.accumulate_grad_batches=4"), alone)


def test_training_moves_the_weights(alone, tmp_path):
    """Check that the weights changed, because comparisons would pass if none did."""
    other = read_weights(train_in(tmp_path / "run", *EXACT, "data.epochs=1"))
    assert any(not torch.allclose(tensor, other[name], atol=1e-4) for name, tensor in read_weights(alone).items())


@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_two_processes_train_as_one(alone, tmp_path, launcher):
    shared = [*EXACT, "trainer.devices=2", "trainer.strategy=ddp"]
    if launcher == "torchrun":
        folder = tmp_path / "runs" / "job7"
        command = torchrun_line(2, "job7", "train", *shared)
    else:
        folder = tmp_path / "run"
        command = command_line("train", *shared, "trainer.accumulate_grad_batches=2", f"hydra.run.dir={folder}")
    done = run_line(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(folder, alone)
    assert done.stdout.count("run folder:") == 1
    # one process writes the rows: a header, four steps, four validations
    assert len((folder / "metrics.csv").read_text().splitlines()) == len((alone / "metrics.csv").read_text().splitlines())
    assert [path for path in tmp_path.rglob("config.yaml")] == [folder / "config.yaml"]


def test_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="multiple of devices x accumulation, got 8 for 1 x 3"):
        train_in(tmp_path / "run", *EXACT, "trainer.accumulate_grad_batches=3")


def test_classifier_becomes_the_backbone_of_segmentation(classifier, tmp_path):
    path = Path(shutil.copy(classifier / "last.ckpt", tmp_path / "copied.ckpt"))
    expected = {name.removeprefix("model."): tensor for name, tensor in torch.load(path, weights_only=True)["state_dict"].items()}
    segmenter = [*SMALL, "samplers=carafe", f"backbone.weights={path}", "optimizer.lr=0", "data.epochs=1", "model.fpn_dim=8"]
    folder = train_in(tmp_path / "segmenter", *segmenter)
    learned = [name for name in expected if name.endswith(("weight", "bias")) and not name.startswith("fc")]
    assert len(learned) > 60
    for name in learned:
        assert torch.equal(read_weights(folder)[f"model.backbone.{name}"], expected[name]), name
    # a finished run does not need the file
    path.unlink()
    task, _ = load_task(folder / "last.ckpt")
    assert torch.equal(task.model.backbone.conv1.weight, expected["conv1.weight"])


@pytest.mark.parametrize("overrides", [["channels_last=false", "trainer.precision=bf16-mixed"], ["compile=true"]], ids=" ".join)
def test_switches_train_the_same_network(classifier, tmp_path, overrides, monkeypatch):
    if "compile=true" in overrides:
        # without a C++ compiler only the graph is tested
        compiles = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiles(self, backend="aot_eager", fullgraph=True))
    switched = train_in(tmp_path / "switched", *SMALL, "experiment=table2", "downsampler=carafe", "data.epochs=1", *overrides)
    assert read_weights(switched).keys() == read_weights(classifier).keys()
    assert read_result(switched)["flops"] == read_result(classifier)["flops"] > 0
    torch.testing.assert_close(read_weights(switched)["model.fc.weight"], read_weights(classifier)["model.fc.weight"], rtol=0, atol=6e-3)
    innermost = read_weights(switched)["model.layer1.0.conv2.weight"].is_contiguous(memory_format=torch.channels_last)
    assert innermost == ("channels_last=false" not in overrides)
