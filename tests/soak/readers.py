"""A damaged file of every kind, and what its reader must do: accept it and return sound values, or name it in an error."""

import json
import logging
import resource
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import coco_files
import numpy as np
import torch
from carafepp.models.weights import load_weights
from carafepp.scripts.common.checkpoints import check_last_checkpoint, load_checkpoint, load_task
from carafepp.scripts.common.paper import read_paper
from carafepp.scripts.common.results import UNPRINTABLE
from carafepp.scripts.common.run_folders import read_config
from carafepp.scripts.reporting import group_runs, plot_table, read_runs, render_tables, tabulate_others, tabulate_paper
from carafepp.scripts.validate import find_problems
from carafepp.tasks.ade20k import ADE20K, class_names
from carafepp.tasks.coco import COCO
from carafepp.tasks.coco_eval import average_precision, to_corner_and_size
from carafepp.tasks.image_files import ImageFiles
from carafepp.tasks.imagenet import ImageNet
from carafepp.tasks.images import read_image, read_layer
from carafepp.tasks.layouts import write_scenes
from carafepp.tasks.masks import Masked, MaskFiles, read_mask
from carafepp.tasks.places import Places
from carafepp.tasks.shards import Shards
from PIL import Image
from report_runs import write_run

from soak.damage import damage_bytes, damage_json, damage_values
from soak.originals import encode, make_images, make_masks

OLD_RUN = Path(__file__).parents[1] / "data" / "run_of_0.1.0"
# address space of the process, far above what small files need
MOST_BYTES = 8 << 30

Read = Callable[[np.random.Generator, Path], str]
IMAGES, MASKS = make_images(), make_masks()


class Refused(Exception):
    """The reader has refused the file by name."""


def prepare() -> Callable[[int], str]:
    """Return the function that damages and reads the file of a seed, in the folder "case" of the working directory."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    torch.set_num_threads(1)
    base = Path("base")
    coco_files.write(base / "coco")
    write_scenes("places365", base / "scenes", train=1, val=1, size=64)
    folder = Path("case")
    kinds = list(KINDS)
    shares = np.array([KINDS[kind][0] for kind in kinds], float)

    def check(seed: int) -> str:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kind = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
        try:
            what = KINDS[kind][1](rng, folder)
        except Refused:
            return f"{kind}: refused by name"
        except Exception as error:
            error.add_note(kind)
            raise
        return f"{kind}: {what or 'read'}"

    return check


@contextmanager
def refusing(*names: str | Path) -> Iterator[None]:
    """Turn an error that names one of `names` into Refused; other errors are failures."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        if any(str(name) in str(error) for name in names):
            raise Refused from error
        raise


def write_damaged(path: Path, originals: dict[str, bytes], rng: np.random.Generator) -> None:
    """Write one of the files, damaged, to `path`."""
    names = list(originals)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(damage_bytes(originals[names[rng.integers(len(names))]], rng))


def check_picture(image: torch.Tensor) -> None:
    """Check an image [3, H, W] in [0, 1]."""
    assert image.dtype == torch.float32
    assert image.dim() == 3
    assert image.shape[0] == 3
    assert image.numel() > 0
    assert image.isfinite().all()
    assert 0 <= image.min() <= image.max() <= 1


def draw_options(rng: np.random.Generator) -> dict[str, bool]:
    """Draw options of reading images."""
    return {"ignore_orientation": bool(rng.random() < 0.3), "allow_huge": bool(rng.random() < 0.1)}


def image(rng: np.random.Generator, folder: Path) -> None:
    """Read an image of any format, with and without its transparency."""
    path = folder / "a.png"
    write_damaged(path, IMAGES, rng)
    for read, mode in ((read_image, "RGB"), (read_layer, "RGBA")):
        with refusing(path):
            pixels = read(path, **draw_options(rng))
        assert pixels.mode == mode
        assert min(pixels.size) > 0
        assert np.asarray(pixels).dtype == np.uint8


