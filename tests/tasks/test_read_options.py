"""Options of reading image files: EXIF orientation left unapplied, and images above Pillow's limit of size."""

import io
import json
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from carafepp.scripts.common.checkpoints import configure_data
from carafepp.tasks.ade20k import ADE20K
from carafepp.tasks.cityscapes import Cityscapes
from carafepp.tasks.coco import COCO
from carafepp.tasks.imagenet import ImageNet
from carafepp.tasks.images import lift_size_limit, read_image, read_layer
from carafepp.tasks.masks import MaskFiles, read_mask
from carafepp.tasks.places import Places
from commands import call
from configurations import compose_config
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

# EXIF's tag, and what a reader does to the stored pixels to turn them upright
ORIENTATION = 0x0112
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
# 16 rows and 24 columns in smooth colours, different in each corner
STORED = np.stack([*np.meshgrid(np.linspace(20, 230, 24), np.linspace(40, 200, 16)), np.full((16, 24), 90)], -1).astype(np.uint8)


def save(path, pixels=STORED, orientation=6, **options):
    """Save an image with an EXIF orientation; a photograph on its side by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


def error(found, expected):
    assert np.shape(found) == np.shape(expected)
    return np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int)).max()


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_is_applied_or_left(tmp_path, orientation):
    for suffix, options, bound in (
        ("jpg", {"quality": 100, "subsampling": 0}, 3),
        ("png", {}, 0),
        ("tif", {}, 0),
        ("webp", {"lossless": True}, 0),
    ):
        path = save(tmp_path / f"a.{suffix}", orientation=orientation, **options)
        assert error(read_image(path), UPRIGHT[orientation](STORED)) <= bound
        assert error(read_image(path, ignore_orientation=True), STORED) <= bound
        assert error(read_layer(path, ignore_orientation=True).convert("RGB"), STORED) <= bound
        assert error(read_image(io.BytesIO(path.read_bytes()), ignore_orientation=True), STORED) <= bound
    # 16-bit TIFF, and one that libtiff decodes
    grey = STORED[..., 0].astype(np.uint16) * 257
    for options in ({}, {"compression": "tiff_lzw"}):
        path = save(tmp_path / "grey.tif", grey, orientation, **options)
        assert error(np.asarray(read_image(path))[..., 0], UPRIGHT[orientation](STORED[..., 0])) == 0
        assert error(np.asarray(read_image(path, ignore_orientation=True))[..., 0], STORED[..., 0]) == 0


def write_ade20k(root, labels):
    for split in ("training", "validation"):
        save(root / "images" / split / "a.jpg")
        (root / "annotations" / split).mkdir(parents=True)
        Image.fromarray(labels).save(root / "annotations" / split / "a.png")
    return root


def write_coco(root):
    save(root / "images" / "a.jpg")
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 24, "height": 16}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [14, 2, 8, 6], "segmentation": [[14, 2, 22, 2, 22, 8, 14, 8]]}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (root / "a.json").write_text(json.dumps(content))
    return root / "a.json", root / "images", ["thing"]


HINT = "; if the pixels as they are stored have that size, ignore_orientation=true leaves the EXIF orientation unapplied"


def test_annotations_of_stored_pixels(tmp_path, capsys):
    labels = np.tile(np.arange(1, 25, dtype=np.uint8), (16, 1))
    root = write_ade20k(tmp_path / "ade", labels)
    with pytest.raises(ValueError, match=r"got \(height, width\) \(24, 16\) of .*a.jpg and \(16, 24\) of .*a.png" + HINT):
        ADE20K(root, "val")[0]
    image, found = ADE20K(root, "val", ignore_orientation=True)[0]
    assert error(255 * image.permute(1, 2, 0), STORED) < 16
    assert torch.equal(found + 1, torch.from_numpy(labels).long())

    annotations, images, names = write_coco(tmp_path / "coco")
    with pytest.raises(ValueError, match=r"image file of another size.*a.jpg is 16 x 24, annotations say 24 x 16" + HINT):
        COCO(annotations, images, names)
    with pytest.raises(ValueError, match=r"a.jpg is 16 x 24, .*a.json says 24 x 16" + HINT):
        COCO(annotations, images, names, train=True)[0]
    for train in (False, True):
        image, target = COCO(annotations, images, names, train=train, ignore_orientation=True)[0]
        assert image.shape == (3, 16, 24)
        assert target["boxes"].tolist() == [[14, 2, 22, 8]]
        assert target["masks"][0, 2:8, 14:22].all()
    with pytest.raises(SystemExit):
        call("validate", f"annotations={annotations}", f"images={images}")
    assert HINT in capsys.readouterr().out
    call("validate", f"annotations={annotations}", f"images={images}", "ignore_orientation=true")

    for folder, name in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        path = tmp_path / "cities" / folder / "train" / "ulm" / f"a_{name}.png"
        save(path) if folder == "leftImg8bit" else (path.parent.mkdir(parents=True), Image.new("L", (24, 16), 7).save(path))
    with pytest.raises(ValueError, match=HINT):
        Cityscapes(tmp_path / "cities", "train")[0]
    assert Cityscapes(tmp_path / "cities", "train", ignore_orientation=True)[0][0].shape == (3, 16, 24)


def test_annotations_with_an_orientation_of_their_own(tmp_path):
    labels = np.tile(np.arange(1, 25, dtype=np.uint8), (16, 1))
    root = write_ade20k(tmp_path, labels)
    save(root / "annotations" / "validation" / "a.png", labels)
    assert torch.equal(ADE20K(root, "val")[0][1] + 1, torch.from_numpy(np.rot90(labels, -1).copy()).long())
    assert torch.equal(ADE20K(root, "val", ignore_orientation=True)[0][1] + 1, torch.from_numpy(labels).long())


def write_shard(path, content):
    with tarfile.open(path, "w") as archive:
        for suffix, data in (("jpg", content), ("cls", b"3")):
            member = tarfile.TarInfo(f"a.{suffix}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def test_photographs_and_masks(tmp_path):
    path = save(tmp_path / "train" / "cat" / "a.jpg")
    assert Places(tmp_path, "train")[0].shape == (3, 24, 16)
    assert Places(tmp_path, "train", ignore_orientation=True)[0].shape == (3, 16, 24)
    assert ImageNet(tmp_path, "train", classes=1)[0][0].shape == (3, 24, 16)
    assert ImageNet(tmp_path, "train", classes=1, ignore_orientation=True)[0][0].shape == (3, 16, 24)
    hole = np.zeros((16, 24), np.uint8)
    hole[2:8, 14:22] = 255
    mask = save(tmp_path / "masks" / "a.png", hole)
    assert np.array_equal(read_mask(mask), np.rot90(hole, -1) > 0)
    assert np.array_equal(read_mask(mask, ignore_orientation=True), hole > 0)
    drawn = MaskFiles(mask.parent, ignore_orientation=True)(np.random.default_rng(0), 16, 24)
    assert np.array_equal(drawn, hole > 0)
    pytest.importorskip("webdataset")
    from carafepp.tasks.shards import Shards

    for ignored, shape in ((False, (1, 3, 24, 16)), (True, (1, 3, 16, 24))):
        shards = Shards(write_shard(tmp_path / "a.tar", path.read_bytes()), ignore_orientation=ignored)
        shards.batches = 1
        assert next(iter(shards))[0].shape == shape


def test_unknown_options_are_refused(tmp_path):
    save(tmp_path / "train" / "a.jpg")
    with pytest.raises(TypeError, match="ignore_orientatoin"):
        Places(tmp_path, "train", ignore_orientatoin=True)


def test_options_of_evaluation_on_the_command_line(tmp_path):
    root = write_ade20k(tmp_path, np.ones((16, 24), np.uint8))
    run = compose_config("train", f"data.root={root}", "+data.train.ignore_orientation=true")
    OmegaConf.set_struct(run, False)
    options = OmegaConf.from_dotlist(["val.ignore_orientation=true", "val.allow_huge=true"])
    val = instantiate(configure_data(run, options).val)
    assert val[0][0].shape == (3, 16, 24)
    assert val.reading == {"ignore_orientation": True, "allow_huge": True}
    assert instantiate(run.data.train).reading == {"ignore_orientation": True, "allow_huge": False}


@pytest.fixture
def small_limit(monkeypatch):
    """A limit that Pillow enforces above 100 pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    yield
    assert Image.MAX_IMAGE_PIXELS == 50


