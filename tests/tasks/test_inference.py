"""Labels of pictures of any size: the same whole and in windows, averaged over scales and mirrored images, in bounded memory."""

import sys

import pytest
import torch
import torch.nn.functional as F
from carafepp.tasks.inference import predict_labels
from commands import run_after_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize


def local_network(classes=5, stride=4):
    """Logits that depend on no pixel further away than the margin of a window."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 7, stride=stride, padding=3), nn.ReLU(), nn.Conv2d(8, classes, 3, padding=1))


def interpolated(logits, size):
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(*[st.integers(5, 90)] * 4, st.sampled_from([4, 8]))
@torch.no_grad()
def test_labels_are_those_of_interpolated_logits(height, width, rows, columns, stride):
    network, images = local_network(stride=stride), torch.rand(2, 3, height, width)
    scores = interpolated(network(images), (rows, columns))
    # if the two best scores are equal up to rounding, either label is right
    best = scores.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-4
    labels = predict_labels(network, images, (rows, columns))
    assert labels.shape == (2, rows, columns)
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear], scores.argmax(1)[clear])


@pytest.mark.parametrize("size", [(128, 90), (61, 128)], ids=str)
@torch.no_grad()
def test_a_picture_that_fits_one_window_is_seen_whole(size):
    seen = []
    images = torch.rand(1, 3, *size)
    network = local_network()
    whole = predict_labels(network, images, size)
    windowed = predict_labels(lambda part: seen.append(part.shape) or network(part), images, size, window=128)
    assert seen == [images.shape]
    assert torch.equal(windowed, whole)


@pytest.mark.parametrize("size", [(300, 420), (129, 1000)], ids=str)
@pytest.mark.parametrize("out", [1, 0.37, 1.7])
@torch.no_grad()
def test_windows_agree_with_the_whole_where_logits_are_local(size, out):
    network, images, seen = local_network(), torch.rand(1, 3, *size), []
    out = [round(side * out) for side in size]
    whole = predict_labels(network, images, out)
    windowed = predict_labels(lambda part: seen.append(part.shape[2:]) or network(part), images, out, window=128)
    assert len(seen) > 4
    assert max(max(shape) for shape in seen) <= 128
    # a map whose last cells reach beyond the picture is stretched over it, as a whole or the last window alone
    odd = any(side % 4 for side in size)
    assert (windowed != whole).float().mean() < (0.1 if odd else 0.001)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        outputs = result if isinstance(result, tuple | list) else (result,)
        self.elements = max([self.elements, *(tensor.numel() for tensor in outputs if isinstance(tensor, torch.Tensor))])
        return result


@torch.no_grad()
def test_memory_does_not_grow_with_the_picture(monkeypatch):
    monkeypatch.setattr("carafepp.tasks.inference.BAND", 2**18)
    network = local_network(classes=150)

    def largest(height, width, **options):
        # the memory of the labels and of the image is not counted
        images = torch.rand(1, 1, 1, 1).expand(1, 3, height, width)
        with LargestTensor() as mode:
            predict_labels(network, images, (height, width), **options)
        return mode.elements

    # a row of scores, or the widest map of the network
    bound = max(2**18 + 150 * 128, 150 * 64 * 64)
    for height, width in ((256, 320), (512, 640), (300, 1500)):
        labels = 3 * height * width
        assert largest(height, width, window=128) <= max(bound, labels)
    # all scores at once would be 150 x 512 x 640
    assert largest(512, 640) < 0.1 * 150 * 512 * 640


PEAKS = r"""
import re
import torch
from carafepp.tasks.inference import predict_labels

network = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, stride=2, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 4, 3, padding=1))
with torch.no_grad():
    for side, window in ((600, 512), (2304, 512), (2304, None)):
        # an image that takes no memory
        predict_labels(network, torch.rand(1, 1, 1, 1).expand(1, 3, side, side), (side, side), window=window)
        # in KiB; getrusage has the peak of the process that started this one, if that is larger
        print(int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from Linux' /proc")
def test_process_stays_small_in_windows():
    done = run_after_torch(PEAKS)
    small, windowed, whole = map(int, done.stdout.split())
    # labels take 41 MiB; the whole of the network's first map 162, and again after the ReLU; the allocator keeps some 20 to 60 more
    assert windowed - small < 41 + 90
    assert whole - small > 260


@torch.no_grad()
def test_scales_and_mirrored_images_are_averaged_as_probabilities():
    network, images = local_network(), torch.rand(1, 3, 40, 56)
    base, size = v2.Resize(32, max_size=100), (40, 56)
    total = 0
    for side in ((16, 22), (32, 44), (48, 66)):
        view = base(images) if side == (32, 44) else resize(images, side)
        for logits in (network(view), network(view.flip(-1)).flip(-1)):
            total = total + interpolated(logits, size).softmax(1)
    best = total.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-4
    labels = predict_labels(network, images, size, base=base, scales=[0.5, 1, 1.5], flip=True)
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear], total.argmax(1)[clear])
    # one scale alone gives other labels, so that the average matters
    assert not torch.equal(labels, predict_labels(network, images, size, base=base))


@torch.no_grad()
def test_windows_of_several_scales_agree_with_the_whole():
    network, images = local_network(), torch.rand(1, 3, 200, 300)
    options = {"scales": [0.8, 1, 1.2], "flip": True}
    whole = predict_labels(network, images, (200, 300), **options)
    seen = []
    windowed = predict_labels(lambda part: seen.append(part.shape[2:]) or network(part), images, (200, 300), window=160, **options)
    assert max(max(shape) for shape in seen) <= 160
    assert (windowed != whole).float().mean() < 0.02
