"""Arguments on the command line: home folders, values that Hydra would misread, and the folder of resume=."""

import shlex
import subprocess
import sys

import pytest
from carafepp.scripts import train
from carafepp.scripts.common.arguments import expand_home, explain_values, parse_override, quote

VALUES = ["a=b", "~x", "a,b", "(1)", "run (1).ckpt", "a b ", "it's", 'say "so"', "end\\", "a\\b", "{a}", "[1", "a:b, c", "", "5%", "f(x)"]


@pytest.mark.parametrize("value", VALUES)
def test_a_quoted_value_is_read_as_it_stands(value):
    (argument,) = shlex.split(quote(f"data.root={value}"))
    override = parse_override(argument)
    assert override.key_or_group == "data.root"
    assert override.value() == value


@pytest.mark.parametrize("value", ["a=b", "a~b", "a,b", "(1)", "run (1).ckpt", "f(x)", "[1", "{a"])
def test_a_value_that_hydra_misreads_is_shown_in_quotes(value):
    (line,) = explain_values(["scale=small", f"checkpoint={value}", "--info"])
    assert line.startswith("checkpoint: ")
    assert line.endswith(f"to give the value as it stands, write {quote(f'checkpoint={value}')}")


def test_plain_values_and_sweeps_need_no_quotes():
    assert explain_values(["-m", "seed=0,1", "images=my pictures/a.jpg", "task.scales=[1,2]", "~logger"]) == []
    assert explain_values(["seed=0,1"])[0].startswith("seed: 0,1 is a sweep, which needs -m")


def test_home_folders_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/elsewhere/me")
    expected = {
        "data.root=~/data": "data.root=/elsewhere/me/data",
        "data.root=~": "data.root=/elsewhere/me",
        'data.root="~/a=b"': 'data.root="/elsewhere/me/a=b"',
        "images=[~/a,b,~/c]": "images=[/elsewhere/me/a,b,/elsewhere/me/c]",
        "data.root=a~/b": "data.root=a~/b",
        "~logger": "~logger",
        "data.root=a/~b": "data.root=a/~b",
    }
    assert {argument: expand_home(argument) for argument in expected} == expected
    assert all(parse_override(argument) for argument in expected.values() if "a~" not in argument and "/~" not in argument)


def test_a_command_says_how_to_quote(tmp_path):
    command = [sys.executable, "-P", "-m", "carafepp.scripts.eval", "checkpoint=a=b.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    assert "write 'checkpoint=\"a=b.ckpt\"'" in done.stderr


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "resume=.*nowhere is not a run folder: it has no config.yaml$"),
        ("empty", "resume=.*empty is not a run folder: it has no config.yaml$"),
        ("run/last.ckpt", "resume=.*last.ckpt is a file: give the run folder, resume=.*run$"),
        ("sweep", "resume=.*sweep is not a run folder.*it is the folder of a sweep, whose runs are 0, 1$"),
        ("nowhere,run", "resume= continues one run"),
        ("a=b", "resume=.*a=b is not a run folder"),
    ],
)
def test_a_wrong_resume_is_named_and_leaves_nothing(path, message, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("run", "sweep/0", "sweep/1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "run" / "last.ckpt").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    value = f'"{tmp_path}/{path}"' if "=" in path else f"{tmp_path}/{path}"
    with pytest.raises(SystemExit, match=message):
        train.main([f"resume={value}"])
    assert sorted(tmp_path.rglob("*")) == before
