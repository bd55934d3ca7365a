"""Inpainting: scores as they are defined, two networks that train as one step, runs that resume, holes filled in a user's photographs."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from carafepp.models.discriminator import PatchGAN
from carafepp.models.global_local import GlobalLocal
from carafepp.scripts.running.predict import find_masks
from carafepp.scripts.running.train import train
from carafepp.tasks.inpainting import Inpainting, mean_within, psnr
from carafepp.tasks.layouts import write_scenes
from carafepp.tasks.places import Places
from carafepp.tasks.runs import LastCheckpoint
from commands import call, find_processes, run_line, torchrun_line, wait_for_rows
from configurations import compose_config
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from training import read_result, read_weights, train_in

SMALL = ["experiment=table10", "scale=small", "data.train.images.length=16", "data.val.images.length=6", "data.val_batch_size=2"]
SMALL += ["data.train.images.size=32", "data.val.images.size=32", "data.batch_size=4", "model.width=4", "task.discriminator.width=4"]
SMALL += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "log_every_n_steps=1", "checkpoint_every_n_steps=2"]
# norms with fixed statistics do not depend on how a batch is cut, and in double precision nothing else differs visibly
EXACT = [*SMALL, "row=table10/partial_conv_carafe", "trainer.precision=64-true", "data.epochs=6"]
EXACT += ["+model.norm_layer={_target_:torchvision.ops.FrozenBatchNorm2d,_partial_:true}"]


class Fill(nn.Module):
    """A generator that fills everything with one colour."""

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        return self.value.expand_as(images)


def inpainting(model: nn.Module, **options) -> Inpainting:
    return Inpainting(model, PatchGAN(4), optimizer=torch.optim.SGD, **options)


def test_scores_of_whole_images_and_holes_by_hand():
    task = inpainting(Fill(0.0))  # 0.5 in [0, 1]
    images, masks = torch.full((2, 3, 16, 16), 0.6), torch.zeros(2, 1, 16, 16)
    masks[0, :, :4, :4], masks[1, :, :8] = 1, 1  # 1 / 16 and 1 / 2 of the image
    task.validation_step((images, masks), 0)
    scores = {name: score.compute().item() for name, score in task.scores.items()}
    assert scores["L1_hole"] == pytest.approx(0.1)
    assert scores["L1"] == pytest.approx(0.1 * (1 / 16 + 1 / 2) / 2)
    assert scores["psnr_hole"] == pytest.approx(20, abs=1e-3)
    assert scores["psnr"] == pytest.approx(20 + (10 * np.log10(16) + 10 * np.log10(2)) / 2, abs=1e-3)
    assert 0 < scores["ssim"] < 1


def test_perfect_and_empty_images_have_finite_scores():
    assert psnr(torch.zeros(1)) == 100
    assert mean_within(torch.ones(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)).tolist() == [0, 0]


def test_losses_move_each_network_its_own_way(monkeypatch):
    torch.manual_seed(0)
    images, masks = torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32)
    masks[..., 8:20, 8:20] = 1
    monkeypatch.setattr(Inpainting, "log_dict", lambda self, losses, **options: logged.update(losses))
    logged = {}

    def gradients(**options):
        task = inpainting(GlobalLocal(4), **options)
        task.load_state_dict(start)
        task.training_step((images, masks), 0).backward()
        return [torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (task.model, task.discriminator)]

    start = inpainting(GlobalLocal(4)).state_dict()
    generator, discriminator = gradients(adversarial_weight=0.0)
    with_adversary, same = gradients(adversarial_weight=10.0)
    assert torch.equal(discriminator, same)
    assert discriminator.abs().max() > 0
    assert not torch.allclose(generator, with_adversary)
    # the discriminator's own loss leaves the generator alone
    assert gradients(hole_weight=0.0, valid_weight=0.0, adversarial_weight=0.0)[0].abs().max() == 0
    # all scores start near 0, where the hinge loss is 2
    assert logged["train/discriminator"].item() == pytest.approx(2, abs=0.3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run of Global&Local with CARAFE++."""
    return train_in(tmp_path_factory.mktemp("whole") / "run", *SMALL, "row=table10/global_local_carafe", "data.epochs=3")


