"""carafepp-bench: providers compute the same result, and the files hold the printed figures."""

import csv
import functools
import sys

import pytest
import torch
from carafepp.kernels import reassemble_reference
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.clock import measure_milliseconds
from carafepp.models.carafe import CARAFE
from carafepp.models.window_attention import attend_windows
from carafepp.scripts.benching import providers
from carafepp.scripts.benching.attention import attend_copies
from carafepp.scripts.benching.module import list_parts
from carafepp.scripts.benching.operator import MODES, CopyCalls
from carafepp.scripts.benching.timing import median_interval
from commands import call


@pytest.mark.parametrize("spec", [Spec(5, 2), Spec(3, 3, groups=2), Spec(5, 1, 2), Spec(3)], ids=str)
def test_rivals_compute_the_same(spec):
    x = torch.randn(2, 4, 6, 7)
    logits = torch.randn(2, spec.groups * spec.taps * spec.up**2, spec.cells(6), spec.cells(7))
    x, logits = x.requires_grad_(), logits.requires_grad_()
    expected = reassemble_reference(x, logits, **spec._asdict())
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (x, logits), dy)
    functions = (providers.unfold_output, providers.unfold_source, providers.sum_taps, providers.sum_shifted_maps)
    rivals = [functools.partial(function, spec=spec) for function in functions]
    rivals.append(providers.list_providers(spec, tuple(x.shape), "cpu", 1e9)["fallback"])
    for rival in rivals:
        y = rival(x, logits)
        torch.testing.assert_close(y, expected)
        for actual, gradient in zip(torch.autograd.grad(y, (x, logits), dy), gradients, strict=True):
            torch.testing.assert_close(actual, gradient)


def test_every_provider_is_offered_or_says_why_not():
    rational = providers.list_providers(Spec(5, 3, 2), (1, 4, 6, 7), "cpu", 1e9)
    assert callable(rational["cpu"])
    assert rational["unfold"] == "supports only integer scales and softmax"
    large = providers.list_providers(Spec(5, 2), (512, 256, 14, 14), "cpu", 4e9)
    assert large["unfold"] == "its unfolded copy takes 10.3 GB"
    assert callable(large["unfold_source"])
    assert large["avg_pool"] == "needs op.up=1"
    assert list(rational) == list(large)


def test_table_and_file_tell_the_same(tmp_path, capsys):
    arguments = ["op=down2", "op.shape=[1,8,9,10]", "providers=[cpu,avg_pool,copy]", "rounds=2", f"hydra.run.dir={tmp_path}"]
    call("bench", *arguments)
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "times.csv").open()))
    assert [(row["provider"], row["mode"]) for row in rows] == [(name, mode) for mode in MODES for name in ("cpu", "avg_pool", "copy")]
    for row in rows:
        assert float(row["ms_20"]) <= float(row["ms"]) <= float(row["ms_80"])
        assert f"{float(row['ms']):.3f}" in printed
    assert float(rows[0]["relative"]) == 1
    for ours, _, copy in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert float(copy["copies"]) == 1
        assert float(ours["copies"]) == pytest.approx(float(ours["ms"]) / float(copy["ms"]))


def test_a_copy_moves_the_least_bytes():
    # x and logits of 12 bytes and y of 8: forward reads 12 and writes 8; backward reads 20 and writes 12
    copies = CopyCalls(12, 8, "cpu")
    for mode, moved in {"forward": 20, "backward": 32, "both": 52}.items():
        copies.copy(mode)
        source, copy = copies.sources[mode], copies.copies[mode]
        assert source.nbytes + copy.nbytes == moved
        assert torch.equal(source, copy)


def test_growth_varies_one_thing_at_a_time(tmp_path):
    arguments = ["growth", "op.shape=[1,8,4,4]", "threads=2", "rounds=1", f"hydra.run.dir={tmp_path}"]
    before = list(sys.argv)
    threads = torch.get_num_threads()
    call("bench", *arguments)
    assert sys.argv == before
    torch.set_num_threads(threads)
    rows = [row for row in csv.DictReader((tmp_path / "growth.csv").open()) if row["mode"] == "forward"]
    assert [(row["varies"], int(row["value"])) for row in rows] == [
        *(("channels", value) for value in (1, 2, 4, 8, 16, 32)),
        *(("source pixels", value) for value in (1, 4, 16, 64)),
        *(("taps", value) for value in (1, 9, 25, 49, 81)),
        *(("threads", value) for value in (1, 2)),
    ]
    assert all(float(row["ms"]) > 0 for row in rows)
    assert (tmp_path / "growth.svg").read_text().count("source pixels") == 1


