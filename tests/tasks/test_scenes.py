"""Scenes are deterministic, exactly labelled, visible, and share nothing between training and validation."""

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from carafepp.tasks import photographs
from carafepp.tasks.keyed import keyed_rng
from carafepp.tasks.scenes import CLASSES, LEAST_VISIBLE, MEAN, STD, VIEWS, Scenes
from carafepp.tasks.splits import SPLITS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

SIZES = st.tuples(st.integers(16, 90), st.integers(16, 90))


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(size=SIZES, split=st.sampled_from(["train", "val"]), seed=st.integers(0, 9), epoch=st.integers(0, 3), index=st.integers(0, 99))
def test_annotations_of_a_scene_agree(size, split, seed, epoch, index):
    scene = Scenes(split, 100, size, seed, objects=(0, 6)).scene((epoch, index))
    masks, semantic, boxes = scene.masks, scene.semantic, scene.boxes
    assert scene.image.shape == (3, *size)
    assert scene.image.dtype == np.float32
    assert scene.image.min() >= 0
    assert scene.image.max() <= 1
    assert masks.shape == (len(scene.labels), *size)
    assert semantic.shape == size
    assert masks.sum(0).max(initial=0) <= 1, "the visible parts are disjoint"
    assert np.array_equal(masks.any(0), semantic > 0)
    for mask, label, (x1, y1, x2, y2) in zip(masks, scene.labels, boxes.astype(int), strict=True):
        assert (semantic[mask] == label).all()
        assert 1 <= label < len(CLASSES)
        inside = mask[y1:y2, x1:x2]
        assert inside.sum() == mask.sum() > 0
        assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1])), "the box is tight"


def test_views_agree_with_the_scene():
    scenes = {view: Scenes("val", 20, (48, 64), seed=3, view=view) for view in VIEWS}
    for index in range(20):
        scene = scenes["detection"].scene(index)
        image, digit = scenes["classification"][index]
        _, semantic = scenes["segmentation"][index]
        _, target = scenes["detection"][index]
        assert image.shape == (3, 48, 64)
        assert image.dtype == torch.float32
        assert digit == scene.labels[0] - 1
        assert semantic.dtype == torch.int64
        assert np.array_equal(semantic, scene.semantic)
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64
        assert np.array_equal(target["masks"], scene.masks)
        assert target["image_id"] == index
        assert target["area"].tolist() == [mask.sum() for mask in scene.masks]
        assert scenes["photograph"][index].shape == (3, 48, 64)
    assert Scenes("val", 20, (48, 64), seed=3, view="photograph").scene(0).owner.max() == 0


def test_detection_of_an_empty_scene_has_empty_tensors():
    _, target = Scenes("train", 1, 32, objects=(0, 0), view="detection")[0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 32, 32)


def item(key):
    return [part.numpy() for part in Scenes("train", 50, 40, seed=5)[key]]


def test_items_depend_on_their_key_alone():
    """Order, process and worker count change nothing; seed, epoch, index and split do."""
    keys = [(epoch, index) for epoch in range(2) for index in range(8)]
    items = [item(key) for key in keys]
    shuffled = random.Random(0).sample(range(len(keys)), len(keys))
    # what the other process calls is in the package: it cannot import this module
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        elsewhere = list(pool.map(Scenes("train", 50, 40, seed=5).__getitem__, [keys[i] for i in shuffled]))
    for i, other in zip(shuffled, elsewhere, strict=True):
        assert same(items[i], [part.numpy() for part in other])
    for workers in (0, 2):
        loader = DataLoader(Scenes("train", 50, 40, seed=5), sampler=keys, batch_size=4, num_workers=workers)
        for batch, start in zip(loader, range(0, len(keys), 4), strict=True):
            assert same([b.numpy() for b in batch], [np.stack(parts) for parts in zip(*items[start : start + 4], strict=True)])

    assert same(item(3), item((0, 3)))
    others = [
        Scenes("train", 50, 40, seed=6)[3],
        Scenes("val", 50, 40, seed=5)[3],
        Scenes("train", 50, 40, seed=5)[1, 3],
        Scenes("train", 50, 40, seed=5)[4],
    ]
    assert not any(torch.equal(image, torch.from_numpy(item(3)[0])) for image, _ in others)


