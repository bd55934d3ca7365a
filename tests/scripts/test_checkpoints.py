"""Damaged checkpoints: no network is built from a file whose weights or configuration are not what a training wrote."""

import json
from pathlib import Path

import pytest
import torch
from carafepp.scripts.common.checkpoints import load_checkpoint, load_task
from carafepp.scripts.reporting import read_runs
from report_runs import write_run

WHOLE = Path(__file__).parent.parent / "data" / "run_of_0.1.0" / "last.ckpt"


def test_a_changed_bit_of_a_weight_is_found(tmp_path):
    weights = load_checkpoint(WHOLE)["state_dict"]["model.fc.weight"]
    content = bytearray(WHOLE.read_bytes())
    content[content.index(weights.numpy().tobytes()) + 7] ^= 64
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint=.*last\.ckpt is damaged: a part does not have its checksum"):
        load_checkpoint(tmp_path / "last.ckpt")


def change_task(checkpoint, **entries):
    return checkpoint | {"config": checkpoint["config"] | {"task": checkpoint["config"]["task"] | entries}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"config": c["config"]}, "holds no configuration or no weights"),
        (lambda c: c | {"state_dict": None}, "does not fit a task with its own options"),
        (lambda c: c | {"state_dict": {1: torch.zeros(1)}}, "does not fit a task with its own options"),
        (lambda c: c | {"config": {"seed": 1}}, "holds no configuration of a task with its own options"),
        (lambda c: change_task(c, colour="red"), "holds no configuration of a task with its own options: .*colour"),
        (lambda c: change_task(c, model=None), "holds no configuration of a task"),
        (lambda c: c | {"config": c["config"] | {"task": 1}}, "holds "),
        (lambda c: c | {"config": c["config"] | {"task": c["config"]["model"]}}, "holds the configuration of a .* instead of a task"),
    ],
)
def test_another_content_is_named(tmp_path, change, message):
    path = tmp_path / "last.ckpt"
    torch.save(change(load_checkpoint(WHOLE)), path)
    with pytest.raises(ValueError, match=f"(?s)checkpoint=.*last.ckpt.*{message}"):
        load_task(path)


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "1e400"])
def test_a_result_with_an_infinite_count_is_broken(tmp_path, value):
    path = write_run(tmp_path / "run", 0, {"val/mIoU": 0.3}) / "result.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"parameters": 0}).replace('"parameters": 0', f'"parameters": {value}'))
    runs, problems = read_runs([tmp_path])
    assert not runs
    assert "broken (OverflowError" in problems[0]