HUGE = r"a.jpg is larger than Pillow allows \(Image size \(384 pixels\) exceeds limit of 100 pixels.*; allow_huge=true reads it nonetheless"


def test_images_above_the_limit_are_named_or_read(tmp_path, small_limit, recwarn):
    path = save(tmp_path / "photographs" / "val" / "cat" / "a.jpg", orientation=1)
    # crops and resized images above the limit, too
    grow = v2.Compose([v2.RandomCrop((14, 20)), v2.Resize(40), v2.CenterCrop(30)])
    cases = [
        (Places, (path.parents[2], "val", grow), {}),
        (ImageNet, (path.parents[2], "val", grow), {"classes": 1}),
        (COCO, write_coco(tmp_path / "coco"), {}),
        (ADE20K, (write_ade20k(tmp_path / "ade", np.ones((24, 16), np.uint8)), "val"), {}),
    ]
    save(tmp_path / "coco" / "images" / "a.jpg", orientation=1)
    for data, arguments, options in cases:
        with pytest.raises(ValueError, match=HUGE):
            data(*arguments, **options)[0]
        read = data(*arguments, **options, allow_huge=True)[0]
        assert (read if data is Places else read[0]).shape[0] == 3
    with pytest.raises(ValueError, match=HUGE):
        read_layer(path)
    assert read_layer(path, allow_huge=True).size == (24, 16)
    pytest.importorskip("webdataset")
    from carafepp.tasks.shards import Shards

    for allowed in (False, True):
        shards = Shards(write_shard(tmp_path / "a.tar", path.read_bytes()), grow, allow_huge=allowed)
        shards.batches = 1
        if allowed:
            assert next(iter(shards))[0].shape == (1, 3, 30, 30)
        else:
            with pytest.raises(ValueError, match=r"sample a of shard .*a.tar: .*exceeds limit of 100 pixels.*allow_huge=true"):
                next(iter(shards))
    assert not [warning for warning in recwarn if warning.category is Image.DecompressionBombWarning]