def test_run_has_scores_and_pictures(whole):
    found = read_result(whole)
    assert found["steps"] == 12
    assert found["metrics"].keys() == {"val/L1", "val/psnr", "val/ssim", "val/L1_hole", "val/psnr_hole"}
    assert 0 < found["metrics"]["val/L1"] < found["metrics"]["val/L1_hole"] < 1
    assert 5 < found["metrics"]["val/psnr_hole"] < found["metrics"]["val/psnr"] < 60
    assert found["flops"] > 0
    # parameters of the generator alone
    assert found["parameters"] == sum(
        v.numel() for k, v in read_weights(whole).items() if k.startswith("model.") and "running" not in k and "num_b" not in k
    )
    pictures = {name: np.asarray(Image.open(whole / "pictures" / f"0_{name}.png")) for name in ("image", "mask", "prediction", "truth")}
    hole = pictures["mask"] == 255
    assert 0 < hole.mean() < 1
    assert (pictures["image"][hole] == 255).all()
    assert (pictures["prediction"][~hole] == pictures["truth"][~hole]).all()
    assert (pictures["prediction"][hole] != pictures["truth"][hole]).mean() > 0.5


class Crashed(Exception):
    pass


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_crashed_run_resumes_bit_identically(whole, tmp_path, monkeypatch, precision):
    arguments = [*SMALL, "row=table10/global_local_carafe", "data.epochs=3", f"trainer.precision={precision}"]
    if precision != "32-true":
        whole = train_in(tmp_path / "whole", *arguments)
    saves = LastCheckpoint.on_train_batch_end

    def crash(self, trainer, *others):
        saves(self, trainer, *others)
        if trainer.global_step == 8:
            raise Crashed

    with monkeypatch.context() as context:
        context.setattr(LastCheckpoint, "on_train_batch_end", crash)
        with pytest.raises(Crashed):
            train_in(tmp_path / "crashed", *arguments)
    saved = torch.load(tmp_path / "crashed" / "last.ckpt", weights_only=True)
    assert saved["global_step"] in (6, 8)
    train(OmegaConf.load(tmp_path / "crashed" / "config.yaml"), tmp_path / "crashed")
    assert read_result(tmp_path / "crashed")["weights_sha256"] == read_result(whole)["weights_sha256"]
    assert (tmp_path / "crashed" / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    moved = [name for name, tensor in read_weights(whole).items() if not torch.equal(tensor, saved["state_dict"][name])]
    assert {name.split(".")[0] for name in moved} == {"model", "discriminator"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc, which only Linux has")
def test_two_processes_killed_and_resumed_train_as_one(tmp_path):
    alone = train_in(tmp_path / "alone", *EXACT)
    folder = tmp_path / "runs" / "job"
    arguments = [*EXACT, "trainer.devices=2", "trainer.strategy=ddp", f"hydra.run.dir={folder}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(torchrun_line(2, "job", "train", *arguments), cwd=tmp_path, stdout=log, stderr=log)
    wait_for_rows(folder, 7, process)
    # torchrun gives each of its processes a session of its own, so that no signal to a group reaches them all
    while processes := find_processes(f"hydra.run.dir={folder}"):
        for found in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found, signal.SIGKILL)
        time.sleep(0.05)
    process.wait()
    assert (folder / "last.ckpt").exists(), (tmp_path / "log").read_text()
    assert not (folder / "result.json").exists(), "the run must be killed before its end for this test to say anything"
    done = run_line(torchrun_line(2, "job", "train", f"resume={folder}", "trust=torchvision.ops"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_result(folder)["steps"] == read_result(alone)["steps"] == 24
    torch.testing.assert_close(read_weights(folder), read_weights(alone), rtol=1e-8, atol=1e-8)
    assert read_result(folder)["metrics"] == pytest.approx(read_result(alone)["metrics"])


def test_every_row_composes_at_both_scales():
    for scale in ("paper", "small"):
        for row in ("global_local", "global_local_carafe", "partial_conv", "partial_conv_carafe"):
            config = compose_config("train", "experiment=table10", f"row=table10/{row}", f"scale={scale}")
            with torch.device("meta"):
                task = instantiate(config.task)
                masks = torch.ones(1, 1, 37, 30)
                assert task(torch.rand(1, 3, 37, 30), masks).shape == (1, 3, 37, 30)
            assert type(task.model).__name__ == ("GlobalLocal" if row.startswith("global") else "PartialGlobalLocal")
            carafes = [module for module in task.modules() if type(module).__name__ == "CARAFE"]
            assert len(carafes) == (4 if row.endswith("carafe") else 0)
            # BN and ReLU behind the compressor are for backbones
            assert all(isinstance(module.compressor_norm, nn.Identity) for module in carafes)
    assert (config.optimizer.lr, *config.optimizer.betas) == (0.001, 0.5, 0.9)
    config = compose_config("train", "experiment=table10")
    assert (config.optimizer.lr, *config.optimizer.betas, config.data.batch_size) == (0.0001, 0.5, 0.9, 32)


def test_table10_trains_on_places_files(tmp_path):
    write_scenes(layout="places365", out=str(tmp_path / "places"), train=4, val=2, size=48, seed=0)
    arguments = ["experiment=table10", f"data.root={tmp_path}/places", "model.width=4", "task.discriminator.width=4", "data.workers=0"]
    arguments += ["data.train.images.transforms.transforms.0.size=40", "data.train.images.transforms.transforms.1.size=32"]
    arguments += ["data.val.images.transforms.transforms.0.size=40", "data.val.images.transforms.transforms.1.size=32", "data.batch_size=2"]
    arguments += ["data.epochs=1", "trainer.val_check_interval=1.0", "trainer.sync_batchnorm=false", "trainer.accelerator=cpu"]
    folder = train_in(tmp_path / "run", *arguments, "trainer.enable_progress_bar=false")
    assert read_result(folder)["steps"] == 2
    assert read_result(folder)["flops_input"] == [3, 32, 32]


def test_places_are_read_in_every_layout(tmp_path):
    for name in ("standard/train/a/airfield", "standard/val/a/airfield", "original/data_256_standard/a", "original/val_256"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (50, 40), 90).save(tmp_path / name / "1.jpg")
        (tmp_path / name / "notes.txt").write_text("no image")
    for root in ("standard", "original"):
        for split in ("train", "val"):
            data = Places(tmp_path / root, split, v2.RandomCrop(32))
            assert len(data) == 1
            assert data[0].shape == data[3, 0].shape == (3, 32, 32)
            assert data[0].mean().item() == pytest.approx(90 / 255, abs=0.01)
    (tmp_path / "standard" / "val" / "b.jpg").write_text("damaged")
    with pytest.raises(ValueError, match=r"val/b.jpg cannot be read"):
        Places(tmp_path / "standard", "val")[1]
    (tmp_path / "standard" / "train" / "b.jpg").write_text("damaged")
    assert torch.equal(Places(tmp_path / "standard", "train")[1], Places(tmp_path / "standard", "train")[0])
    with pytest.raises(FileNotFoundError, match="should hold the val images in a folder val or val_256"):
        Places(tmp_path, "val")
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        Places(tmp_path, "val")


@pytest.fixture
def photographs(tmp_path):
    """A folder of photographs of odd sizes and one of their masks."""
    rng = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    (tmp_path / "masks").mkdir()
    for name, size in (("odd.png", (61, 47)), ("wide.png", (33, 150)), ("small.png", (1, 3))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / "photographs" / name)
        mask = np.zeros(size, np.uint8)
        mask[: size[0] // 2 + 1, size[1] // 3 : size[1] // 2 + 1] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / name)
    return tmp_path


@pytest.mark.parametrize("max_side", [1000, 40])
def test_predict_fills_holes_and_keeps_the_rest(whole, photographs, max_side):
    out = photographs / "out"
    call(
        "predict",
        f"hydra.run.dir={out}",
        *(f"checkpoint={whole}/last.ckpt", f"images={photographs}/photographs", f"masks={photographs}/masks", f"max_side={max_side}"),
    )
    # three photographs, and figure.png with all of them
    assert len(list(out.glob("*.png"))) == 4
    for path in (photographs / "photographs").iterdir():
        before, after = (np.asarray(Image.open(p)) for p in (path, out / f"{path.name}.png"))
        hole = np.asarray(Image.open(photographs / "masks" / path.name)) > 0
        assert after.shape == before.shape
        assert (after[~hole] == before[~hole]).all()
        assert (after[hole] != before[hole]).any()


def test_figures_show_photograph_hole_and_fill_over_their_caption(whole, photographs):
    text = "Both scores are those of the validation set."
    plain, out = photographs / "plain", photographs / "out"
    options = [f"checkpoint={whole}/last.ckpt", f"images={photographs}/photographs", f"masks={photographs}/masks"]
    call("predict", f"hydra.run.dir={plain}", *options)
    call("predict", f"hydra.run.dir={out}", *options, f"caption='{text}'")
    figures = [np.asarray(Image.open(folder / "figure.png")) for folder in (plain, out)]
    assert figures[1].shape[0] > figures[0].shape[0]
    assert (figures[1][: figures[0].shape[0] - 20] == figures[0][:-20]).all()
    # the sheet of a photograph of 61 x 47 pixels, enlarged fivefold, has three columns
    sheet = np.asarray(Image.open(out / "odd.png.png"))
    photograph, hole = (np.asarray(Image.open(photographs / folder / "odd.png")) for folder in ("photographs", "masks"))
    filled = np.asarray(Image.open(out / "filled" / "odd.png"))
    top = next(y for y in range(len(sheet)) if (sheet[y, 7 : 7 + 5 * 47] == photograph[0].repeat(5, 0)).all())
    shown = [sheet[top : top + 5 * 61 : 5, x : x + 5 * 47 : 5] for x in (7 + i * (5 * 47 + 7) for i in range(3))]
    for actual, expected in zip(shown, (photograph, np.where(hole[..., None] > 0, 255, photograph), filled), strict=True):
        # both are rounded from the same values
        assert abs(actual.astype(int) - expected).max() <= 1
    with pytest.raises(ValueError, match="caption must have at most 200 characters, got 201: xxx"):
        call("predict", *options, f"caption={201 * 'x'}")


def predict(whole, photographs, mask, *options, image="odd.png"):
    """Fill the hole of a photograph by the command; return the pixels before and after."""
    out, path = photographs / "out", photographs / "photographs" / image
    call("predict", f"hydra.run.dir={out}", f"checkpoint={whole}/last.ckpt", f"images={path}", f"masks={mask}", *options)
    return np.asarray(Image.open(path).convert("RGB")), np.asarray(Image.open(out / f"{path.name}.png"))


def test_inverted_soft_and_transparent_masks_on_the_command_line(whole, photographs):
    hole = np.asarray(Image.open(photographs / "masks" / "odd.png")) > 0
    soft = np.where(hole, 140, 60).astype(np.uint8)
    layer = np.zeros((*hole.shape, 4), np.uint8)
    layer[hole] = (255, 60, 0, 255)
    for name, pixels, options in (
        ("inverted", np.where(hole, 0, 255).astype(np.uint8), ["invert_masks=true"]),
        ("soft", soft, ["mask_threshold=128"]),
        ("soft_inverted", 255 - soft, ["mask_threshold=128", "invert_masks=true"]),
        ("layer", layer, []),
        ("layer_inverted", np.where(hole[..., None], 0, 255).astype(np.uint8).repeat(4, -1), ["invert_masks=true"]),
    ):
        Image.fromarray(pixels).save(photographs / f"{name}.png")
        before, after = predict(whole, photographs, photographs / f"{name}.png", *options)
        assert (after[~hole] == before[~hole]).all(), name
        assert (after[hole] != before[hole]).any(1).mean() > 0.9, name
    with pytest.raises(ValueError, match=r"soft.png must contain only black .* give a threshold"):
        predict(whole, photographs, photographs / "soft.png")
    with pytest.raises(ValueError, match=r"threshold must be a whole number in 1..255, got 300"):
        predict(whole, photographs, photographs / "soft.png", "mask_threshold=300")


def test_orientation_and_size_on_the_command_line(whole, photographs, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    for folder in ("photographs", "masks"):
        with Image.open(photographs / folder / "wide.png") as image:
            image.save(photographs / folder / "side.png", exif=exif)
    mask = photographs / "masks" / "side.png"
    hole = np.asarray(Image.open(mask)) > 0
    before, after = predict(whole, photographs, mask, "ignore_orientation=true", image="side.png")
    assert after.shape == before.shape == (33, 150, 3)
    assert (after[~hole] == before[~hole]).all()
    before, turned = predict(whole, photographs, mask, image="side.png")
    assert (turned[~np.rot90(hole, -1)] == np.rot90(before, -1)[~np.rot90(hole, -1)]).all()
    upright = photographs / "masks" / "wide.png"
    with pytest.raises(ValueError, match=r"must have the size of .*side.png, 33 x 150 pixels, got 150 x 33; .*ignore_orientation=true"):
        predict(whole, photographs, upright, image="side.png")
    assert (predict(whole, photographs, upright, "ignore_orientation=true", image="side.png")[1] == after).all()

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"wide.png is larger than Pillow allows .*; allow_huge=true reads it nonetheless"):
        predict(whole, photographs, upright, image="wide.png")
    out = photographs / "huge"
    files = [f"images={photographs}/photographs/wide.png", f"masks={upright}", f"hydra.run.dir={out}"]
    call("predict", f"checkpoint={whole}/last.ckpt", *files, "allow_huge=true")
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert (out / "wide.png.png").exists()


def test_filling_does_not_look_into_the_hole(photographs):
    torch.manual_seed(0)
    task = inpainting(GlobalLocal(4)).eval()
    image, mask = torch.rand(3, 90, 70), torch.zeros(1, 90, 70)
    mask[:, 20:50, 11:40] = 1
    painted = torch.where(mask > 0, torch.rand(3, 90, 70), image)
    with torch.no_grad():
        for max_side in (200, 31):
            assert torch.equal(task.predict(image, mask, max_side), task.predict(painted, mask, max_side))
        everything = task.predict(image, torch.ones(1, 90, 70), 31)
        assert torch.equal(task.predict(image, torch.zeros(1, 90, 70), 31), image)
    assert everything.isfinite().all()


def test_wrong_masks_are_named(whole, photographs):
    masks, photograph = photographs / "masks", photographs / "photographs" / "odd.png"
    Image.new("L", (46, 61), 255).save(masks / "other.png")
    Image.new("L", (47, 61), 128).save(masks / "grey.png")
    Image.new("L", (47, 61), 0).save(masks / "none.png")
    checkpoint = f"checkpoint={whole}/last.ckpt"
    for mask, message in (
        ("other.png", r"must have the size of .*odd.png, 47 x 61 pixels, got 46 x 61"),
        ("grey.png", "grey.png must contain only black .* and white"),
        ("none.png", "none.png has no hole"),
    ):
        with pytest.raises(ValueError, match=message):
            call("predict", f"hydra.run.dir={photographs / 'out'}", checkpoint, f"images={photograph}", f"masks={masks / mask}")
    with pytest.raises(ValueError, match="takes a mask for every image: give masks="):
        call("predict", f"hydra.run.dir={photographs / 'out'}", checkpoint, f"images={photograph}")
    with pytest.raises(FileNotFoundError, match=r"masks=.*nowhere does not exist"):
        find_masks(photographs / "nowhere", [photograph])
    with pytest.raises(FileNotFoundError, match=r"has no mask for 1 of 2 images: lost.png is missing"):
        find_masks(masks, [photograph, photograph.with_name("lost.jpg")])
    Image.new("L", (47, 61), 255).save(masks / "odd.bmp")
    with pytest.raises(ValueError, match=r"masks has two masks for the same images, odd.bmp and odd.png: delete one"):
        find_masks(masks, [photograph])
    assert not list((photographs / "out").glob("*.png"))
