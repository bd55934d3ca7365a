"""One step of each task at the scale of the paper: full-size networks, image sizes and folders as those of the public data sets.

They take minutes and gigabytes on a CPU, and therefore run only with PAPER_SCALE=1:
`PAPER_SCALE=1 pytest -s tests/scripts/test_paper_scale.py`. They print time and memory; docs/paper.md notes those of one machine.
"""

import json
import os
import resource
import time

import numpy as np
import pytest
from commands import run_command
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("PAPER_SCALE") != "1", reason="takes minutes and gigabytes: set PAPER_SCALE=1"),
]

NOISE = np.random.default_rng(0)


def write_image(path, width, height):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(NOISE.integers(0, 255, (height, width, 3), np.uint8)).save(path)


def write_imagenet(root):
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            write_image(root / split / name / f"{name}_1.JPEG", 500, 375)
    return ["num_classes=2"]


def write_coco(root):
    (root / "annotations").mkdir(parents=True)
    names = ["person", "bicycle"]
    for split in ("train2017", "val2017"):
        for number in (9, 25):
            write_image(root / split / f"{number:012d}.jpg", 640, 480)
        square = [[100.0, 100.0, 300.0, 100.0, 300.0, 250.0, 100.0, 250.0]]
        made = {
            "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480} for i in (9, 25)],
            "annotations": [
                {
                    "id": i,
                    "image_id": i,
                    "category_id": 1,
                    "bbox": [100, 100, 200, 150],
                    "area": 30000,
                    "iscrowd": 0,
                    "segmentation": square,
                }
                for i in (9, 25)
            ],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(made))
    return ["class_names=[person,bicycle]"]


def write_ade20k(root):
    for split, prefix in (("training", "train"), ("validation", "val")):
        for number in (1, 2):
            name = f"ADE_{prefix}_{number:08d}"
            write_image(root / "images" / split / f"{name}.jpg", 683, 512)
            labels = NOISE.integers(0, 151, (512, 683)).astype(np.uint8)
            (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(root / "annotations" / split / f"{name}.png")
    return []


def write_places(root):
    for folder in ("data_large_standard/a/abbey", "val_large"):
        for number in (1, 2):
            write_image(root / folder / f"Places365_{number:08d}.jpg", 680, 512)
    return []


@pytest.mark.parametrize(
    ("row", "write", "metric"),
    [
        ("table2/resnet50_carafe", write_imagenet, "val/top1"),
        ("table7/fpn_mask_head_backbone", write_coco, "val/mask_AP"),
        ("table8/upernet_resnet50_carafe", write_ade20k, "val/mIoU"),
        ("table10/partial_conv_carafe", write_places, "val/psnr_hole"),
    ],
)
def test_one_step_at_the_papers_scale(tmp_path, row, write, metric):
    overrides = write(tmp_path / "data")
    # the batch, the number of images and the machine are all that differs from the paper
    overrides += ["data.batch_size=2", "data.epochs=1", "data.val_batch_size=1", "data.workers=0", "trainer.val_check_interval=1.0"]
    overrides += ["trainer.accelerator=cpu", "trainer.sync_batchnorm=false", "trainer.enable_progress_bar=false"]
    start = time.monotonic()
    done = run_command(
        "train",
        f"experiment={row.split('/')[0]}",
        f"row={row}",
        f"data.root={tmp_path / 'data'}",
        f"hydra.run.dir={tmp_path / 'run'}",
        *overrides,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    # the peak of all tests so far
    print(f"{row}: {found['steps']} step, {time.monotonic() - start:.0f} s, at most {peak:.1f} GiB, {found['parameters']:,} parameters")
    assert found["steps"] == 1
    assert np.isfinite(found["metrics"][metric])
    assert len(list((tmp_path / "run").glob("*.ckpt"))) == 2