def test_unknown_provider_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"providers must be among cpu, triton.*got 'gpu'"):
        call("bench", "op=up2", "providers=[gpu]", f"hydra.run.dir={tmp_path}")


def test_module_and_its_parts_are_measured(tmp_path, capsys):
    options = ["options.compressor_norm=true", "dtype=bfloat16", "channels_last=true", "rounds=2", f"hydra.run.dir={tmp_path}"]
    call("bench", "module", "op=down2", "op.shape=[1,8,9,10]", *options)
    printed = capsys.readouterr().out
    rows = {row["part"]: row for row in csv.DictReader((tmp_path / "module.csv").open())}
    # convolutions with biases, 8 -> 16 -> 25 channels; scale and shift of a norm
    parameters = {"channel_compressor": 144, "compressor_norm": 32, "content_encoder": 16 * 9 * 25 + 25}
    every = sum(parameters.values())
    assert {name: int(row["parameters"]) for name, row in rows.items()} == {**parameters, "layers": every, "operator": 0, "module": every}
    for row in rows.values():
        assert float(row["forward"]) > 0
        assert f"{float(row['step']):.3f}" in printed


def test_attention_to_copies_is_that_of_the_operator():
    torch.manual_seed(0)
    inputs = [torch.randn(2, channels, *size, dtype=torch.float64) for channels, size in ((4, (9, 12)), (4, (3, 4)), (6, (3, 4)))]
    options = {"up": 3, "kernel_size": 3, "heads": 2}
    torch.testing.assert_close(attend_copies(*inputs, **options), attend_windows(*inputs, **options))


def test_attention_is_measured_in_both_forms(tmp_path, capsys):
    options = ["channels=4", "query_channels=4", "rows=3", "columns=4", "up=2", "kernel_size=3", "rounds=1", f"hydra.run.dir={tmp_path}"]
    call("bench", "attention", *options)
    rows = list(csv.DictReader((tmp_path / "attention.csv").open()))
    assert [(row["pass"], row["form"]) for row in rows] == [(p, f) for p in ("forward", "step") for f in ("operator", "copies")]
    assert all(float(row["ms"]) > 0 and float(row["peak_mb"]) > 0 for row in rows)
    assert "6 x 8" in capsys.readouterr().out


def test_parts_make_up_the_module():
    module = CARAFE(4, up=2, groups=2)
    x = torch.randn(1, 4, 5, 6)
    parts = dict(list_parts(module, x.requires_grad_(), torch.float32))
    assert list(parts) == ["channel_compressor", "content_encoder", "layers", "operator", "module"]
    torch.testing.assert_close(parts["layers"].y, parts["content_encoder"].y)
    torch.testing.assert_close(parts["operator"].y, parts["module"].y)
    for part in parts.values():
        assert all(gradient.shape == leaf.shape for gradient, leaf in zip(part.step(), part.leaves, strict=True))


def test_layers_of_other_widths_in_training_have_gradients(monkeypatch):
    # as for half precision on a GPU: 25 logits are computed as 32 without gradients, and as 64 with them
    for place in ("scripts.benching.module", "models.carafe"):
        monkeypatch.setattr(f"carafepp.{place}.suits_matrix_units", lambda x: True)
    x = torch.randn(1, 4, 6, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    parts = dict(list_parts(CARAFE(4, down=2), x, torch.float32))
    assert parts["layers"].y.shape[1] == 32
    assert all(len(part.step()) == len(part.leaves) for part in parts.values())


class Event:
    """An event of a GPU that starts on a call at once for the first two calls, and later waits until the host has queued the call."""

    calls = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def query(self):
        return Event.calls < 3

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return float(Event.calls)


def test_a_call_that_the_gpu_waits_for_is_timed_again(monkeypatch):
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("carafepp.kernels.gpu.clock.FLUSH_BYTES", 1)
    fills = []
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: fills.append(self.numel()))

    def call():
        Event.calls += 1

    assert measure_milliseconds(call, "cpu") == 3
    assert len(fills) == 4 + 8 + 16
    # a call that takes the host too long is timed nonetheless
    monkeypatch.setattr(Event, "query", lambda self: True)
    assert measure_milliseconds(call, "cpu") == 3 + 5


@pytest.mark.parametrize(
    ("n", "ranks"),
    # of 6 values, the range has 1 - 2 / 64 = 96.9 %; of 9, the second and the eighth have 1 - 2 * 10 / 512 = 96.1 %
    [(1, (1, 1)), (5, (1, 5)), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (30, (10, 21))],
)
def test_interval_of_a_median(n, ranks):
    assert median_interval(torch.randperm(n).add(1).tolist()) == ranks
