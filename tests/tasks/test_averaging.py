"""Averaged weights: the moving average by its definition, stored as the weights of the network, and continued after an interruption."""

import pytest
import torch
from carafepp.scripts.common.checkpoints import load_task
from carafepp.scripts.running import train as training
from carafepp.tasks.averaging import WeightAverage
from carafepp.tasks.runs import RandomState, hash_weights
from omegaconf import OmegaConf
from training import TINY, read_result, read_weights, train_in

RUN = [*TINY, "data.batch_size=8", "data.epochs=2", "averaging=0.75"]


class Killed(Exception):
    """An interruption at a step."""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run with averaged weights, and the weights of its steps."""
    steps = []

    class Recorder(RandomState):
        def on_train_batch_end(self, trainer, pl_module, *given):
            steps.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "RandomState", Recorder)
        return train_in(tmp_path_factory.mktemp("averaged") / "run", *RUN), steps


def test_a_run_ends_with_the_moving_average_of_its_weights_and_statistics(whole_run):
    folder, steps = whole_run
    stored, result = read_weights(folder), read_result(folder)
    assert len(steps) == result["steps"] == 10
    for name, first in steps[0].items():
        if first.is_floating_point():
            expected = first.double()
            for step in steps[1:]:
                expected = 0.75 * expected + 0.25 * step[name].double()
            torch.testing.assert_close(stored[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert not all(torch.equal(stored[name], tensor) for name, tensor in steps[-1].items())
    # what result.json, pictures and the other commands use
    assert hash_weights(load_task(folder / "best.ckpt")[0]) == result["weights_sha256"]


@pytest.mark.parametrize("step", [5, 10])
def test_an_interrupted_average_continues_to_the_same_bits(whole_run, tmp_path, monkeypatch, step):
    class Killer(training.LauncherSignals):
        def on_train_batch_end(self, trainer, *given):
            if trainer.global_step == step == 5:
                raise Killed

        def on_fit_end(self, *given):
            if step == 10:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "LauncherSignals", Killer)
        with pytest.raises(Killed):
            train_in(tmp_path / "run", *RUN)
    (tmp_path / "run" / "result.json").unlink(missing_ok=True)
    training.train(OmegaConf.load(tmp_path / "run" / "config.yaml"), tmp_path / "run")
    assert read_result(tmp_path / "run")["weights_sha256"] == read_result(whole_run[0])["weights_sha256"]


@pytest.mark.parametrize("decay", [-0.1, 1, 2])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"averaging must be a decay of at least 0 and below 1.*got {decay}"):
        WeightAverage(decay)
