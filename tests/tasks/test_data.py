"""Batches keyed by (epoch, index): samples depend neither on devices, nor on accumulation, nor on where a run resumes."""

import numpy as np
import pytest
import torch
from carafepp.tasks import detection
from carafepp.tasks.data import EvalIndices, TrainBatches, merge
from carafepp.tasks.optimization import group_parameters
from carafepp.tasks.segmentation import PadToStride, segmentation_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate


def steps(length, batch, **options):
    """Samples of every optimizer step over all processes and parts."""
    world, accumulate = options.pop("world_size", 1), options.pop("accumulate", 1)
    streams = [
        list(TrainBatches(length, batch, seed=3, world_size=world, rank=rank, accumulate=accumulate, **options)) for rank in range(world)
    ]
    merged = [[key for stream in streams for key in stream[i]] for i in range(len(streams[0]))]
    return [{key for part in merged[i : i + accumulate] for key in part} for i in range(0, len(merged), accumulate)]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 30))
def test_devices_and_accumulation_see_the_same_global_batches(world, accumulate, size, epochs, extra):
    batch = world * accumulate * size
    whole = steps(batch + extra, batch, epochs=epochs)
    assert steps(batch + extra, batch, epochs=epochs, world_size=world, accumulate=accumulate) == whole
    assert all(len(step) == batch for step in whole)


def test_stream_continues_at_any_batch():
    batches = TrainBatches(20, 6, epochs=3, seed=0)
    whole = list(batches)
    assert len(whole) == len(batches) == 9
    batches.start = 4
    assert list(batches) == whole[4:]
    assert len(batches) == 9


def test_epochs_are_shuffled_differently_and_repeatably():
    whole = list(TrainBatches(32, 32, epochs=2, seed=0))
    assert [key[1] for key in whole[0]] != [key[1] for key in whole[1]]
    assert {epoch for epoch, _ in whole[1]} == {1}
    assert whole == list(TrainBatches(32, 32, epochs=2, seed=0))
    assert whole != list(TrainBatches(32, 32, epochs=2, seed=1))


def test_global_batch_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"multiple of devices x accumulation, got 10 for 2 x 3"):
        TrainBatches(100, 10, epochs=1, seed=0, world_size=2, accumulate=3)


@pytest.mark.parametrize(("length", "world"), [(7, 3), (2, 4), (0, 2), (8, 2)])
def test_every_evaluation_sample_counts_once(length, world):
    seen = [index for rank in range(world) for index in EvalIndices(range(length), rank, world)]
    assert sorted(seen) == list(range(length))


def test_an_image_of_one_channel_is_refused_instead_of_broadcast():
    for collate in (PadToStride(8), detection.collate, default_collate):
        samples = [(torch.zeros(channels, 9, 9), torch.zeros(9, 9, dtype=torch.int64)) for channels in (3, 1)]
        with pytest.raises(ValueError, match=r"must give images \[3, height, width\], got one of shape \[1, 9, 9\]"):
            merge(samples, collate)
    assert merge([torch.zeros(3, 9, 9)] * 2, default_collate).shape == (2, 3, 9, 9)


def test_scores_equal_a_plain_count():
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 4, 500), rng.integers(0, 3, 500)  # class 3 is never predicted, class 4 appears nowhere
    confusion = torch.zeros(5, 5, dtype=torch.long)
    for t, p in zip(truth, prediction, strict=True):
        confusion[t, p] += 1
    scores = segmentation_scores(confusion)
    iou = [((truth == c) & (prediction == c)).sum() / ((truth == c) | (prediction == c)).sum() for c in range(4)]
    assert scores["IoU"][:4].tolist() == pytest.approx(iou)
    assert scores["IoU"][4].isnan()
    assert scores["mIoU"].item() == pytest.approx(np.mean(iou))
    assert scores["pixel_accuracy"].item() == pytest.approx((truth == prediction).mean())


def test_norms_and_biases_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.GroupNorm(2, 4), torch.nn.Linear(4, 2))
    decayed, kept = group_parameters(model)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert len(kept["params"]) == 6
    assert kept["weight_decay"] == 0
