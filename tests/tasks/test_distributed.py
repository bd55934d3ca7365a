"""Several processes, accumulation, starting weights and the other switches of a training, by override alone."""

import subprocess
import sys

import pytest
import torch
from carafepp.scripts.common.checkpoints import load_task
from training import result, run, weights

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


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run with one process and one batch per step."""
    return run(tmp_path_factory.mktemp("alone") / "run", *EXACT)


def assert_same(folder, alone):
    assert result(folder)["steps"] == result(alone)["steps"] == 4
    torch.testing.assert_close(weights(folder), weights(alone), rtol=1e-9, atol=1e-9)
    assert result(folder)["metrics"] == pytest.approx(result(alone)["metrics"])


def test_accumulation_takes_the_step_of_the_whole_batch(alone, tmp_path):
    assert_same(run(tmp_path / "run", *EXACT, "trainer.accumulate_grad_batches=4"), alone)


def test_training_moves_the_weights(alone, tmp_path):
    """Check that the weights changed, because comparisons would pass if none did."""
    other = weights(run(tmp_path / "run", *EXACT, "data.epochs=1"))
    assert any(not torch.allclose(tensor, other[name], atol=1e-4) for name, tensor in weights(alone).items())


@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_two_processes_train_as_one(alone, tmp_path, launcher):
    if launcher == "torchrun":
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
        ]
        command += ["--rdzv-id=job7", "-m", "carafepp.scripts.train", "trainer.devices=2", "trainer.strategy=ddp"]
        folder = tmp_path / "runs" / "job7"
    else:
        command = [sys.executable, "-P", "-m", "carafepp.scripts.train", "trainer.devices=2", "trainer.strategy=ddp"]
        command += ["trainer.accumulate_grad_batches=2", f"hydra.run.dir={tmp_path}/run"]
        folder = tmp_path / "run"
    done = subprocess.run([*command, *EXACT], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(folder, alone)
    assert done.stdout.count("run folder:") == 1
    # one process writes the rows: a header, four steps, four validations
    assert len((folder / "metrics.csv").read_text().splitlines()) == len((alone / "metrics.csv").read_text().splitlines())
    assert [path for path in tmp_path.rglob("config.yaml")] == [folder / "config.yaml"]


def test_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="multiple of devices x accumulation, got 8 for 1 x 3"):
        run(tmp_path / "run", *EXACT, "trainer.accumulate_grad_batches=3")


def test_classifier_becomes_the_backbone_of_segmentation(tmp_path):
    classifier = run(tmp_path / "classifier", *SMALL, "experiment=table2", "downsampler=carafe", "data.epochs=1")
    path = tmp_path / "moved.ckpt"
    (classifier / "last.ckpt").rename(path)
    expected = {name.removeprefix("model."): tensor for name, tensor in torch.load(path, weights_only=True)["state_dict"].items()}
    segmenter = [*SMALL, "samplers=carafe", f"backbone.weights={path}", "optimizer.lr=0", "data.epochs=1", "model.fpn_dim=8"]
    folder = run(tmp_path / "segmenter", *segmenter)
    learned = [name for name in expected if name.endswith(("weight", "bias")) and not name.startswith("fc")]
    assert len(learned) > 60
    for name in learned:
        assert torch.equal(weights(folder)[f"model.backbone.{name}"], expected[name]), name
    # a finished run does not need the file
    path.unlink()
    task, _ = load_task(folder / "last.ckpt")
    assert torch.equal(task.model.backbone.conv1.weight, expected["conv1.weight"])


@pytest.mark.parametrize("overrides", [["channels_last=false", "trainer.precision=bf16-mixed"], ["compile=true"]], ids=" ".join)
def test_switches_train_the_same_network(tmp_path, overrides, monkeypatch):
    if "compile=true" in overrides:
        # without a C++ compiler only the graph is tested
        compiles = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiles(self, backend="aot_eager", fullgraph=True))
    plain = run(tmp_path / "plain", *SMALL, "experiment=table2", "downsampler=carafe", "data.epochs=1")
    switched = run(tmp_path / "switched", *SMALL, "experiment=table2", "downsampler=carafe", "data.epochs=1", *overrides)
    assert weights(switched).keys() == weights(plain).keys()
    assert result(switched)["flops"] == result(plain)["flops"] > 0
    torch.testing.assert_close(weights(switched)["model.fc.weight"], weights(plain)["model.fc.weight"], rtol=0, atol=6e-3)
    innermost = weights(switched)["model.layer1.0.conv2.weight"].is_contiguous(memory_format=torch.channels_last)
    assert innermost == ("channels_last=false" not in overrides)
