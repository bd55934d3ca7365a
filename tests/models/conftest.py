"""Stand-ins of a GPU for the tests of models."""

import pytest
import torch


@pytest.fixture
def trained(monkeypatch):
    """Take channels_last maps in half precision on a CPU for those of a GPU; list the calls, whose memory is full of NaN before they run.

    Without an interpreter, PyTorch's functions compute what the launches would.
    """
    pytest.importorskip("triton")
    from carafepp.kernels.gpu.launch import Plans
    from carafepp.kernels.gpu.layer import inference as launching
    from carafepp.kernels.gpu.layer import training as kernels
    from carafepp.models import training

    calls = []
    forward, backward = kernels.Training.forward, kernels.Training.backward

    def poison(allocate):
        def allocate_poisoned(*arguments, **options):
            t = allocate(*arguments, **options)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return allocate_poisoned

    def run_poisoned(function, *arguments):
        with monkeypatch.context() as patch:
            for name in ("new_empty", "new_empty_strided"):
                patch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))
            return function(*arguments)

    def note_forward(self, x, given, addresses):
        calls.append("forward")
        if launching.INTERPRETED or x.is_cuda:
            return run_poisoned(forward, self, x, given, addresses)
        if self.layers.batch:
            given[8].add_(1)
        return training.compute_layers(self, x, given[:8]), x.new_empty(0)

    def note_backward(self, dy, x, kept, given, needs):
        calls.append("backward")
        if not launching.INTERPRETED and not x.is_cuda:
            return training.differentiate(self, dy, x, given, needs)
        return run_poisoned(backward, self, dy, x, kept, given, needs)

    def suits(x):
        return type(x) is torch.Tensor and x.element_size() == 2 and x.is_contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr("carafepp.models.carafe.suits_matrix_units", suits)
    monkeypatch.setattr(launching, "runs_on", lambda *_: True)
    monkeypatch.setattr(kernels.Training, "forward", note_forward)
    monkeypatch.setattr(kernels.Training, "backward", note_backward)
    monkeypatch.setattr(launching, "plans", Plans(16))
    return calls