def photograph(rng: np.random.Generator, folder: Path) -> None:
    """Read damaged images through the data sets of classes and of photographs, with holes from mask files."""
    for split, name in (("train", "cat/0.jpg"), ("train", "cat/1.jpg"), ("val", "cat/0.jpg")):
        (folder / split / "cat").mkdir(parents=True, exist_ok=True)
        (folder / split / name).write_bytes(IMAGES["color.jpg"])
    split = str(rng.choice(["train", "val"]))
    path = folder / split / "cat" / "0.jpg"
    write_damaged(path, IMAGES, rng)
    data: ImageFiles = ImageNet(folder, split, classes=1, **draw_options(rng)) if rng.random() < 0.5 else Places(folder, split)
    with refusing(path):
        item = data[0]
    assert not isinstance(item, tuple) or item[1] == 0
    check_picture(item[0] if isinstance(item, tuple) else item)
    if isinstance(data, Places):
        (folder / "masks").mkdir()
        (folder / "masks" / "a.png").write_bytes(MASKS["hard.png"])
        picture, mask = Masked(data, MaskFiles(folder / "masks"))[0]
        assert mask.shape == (1, *picture.shape[1:])


def mask(rng: np.random.Generator, folder: Path) -> None:
    """Read a mask with options."""
    path = folder / "masks" / "a.png"
    write_damaged(path, MASKS if rng.random() < 0.8 else IMAGES, rng)
    options = {"invert": bool(rng.random() < 0.3), "threshold": [None, 1, 128, 255][rng.integers(4)]}
    with refusing(path):
        hole = read_mask(path, **options, **draw_options(rng))
        assert hole.dtype == bool
        assert hole.ndim == 2
        assert hole.any()
        hole = MaskFiles(path.parent, **options)(rng, 20, 30)
    assert hole.shape == (20, 30)


def label_map(rng: np.random.Generator, folder: Path) -> None:
    """Read an image with a map of labels or colours, one of them damaged."""
    labels = np.arange(24 * 16, dtype=np.uint8).reshape(16, 24) % 4
    colored = Image.fromarray(labels)
    colored.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    files = {"a.jpg": IMAGES["color.jpg"], "a.png": encode(Image.fromarray(labels) if rng.random() < 0.5 else colored, "PNG")}
    palette = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]] if rng.random() < 0.4 else None
    damaged = str(rng.choice(["a.jpg", "a.png", "a.png"]))
    for name, kind in (("a.jpg", "images"), ("a.png", "annotations")):
        path = folder / kind / "validation" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(damage_bytes(files[name], rng) if name == damaged else files[name])
    with refusing(folder):
        pixels, found = ADE20K(folder, "val", classes=3, palette=palette, **draw_options(rng))[0]
    check_picture(pixels)
    assert found.dtype == torch.int64
    assert found.shape == pixels.shape[1:]
    assert set(found.unique().tolist()) <= {0, 1, 2, 3, 255}


def annotations(rng: np.random.Generator, folder: Path) -> None:
    """Read an annotation file: check it, train on it, and evaluate with it."""
    path, images = folder / "a.json", Path("base") / "coco" / "val2017"
    made = coco_files.content()
    path.write_bytes(damage_json(made, rng) if rng.random() < 0.8 else damage_bytes(json.dumps(made).encode(), rng))
    with refusing(path):
        problems = find_problems(path, images, decode=bool(rng.random() < 0.3))
    assert all(len(str(problem)) < 3000 and str(problem).isprintable() for problem in problems)
    options = {"allow_outside": bool(rng.random() < 0.2), "keep_empty": bool(rng.random() < 0.5)}
    with refusing(path):
        data = COCO(path, images, coco_files.NAMES, train=bool(rng.random() < 0.5), **options)
    found: dict[str, list[dict]] = {"bbox": [], "segm": []}
    categories = [category["id"] for category in sorted(data.ground_truth()["categories"], key=lambda category: category["id"])]
    for index in range(len(data)):
        # an image of another size than the file says
        with refusing(path):
            pixels, target = data[index]
        check_picture(pixels)
        check_target(target, tuple(pixels.shape[1:]), data.masks)
        for label, box in zip(target["labels"].tolist(), to_corner_and_size(target["boxes"]), strict=True):
            head = {"image_id": target["image_id"], "category_id": categories[label - 1], "score": float(rng.random())}
            found["bbox"].append({**head, "bbox": box})
    kinds = ["bbox", "segm"] if data.masks else ["bbox"]
    for kind in kinds:
        scores = average_precision(data.ground_truth(), found[kind], kind)
        assert all(0 <= score <= 1 for score in scores.values()), f"scores {scores}"


