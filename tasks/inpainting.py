"""Image inpainting (paper, sections 4.3 and 5.1; Table X)."""

from pathlib import Path
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.transforms.v2.functional import pil_to_tensor

from ..models.discriminator import average_over_hole
from .exportable import Exportable
from .images import ReadOptions, read_image, suggest_orientation
from .masks import read_mask
from .prediction_files import FilledImages
from .task import MakeOptimizer, MakeSchedule, Task, View, register_metrics


def mean_within(values: Tensor, masks: Tensor) -> Tensor:
    """Average values [N, C, H, W] where masks [N, 1, H, W] are 1 -> [N]; 0 for a mask that is 0 everywhere."""
    return (values.mean(1, keepdim=True) * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3)).clamp(min=1)


def psnr(squared_error: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio in dB, at most 100, from the mean squared error of images in [0, 1]."""
    return -10 * squared_error.clamp(min=1e-10).log10()


def shrink(image: Tensor, mask: Tensor, max_side: int | None) -> tuple[Tensor, Tensor]:
    """Shrink an image [3, H, W] and its mask [1, H, W] until the longer side has at most `max_side` pixels; None keeps their size.

    Raises:
        ValueError: `max_side` is less than 1.
    """
    size = image.shape[1:]
    if max_side is None:
        return image, mask
    if max_side < 1:
        raise ValueError(f"max_side must be at least 1, got {max_side}")
    if max(size) <= max_side:
        return image, mask
    small = max(1, round(size[0] * max_side / max(size))), max(1, round(size[1] * max_side / max(size)))
    # mean and maximum over the same cells keep the colours of the hole out of known pixels
    return F.adaptive_avg_pool2d(image, small), F.adaptive_max_pool2d(mask, small)


def fill(generator: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    """Fill the holes of images [N, 3, H, W] in [0, 1], where masks [N, 1, H, W] are 1, by a generator of images in [-1, 1]."""
    generated = generator(2 * images - 1, masks).to(images.dtype)
    return torch.where(masks > 0, (generated + 1) / 2, images)


class Filler(nn.Module):
    """Module that fills the holes of images (see `fill`)."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Fill the holes of images [N, 3, H, W] in [0, 1], where masks [N, 1, H, W] are 1."""
        return fill(self.generator, images, masks)


class Inpainting(Task):
    """Task that trains and evaluates a generator from (images [N, 3, H, W] in [-1, 1], masks [N, 1, H, W]) to images in [-1, 1].

    The result is the generator's output inside the hole and the input outside. The loss has three parts: the mean absolute error in the
    hole, the mean absolute error outside, and an adversarial loss (hinge) over the patches of the result that overlap the hole. Each is
    averaged over an image and then over images.

    One optimizer steps generator and discriminator together, with gradients at the same weights (simultaneous gradient descent). Adam keeps
    its state for each parameter, so that this equals two optimizers with the same settings. A step is one optimizer step, so that
    Lightning's accumulation, loss scaling, multiple processes and resuming work as in the other tasks.

    Scores are averages over images, over the whole area ("val/L1", "val/psnr", "val/ssim") and over the hole alone ("val/L1_hole",
    "val/psnr_hole"). L1 is the mean absolute error of values in [0, 1]; the paper's percentages are 100 times that. PSNR is in dB.

    Args:
        model: the generator.
        discriminator: maps (images in [-1, 1], masks) to scores [N, 1, h, w] of patches.
        optimizer, schedule: see `Task`; all parameters have weight decay.
        hole_weight, valid_weight, adversarial_weight: weights of the three parts of the generator's loss.
    """

    monitor = "val/psnr"
    direction = "max"
    takes_mask = True
    bench_size = (256, 256)

    def __init__(
        self,
        model: nn.Module,
        discriminator: nn.Module,
        *,
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None = None,
        hole_weight: float = 1.0,
        valid_weight: float = 1.0,
        adversarial_weight: float = 0.1,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        self.discriminator = discriminator
        self.hole_weight, self.valid_weight, self.adversarial_weight = hole_weight, valid_weight, adversarial_weight
        self.scores = register_metrics({name: MeanMetric() for name in ("L1", "psnr", "ssim", "L1_hole", "psnr_hole")})

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Fill the holes of images [N, 3, H, W] in [0, 1], where masks [N, 1, H, W] are 1 -> [N, 3, H, W] in [0, 1]; None means no hole."""
        return fill(self.model, images, torch.zeros_like(images[:, :1]) if masks is None else masks)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the sum of all losses for images [N, 3, H, W] in [0, 1] and masks [N, 1, H, W], 1 in the hole."""
        images, masks = batch  # [N, 3, H, W], [N, 1, H, W]
        truth = 2 * images - 1
        generated = self.model(truth, masks).to(truth.dtype)
        completed = torch.where(masks > 0, generated, truth)
        error = (generated - truth).abs()
        hole, valid = mean_within(error, masks).mean(), mean_within(error, 1 - masks).mean()

        # each of the two losses must change only its own network
        self.discriminator.requires_grad_(False)
        adversarial = -average_over_hole(self.discriminator(completed, masks).float(), masks).mean()
        self.discriminator.requires_grad_(True)
        both = self.discriminator(torch.cat([truth, completed.detach()]), masks.repeat(2, 1, 1, 1)).float()
        real, fake = both.chunk(2)
        discriminator = average_over_hole(F.relu(1 - real) + F.relu(1 + fake), masks).mean()

        losses = {"hole": hole, "valid": valid, "adversarial": adversarial, "discriminator": discriminator}
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, prog_bar=True)
        return self.hole_weight * hole + self.valid_weight * valid + self.adversarial_weight * adversarial + discriminator

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch, as in training, to the scores."""
        images, masks = batch
        completed = self(images, masks)
        error = completed - images
        for suffix, area in (("", torch.ones_like(masks)), ("_hole", masks)):
            self.scores[f"L1{suffix}"].update(mean_within(error.abs(), area))
            self.scores[f"psnr{suffix}"].update(psnr(mean_within(error.square(), area)))
        self.scores["ssim"].update(structural_similarity_index_measure(completed, images, data_range=1.0, reduction="none"))

    def on_validation_epoch_end(self) -> None:
        """Log the scores over the whole validation set."""
        for name, score in self.scores.items():
            self.log(f"val/{name}", score.compute(), prog_bar=name in ("L1", "psnr"))
            score.reset()

    def parameter_groups(self) -> list[dict]:
        """Return the parameters of the generator and those of the discriminator, all with weight decay."""
        return [{"params": list(network.parameters())} for network in (self.model, self.discriminator)]

    def read(
        self,
        path: Path,
        mask_path: Path | None,
        max_side: int,
        *,
        invert: bool = False,
        threshold: int | None = None,
        **reading: Unpack[ReadOptions],
    ) -> tuple[Tensor, Tensor, int]:
        """Read a photograph [3, H, W] in [0, 1] at its own size and its mask [1, H, W], 1 in the hole; return `max_side` with them.

        `invert` and `threshold` are those of `read_mask`, and `reading` is for both files.

        Raises:
            FileNotFoundError, ValueError: a file is missing or cannot be used, or photograph and mask differ in size.
        """
        if mask_path is None:
            raise ValueError(f"{path} needs a mask")
        image = pil_to_tensor(read_image(path, **reading)).float() / 255
        mask = torch.from_numpy(read_mask(mask_path, invert=invert, threshold=threshold, **reading))
        if mask.shape != image.shape[1:]:
            (height, width), (mask_height, mask_width) = image.shape[1:], mask.shape
            hint = suggest_orientation((height, width), (mask_height, mask_width), **reading)
            raise ValueError(
                f"mask {mask_path} must have the size of {path}, {width} x {height} pixels, got {mask_width} x {mask_height}{hint}"
            )
        return image, mask[None].float(), max_side

    def predict(self, image: Tensor, mask: Tensor, max_side: int | None = None) -> Tensor:
        """Fill the hole of an image [3, H, W] in [0, 1], 1 in the mask [1, H, W] -> [3, H, W]; known pixels keep their values.

        The content of the hole is computed on an image whose longer side is at most `max_side` pixels, None for any size.

        Raises:
            ValueError: `max_side` is less than 1.
        """
        small, hole = shrink(image, mask, max_side)
        filled = self(small[None].to(self.device), hole[None].to(self.device))[0].cpu()
        if filled.shape == image.shape:
            return filled
        filled = F.interpolate(filled[None], image.shape[1:], mode="bicubic", align_corners=False)[0].clamp(0, 1)
        return torch.where(mask > 0, filled, image)

    def draw(self, image: Tensor, mask: Tensor, max_side: int | None = None, prediction: Tensor | None = None) -> Tensor:
        """Draw the filled image, see `predict`."""
        return self.predict(image, mask, max_side) if prediction is None else prediction

    def prediction_files(self, folder: Path) -> FilledImages:
        """Return the writer of filled photographs."""
        return FilledImages(folder)

    def view(self, image: Tensor, mask: Tensor, max_side: int | None = None) -> View:
        """Return the input of the generator for an image [3, H, W] in [0, 1] with a hole, see `predict`."""
        small, hole = shrink(image, mask, max_side)
        inputs = (2 * small[None].to(self.device) - 1, hole[None].to(self.device))
        return View(self.model, inputs, self.show(image, mask))

    def show(self, image: Tensor, mask: Tensor, max_side: int | None = None) -> Tensor:
        """Draw an image [3, H, W] in [0, 1] with a white hole."""
        return torch.where(mask > 0, 1, image)

    def exportable(self) -> Exportable:
        """Return the network that fills images [N, 3, H, W] in [0, 1] where masks [N, 1, H, W] are 1."""
        outputs = {"filled": "[N, 3, H, W], RGB in [0, 1]: the generated content where the mask is 1, the image elsewhere"}
        facts = {"masks": "1 in the hole, 0 elsewhere"}
        return Exportable(Filler(self.model), {"images": 3, "masks": 1}, outputs, facts)

    def pictures(self, sample: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Draw a validation sample -> "image" with a white hole, "mask", "prediction" and "truth", each [3, H, W] in [0, 1] (Figure 8)."""
        image, mask = sample
        prediction = self.draw(image, mask)
        return {"image": self.show(image, mask), "mask": mask.expand(3, -1, -1), "prediction": prediction, "truth": image}
