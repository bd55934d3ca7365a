"""Training from WebDataset shards."""

import gzip
import io
import itertools
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

pytest.importorskip("webdataset")

from carafepp.tasks.shards import ShardData, Shards
from training import read_result, train_in


def write_shard(path, samples):
    """Samples are (name, {extension: bytes})."""
    with tarfile.open(path, "w") as archive:
        for name, parts in samples:
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four shards of six samples; the image of label i has the grey value 10 i."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        numbers = range(6 * shard, 6 * shard + 6)
        write_shard(folder / f"train-{shard}.tar", [(f"{i:04d}", {"jpg": jpeg(10 * i), "cls": str(i).encode()}) for i in numbers])
    return f"{folder}/train-{{0..3}}.tar"


def loader(shards, *, epochs=1, start=0, rank=0, world_size=1, workers=0, batch_size=4, accumulate=1, transforms=None):
    data = ShardData(Shards(shards, transforms), None, length=24, batch_size=batch_size, epochs=epochs, workers=workers)
    data.trainer = SimpleNamespace(accumulate_grad_batches=accumulate, global_rank=rank, world_size=world_size)
    data.start = start
    return data.train_dataloader()


def labels(batches) -> list[int]:
    return [int(label) for _, batch in batches for label in batch]


def test_an_epoch_holds_every_sample_with_its_label(shards):
    batches = list(loader(shards))
    assert sorted(labels(batches)) == list(range(24))
    assert labels(batches) != list(range(24))
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (24, 3, 8, 8)
    np.testing.assert_allclose(images.mean((1, 2, 3)) * 255, 10 * np.array(labels(batches)), atol=2)


def test_epochs_differ_and_repeat(shards):
    seen = labels(loader(shards, epochs=2))
    assert sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:]
    assert labels(loader(shards, epochs=2)) == seen


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_share_the_shards(shards, workers):
    streams = [loader(shards, rank=rank, world_size=2, workers=workers) for rank in (0, 1)]
    assert [len(stream) for stream in streams] == [6, 6]
    assert sorted(labels(streams[0]) + labels(streams[1])) == list(range(24))