def test_masks_and_annotations_above_the_limit(tmp_path, monkeypatch, small_limit):
    root = write_ade20k(tmp_path, np.ones((24, 16), np.uint8))
    save(root / "images" / "validation" / "a.jpg", STORED[:8, :8])
    with pytest.raises(ValueError, match=r"annotation .*a.png is larger than Pillow allows"):
        ADE20K(root, "val")[0]
    mask = save(tmp_path / "mask.png", np.full((16, 24), 255, np.uint8), 1)
    with pytest.raises(ValueError, match=r"mask .*mask.png is larger than Pillow allows"):
        read_mask(mask)
    assert read_mask(mask, allow_huge=True).all()


def test_workers_read_images_above_the_limit(tmp_path, small_limit):
    for name in "abcd":
        save(tmp_path / "val" / f"{name}.jpg", orientation=1)
    crop = v2.RandomCrop((14, 20))
    assert len(list(DataLoader(Places(tmp_path, "val", crop, allow_huge=True), 2, num_workers=2))) == 2


def test_threads_leave_the_limit_of_the_process(tmp_path, small_limit):
    path = save(tmp_path / "a.jpg", orientation=1)
    with ThreadPoolExecutor(8) as pool:
        assert all(image.size == (24, 16) for image in pool.map(lambda _: read_image(path, allow_huge=True), range(200)))
    assert Image.MAX_IMAGE_PIXELS == 50
    with pytest.raises(KeyError), lift_size_limit(True), lift_size_limit(True):
        raise KeyError
    assert Image.MAX_IMAGE_PIXELS == 50
    # an error in the file leaves the limit, too
    (tmp_path / "b.jpg").write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"b.jpg cannot be read"):
        read_image(tmp_path / "b.jpg", allow_huge=True)


def test_limit_of_pillow_itself(tmp_path):
    """The limit is not that of the tests: a PNG of 20,000 x 20,000 pixels in 70 bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(
        ValueError, match=r"a.png is larger than Pillow allows \(Image size \(400000000 pixels\) exceeds limit of \d+ pixels"
    ):
        read_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png cannot be read"):
        read_image(tmp_path / "a.png", allow_huge=True)