def test_digits_stand_out():
    """A digit differs in mean luminance from the ring around it."""
    weights, scenes = np.array([0.299, 0.587, 0.114], np.float32), Scenes("train", 60, 96, objects=(1, 1))
    for index in range(60):
        scene = scenes.scene(index)
        luminance, mask = np.tensordot(weights, scene.image, 1), scene.masks[0]
        grown = mask.copy()
        for _ in range(8):
            grown = grown | np.roll(grown, 1, 0) | np.roll(grown, -1, 0) | np.roll(grown, 1, 1) | np.roll(grown, -1, 1)
        assert abs(luminance[mask].mean() - luminance[grown & ~mask].mean()) > 0.15


def test_digits_overlap_but_stay_mostly_visible():
    """A scene of n digits is that of n - 1 digits with one more on top, so that every digit is first seen whole."""
    hidden = []
    for index in range(30):
        whole = []
        for n in range(1, 7):
            scene = Scenes("train", 30, 64, objects=(n, n)).scene(index)
            if len(scene.labels) > len(whole):
                whole.append(scene.masks[-1].sum())
        hidden += [1 - mask.sum() / area for mask, area in zip(scene.masks, whole, strict=True)]
    assert max(hidden) <= 1 - LEAST_VISIBLE
    assert np.mean(np.array(hidden) > 0) > 0.2


def test_every_class_and_many_instances_occur():
    scenes = [Scenes("val", 200, 32, objects=(2, 4)).scene(i) for i in range(200)]
    labels = np.concatenate([scene.labels for scene in scenes])
    counts = np.bincount(labels, minlength=11)[1:]
    assert counts.min() > 0.5 * counts.mean()
    assert np.mean([len(scene.labels) >= 2 for scene in scenes]) > 0.9
    dominant = [scene.masks[0].sum() == max(mask.sum() for mask in scene.masks) for scene in scenes]
    assert np.mean(dominant) > 0.9


def test_splits_are_disjoint():
    assert not set(photographs.PHOTOGRAPHS["train"]) & set(photographs.PHOTOGRAPHS["val"])
    pixels = {split: {scan.tobytes() for scans in photographs.load_digit_scans(split) for scan in scans} for split in SPLITS}
    assert not pixels["train"] & pixels["val"]
    assert sum(len(scans) for split in SPLITS for scans in photographs.load_digit_scans(split)) == 1797


def test_mean_and_std_are_those_of_the_training_scenes():
    images = torch.stack([Scenes("train", 300, 32)[i][0] for i in range(300)])
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor(MEAN), atol=0.03)
    assert torch.allclose(images.std((0, 2, 3)), torch.tensor(STD), atol=0.03)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "test"}, "split must be one of train, val, got 'test'"),
        ({"view": "panoptic"}, "view must be one of classification"),
        ({"size": 8}, "at least 16"),
        ({"size": (64, 64, 3)}, "size must be"),
        ({"size": 64.5}, "size must be"),
        ({"length": 0}, "length must be"),
        ({"length": 2.5}, "both whole numbers, got length=2.5"),
        ({"seed": 1.5}, "both whole numbers, got length=4, seed=1.5"),
        ({"objects": 3}, "objects must be .* got 3"),
        ({"seed": -1}, "seed at least 0"),
        ({"objects": (3, 1)}, "objects must be"),
        ({"objects": (0, 1), "view": "classification"}, "1 <= least"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        Scenes(**{"split": "train", "length": 4, **arguments})


def test_keys_outside_are_refused():
    scenes = Scenes("train", 4, 16)
    assert len([*scenes]) == 4
    for key in (4, -1, (0, 4)):
        with pytest.raises(IndexError, match=r"0\.\.3"):
            scenes[key]
    with pytest.raises(ValueError, match="epoch"):
        scenes[-1, 0]


def test_missing_packages_and_files_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[demo\]'"):
        photographs.photograph_path("chelsea.png")
    monkeypatch.setattr(photographs, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(FileNotFoundError, match=r"chelsea\.png.*'\.\[demo\]\'"):
        photographs.photograph_path("chelsea.png")


def draws():
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]]


def test_keyed_rng_seeds_and_restores_every_generator():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draws()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with keyed_rng(0, 1, 2):
        first = draws()
    assert draws() == expected
    with keyed_rng(0, 1, 2):
        assert draws() == first
    for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)):
        with keyed_rng(*key):
            assert all(a != b for a, b in zip(draws(), first, strict=True))
    with pytest.raises(KeyError), keyed_rng(0, 1, 2):
        raise KeyError
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert draws() == expected