def test_stream_continues_behind_the_shards_it_has_read(shards):
    whole, rest = labels(loader(shards, epochs=2)), list(loader(shards, epochs=2, start=9))
    assert len(rest) == 12 - 9
    # 36 samples are one epoch and two shards
    left = {label // 6 for label in labels(rest)}
    assert len(left) == 2
    assert set(labels(rest)) <= set(whole)


def test_transforms_are_repeatable(shards):
    crop = v2.RandomResizedCrop(4)
    for first, second in zip(loader(shards, transforms=crop), loader(shards, transforms=crop), strict=True):
        assert torch.equal(first[0], second[0])


def test_wrong_shards_are_named(shards, tmp_path):
    with pytest.raises(ValueError, match="every reader needs a shard, got 4 shards for 5 processes x 1 workers"):
        next(iter(loader(shards, world_size=5, batch_size=5)))
    with pytest.raises(ValueError, match="must not exceed the training samples"):
        loader(shards, batch_size=25)
    for name, parts, message in (
        ("unlabelled", {"jpg": jpeg(3)}, r"sample unlabelled of shard .*a\.tar must hold an image .* got jpg"),
        ("damaged", {"jpg": jpeg(3)[:100], "cls": b"1"}, r"sample damaged of shard .*a\.tar: image .* cannot be read"),
        ("empty", {"jpg": b"", "cls": b"1"}, r"sample empty of shard .*a\.tar: image .* cannot be read"),
        ("word", {"jpg": jpeg(3), "cls": b"cat"}, r"sample word of shard .*a\.tar must hold .* number of its class \(cls\)"),
        ("negative", {"jpg": jpeg(3), "cls": b"-1"}, r"sample negative of shard .*a\.tar must hold .* number of its class \(cls\)"),
        ("large", {"jpg": jpeg(3), "cls": b"9" * 19}, r"sample large of shard .*a\.tar has the class 9{19}, classes must be in 0..9223"),
        ("larger", {"jpg": jpeg(3), "cls": b"9" * 5000}, r"sample larger of shard .*a\.tar has the class 9{20}, classes"),
    ):
        write_shard(tmp_path / "a.tar", [(name, parts)])
        with pytest.raises(ValueError, match=message):
            next(iter(loader(f"{tmp_path}/a.tar")))
    whole = (tmp_path / "a.tar").read_bytes()
    for damaged in (whole[:600], whole[:100], b"", b"\xff" * 600 + whole[600:]):
        (tmp_path / "cut.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shard .*cut\.tar"):
            next(iter(loader(f"{tmp_path}/cut.tar")))
    write_shard(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match=r"empty\.tar hold no sample"):
        next(iter(loader(f"{tmp_path}/empty.tar")))


def test_labels_beyond_the_classes_are_named(tmp_path):
    write_shard(tmp_path / "a.tar", [("a", {"jpg": jpeg(3), "cls": b"24"})])
    with pytest.raises(ValueError, match=r"sample a of shard .*a\.tar has the class 24, classes must be in 0..23 \(num_classes\)"):
        next(Shards(f"{tmp_path}/a.tar", classes=24)._samples(0, 1, 0))
    assert next(Shards(f"{tmp_path}/a.tar", classes=25)._samples(0, 1, 0))[1] == 24
    assert next(Shards(f"{tmp_path}/a.tar")._samples(0, 1, 0))[1] == 24


def test_damaged_shards_are_named(shards, tmp_path):
    content = Path(shards.replace("{0..3}", "0")).read_bytes()
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(content)
    compressed = (tmp_path / "a.tar.gz").read_bytes()
    for name, data in (
        ("cut", content[:800]),
        ("empty", b""),
        ("junk", b"junk" * 1000),
        ("cut.gz", compressed[: len(compressed) // 2]),
        ("broken.gz", compressed[:40] + bytes(100) + compressed[140:]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"shard .*{name} cannot be read: "):
            list(Shards(f"{tmp_path}/{name}")._samples(0, 1, 0))
    with pytest.raises(FileNotFoundError, match=r"shard .*missing.tar does not exist"):
        next(Shards(f"{tmp_path}/missing.tar")._samples(0, 1, 0))
    write_shard(tmp_path / "twice.tar", [("a", {"jpg": jpeg(3), "cls": b"1"})] * 2)
    with pytest.raises(ValueError, match=r"shard .*twice.tar cannot be read: .*duplicate"):
        next(Shards(f"{tmp_path}/twice.tar")._samples(0, 1, 0))


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_names_links_and_pickles_in_shards_reach_no_file(tmp_path):
    """A shard is a stream of samples: nothing is unpacked, links are not followed, and other contents are not loaded."""
    (tmp_path / "shards" / "inside").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(jpeg(99))
    path, parts = tmp_path / "shards" / "inside" / "a.tar", {"jpg": jpeg(7), "cls": b"1"}
    harmful = pickle.dumps(Harmful(tmp_path / "written"))
    names = ["../../up", f"{tmp_path}/absolute", "a/../../../up", "~/home", "bell\a\nline", "x" * 5000]
    write_shard(path, [(name, parts) for name in names] + [("a", parts | dict.fromkeys(("pyd", "pkl", "pth", "npy", "json"), harmful))])
    with tarfile.open(path, "a") as archive:
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        for number, kind in enumerate(kinds):
            member = tarfile.TarInfo(f"link{number}.jpg")
            member.type, member.linkname = kind, str(tmp_path / "secret.jpg")
            archive.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    samples = list(itertools.islice(Shards(str(path))._samples(0, 1, 0), 2 * len(names) + 2))
    assert {round(255 * image.mean().item()) for image, _ in samples} == {7}
    assert sorted(tmp_path.rglob("*")) == before
    assert pickle.loads(harmful) is None, "the pickle must be harmful for this test to say anything"
    assert (tmp_path / "written").exists()


def test_training_from_shards(shards, tmp_path):
    for label in range(2):
        (tmp_path / "images" / "val" / str(label)).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "images" / "val" / str(label) / "0.png")
    overrides = ["experiment=table2", "downsampler=carafe", "setting=classification_shards"]
    overrides += [f"data.train.shards='{shards}'", f"data.root={tmp_path}/images"]
    overrides += ["backbone=tiny", "data.length=24", "data.batch_size=8", "data.epochs=1", "data.workers=0", "num_classes=24"]
    overrides += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.val_check_interval=1.0"]
    assert read_result(train_in(tmp_path / "run", *overrides))["steps"] == 3