def check_target(target: dict[str, Any], size: tuple[int, int], masks: bool) -> None:
    """Check the boxes, labels and masks of an image of `size`."""
    boxes, count = target["boxes"], len(target["labels"])
    assert boxes.shape == (count, 4)
    assert boxes.isfinite().all()
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2:] <= torch.tensor(size[::-1])).all()
    assert all(1 <= label <= len(coco_files.NAMES) for label in target["labels"].tolist())
    assert target["area"].isfinite().all()
    assert (target["area"] > 0).all()
    assert ("masks" in target) == masks
    if masks:
        assert target["masks"].shape == (count, *size)
        assert (target["masks"] <= 1).all()


def shard(rng: np.random.Generator, folder: Path) -> None:
    """Read batches of a damaged shard."""
    import io
    import tarfile

    path, content = folder / "a.tar", io.BytesIO()
    names = list(IMAGES)
    inside = rng.random() < 0.3
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number in range(3):
            data = IMAGES[names[rng.integers(len(names))]]
            label = str(number).encode()
            if inside and number == 1:
                data, label = damage_bytes(data, rng), damage_bytes(label, rng)
            for suffix, part in (("jpg", data), ("cls", label)):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
    path.write_bytes(content.getvalue() if inside else damage_bytes(content.getvalue()[:9000], rng))
    stream = Shards(str(path), lambda image: image.resize((8, 8)), buffer=2)
    stream.batches, stream.batch_size = 2, 2
    with refusing(path):
        for images, labels in stream:
            assert images.shape == (2, 3, 8, 8)
            for each in images:
                check_picture(each)
            assert labels.dtype == torch.int64
            assert (labels >= 0).all()


def configuration(rng: np.random.Generator, folder: Path) -> None:
    """Read the configuration of a run folder."""
    from omegaconf import DictConfig, OmegaConf

    path = folder / "config.yaml"
    whole = (OLD_RUN / "config.yaml").read_bytes()
    if rng.random() < 0.5:
        path.write_bytes(damage_bytes(whole, rng))
    else:
        # JSON is YAML
        path.write_bytes(damage_json(OmegaConf.to_container(OmegaConf.create(whole.decode())), rng))
    with refusing(path):
        config = read_config(folder, trust=["torchvision"])
    assert isinstance(config, DictConfig)


def result(rng: np.random.Generator, folder: Path) -> None:
    """Read runs with a damaged result.json, and report them in every format."""
    for seed in range(2):
        write_run(folder / f"{seed}", seed, {"val/box_AP": 0.3, "val/box_AP50": 0.5}, "model.width=8", row="table1/faster_rcnn_resnet50")
    write_run(folder / "2", 2, {"val/mIoU": 0.3}, "task=segmentation")
    path = folder / f"{rng.integers(3)}" / "result.json"
    path.write_bytes(damage_json(json.loads(path.read_text()), rng))
    (folder / "failed").mkdir()
    (folder / "failed" / "error.txt").write_bytes(damage_bytes("ValueError: image é.jpg\n\nTraceback\n".encode(), rng))
    runs, problems = read_runs([folder, folder / "failed"])
    assert len(runs) + len(problems) == 4
    assert str(folder / "failed") in problems[-1]
    assert all(problem.startswith(str(folder)) and not UNPRINTABLE.search(problem) for problem in problems)
    settings, _ = group_runs(runs, read_paper()[0])
    tables = tabulate_paper(settings, ["AP", "AP50", "mIoU"], 4, None)
    if others := [setting for setting in settings if not setting.table]:
        tables.append(tabulate_others(others, 4, None))
    for name in ("terminal", "markdown", "latex", "csv"):
        render_tables(tables, name).encode()
    if rng.random() < 0.03:
        for number, table in enumerate(tables):
            plot_table(table, folder, f"plot{number}")
    if len(problems) > 1:
        raise Refused


def checkpoint(rng: np.random.Generator, folder: Path) -> None:
    """Read a checkpoint whose bytes, configuration or tensors are damaged."""
    path = folder / "last.ckpt"
    whole = OLD_RUN / "last.ckpt"
    if rng.random() < 0.6:
        path.write_bytes(damage_bytes(whole.read_bytes(), rng))
    else:
        content = torch.load(whole, weights_only=True)
        part = ["config", "state_dict", "all"][rng.integers(3)]
        if part == "config":
            content["config"] = damage_values(content["config"], rng)
        elif part == "state_dict":
            content["state_dict"] = damage_tensors(content["state_dict"], rng)
        else:
            key = list(content)[rng.integers(len(content))]
            content[key] = [None, 1, "a", [], {}, torch.zeros(2)][rng.integers(6)]
        torch.save(content, path)
    with refusing(path, folder):
        check_last_checkpoint(folder)
    with refusing(path):
        load_checkpoint(path)
        # the old run trusts what its own configuration names
        task, _ = load_task(path)
    assert all(value.isfinite().all() for value in task.state_dict().values())


def damage_tensors(state: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Return a state dict with an entry that is missing, new, or of another type, shape or dtype."""
    name = list(state)[rng.integers(len(state))]
    value = state[name]
    ways: list[Any] = [
        None,
        1,
        "a",
        [1.0],
        value[..., None],
        value.reshape(-1)[:0],
        value.double(),
        value.to(torch.complex64),
        value.bool(),
        value.to_sparse() if value.dim() else value,
        {"a": value},
        value.expand(3, *value.shape),
    ]
    if rng.random() < 0.2:
        return {key: other for key, other in state.items() if key != name}
    if rng.random() < 0.2:
        return state | {str(rng.choice(["", "model", "a.b", "fc.weight"])): value}
    return state | {name: ways[rng.integers(len(ways))]}


def weights(rng: np.random.Generator, folder: Path) -> None:
    """Load a damaged file of weights, in the present and in the old format of PyTorch, into a network."""
    from carafepp.models.resnet import ResNet

    torch.manual_seed(0)
    network = ResNet((1, 1, 1, 1), width=4, num_classes=3)
    path = folder / "a.pth"
    state = dict(network.state_dict())
    if structure := rng.random() < 0.4:
        state = damage_tensors(state, rng)
    stored = {"state_dict": state} if rng.random() < 0.3 else state
    torch.save(stored, path, _use_new_zipfile_serialization=bool(rng.random() < 0.6))
    if not structure:
        path.write_bytes(damage_bytes(path.read_bytes(), rng))
    with refusing(path):
        load_weights(network, path)


def tiles(rng: np.random.Generator, folder: Path) -> None:
    """Read a damaged table of tiles."""
    from carafepp.kernels.gpu.tiles.geometry import Tile
    from carafepp.kernels.gpu.tiles.tables import read_table

    path = folder / "tiles.json"
    tile = [4, 8, 4, 32, 1, 4, 2]
    table = {"NVIDIA H100": {f"forward k5 up2 down1 c64 bytes{size} nchw align4 area2^12": tile for size in (2, 4)}, "cpu": {"a": tile}}
    path.write_bytes(damage_json(table, rng))
    with refusing(path):
        found = read_table(path)
    for values in (value for each in found.values() for value in each.values()):
        *sizes, transposed = Tile(*values)
        assert all(type(value) is int and value >= 1 for value in sizes)
        assert type(transposed) is int
        assert transposed in (0, 1)


def names_of_classes(rng: np.random.Generator, folder: Path) -> None:
    """Read the names of ADE20K's classes."""
    path = folder / "objectInfo150.txt"
    path.write_bytes(damage_bytes(b"Idx\tRatio\tName\n1\t0.1\twall, brick\n2\t0.2\tsky\n3\t0.1\tfen\xc3\xaatre\n", rng))
    with refusing(path):
        assert all(isinstance(name, str) for name in class_names(folder))


def marker(rng: np.random.Generator, folder: Path) -> None:
    """Continue a folder of scenes whose marker is damaged."""
    root = folder / "scenes"
    shutil.copytree(Path("base") / "scenes", root)
    path = root / "scenes.json"
    path.write_bytes(damage_json(json.loads(path.read_text()), rng))
    with refusing(root):
        write_scenes("places365", root, train=1, val=1, size=64)


# the share and the reader of every kind of file
KINDS: dict[str, tuple[float, Callable[[np.random.Generator, Path], Any]]] = {
    "image": (6, image),
    "photograph": (2, photograph),
    "mask": (2, mask),
    "label map": (2, label_map),
    "annotations": (6, annotations),
    "shard": (2, shard),
    "config.yaml": (1.5, configuration),
    "result.json": (1.5, result),
    "checkpoint": (2, checkpoint),
    "weights": (1.5, weights),
    "table of tiles": (1, tiles),
    "names of classes": (0.3, names_of_classes),
    "marker of scenes": (0.5, marker),
}
