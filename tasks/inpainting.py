"""Image inpainting (paper, sections 4.3 and 5.1; Table X)."""

from collections.abc import Callable

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from torchmetrics.functional.image import structural_similarity_index_measure

from ..models.discriminator import inpainted
from .regions import View


def mean_within(values: Tensor, masks: Tensor) -> Tensor:
    """Average values [N, C, H, W] where masks [N, 1, H, W] are 1 -> [N], 0 where they are 0 everywhere."""
    return (values.mean(1, keepdim=True) * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3)).clamp(min=1)


def psnr(squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB from the mean squared error of images in [0, 1]; at most 100."""
    return -10 * squared_error.clamp(min=1e-10).log10()


def shrink(image: Tensor, mask: Tensor, max_side: int) -> tuple[Tensor, Tensor]:
    """An image [3, H, W] and its mask [1, H, W] with the longer side at most `max_side` pixels.

    Raises:
        ValueError: `max_side` is less than 1.
    """
    if max_side < 1:
        raise ValueError(f"max_side must be at least 1, got {max_side}")
    size = image.shape[1:]
    if max(size) <= max_side:
        return image, mask
    small = [max(1, round(side * max_side / max(size))) for side in size]
    # mean and maximum over the same cells, so that no colour of the hole gets into known pixels
    return F.adaptive_avg_pool2d(image, small), F.adaptive_max_pool2d(mask, small)


class Inpainting(L.LightningModule):
    """Train and evaluate a generator that maps (images [N, 3, H, W] in [-1, 1], masks [N, 1, H, W]) to images in [-1, 1].

    The result is the generator's inside the hole and the input's outside. Its loss is the mean absolute error in the hole, that outside,
    and an adversarial loss (hinge) over the patches of the result that the hole touches, each an average over an image, then over images.

    Generator and discriminator take their gradients at the same weights, and one optimizer steps both (simultaneous gradient descent; for
    Adam, whose state is a parameter's own, that is two optimizers of the same settings). So a step is an optimizer step as in every other
    training here: accumulation, loss scaling, several processes and resuming are Lightning's own.

    Scores are averages over images, each over its whole area ("val/L1", "val/psnr", "val/ssim") and over its hole alone ("val/L1_hole",
    "val/psnr_hole"). L1 is the mean absolute error of values in [0, 1] (the paper's percent are 100 times that), PSNR is in dB.

    Args:
        model: the generator.
        discriminator: maps (images in [-1, 1], masks) to scores [N, 1, h, w] of patches.
        optimizer: takes parameter groups.
        schedule: takes (optimizer, total_iters=steps of the training) and is stepped after every optimizer step; constant if None.
        hole_weight, valid_weight, adversarial_weight: of the three parts of the generator's loss.
    """

    monitor = "val/psnr"

    def __init__(
        self,
        model: nn.Module,
        discriminator: nn.Module,
        *,
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[..., LRScheduler] | None = None,
        hole_weight: float = 1.0,
        valid_weight: float = 1.0,
        adversarial_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.model, self.discriminator = model, discriminator
        self.optimizer, self.schedule = optimizer, schedule
        self.hole_weight, self.valid_weight, self.adversarial_weight = hole_weight, valid_weight, adversarial_weight
        self.scores = nn.ModuleDict({name: MeanMetric() for name in ("L1", "psnr", "ssim", "L1_hole", "psnr_hole")})

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Fill the holes of images [N, 3, H, W] in [0, 1], 1 in masks [N, 1, H, W] -> [N, 3, H, W] in [0, 1]; None means no hole."""
        masks = torch.zeros_like(images[:, :1]) if masks is None else masks
        generated = self.model(2 * images - 1, masks).to(images.dtype)
        return torch.where(masks > 0, (generated + 1) / 2, images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch  # [N, 3, H, W], [N, 1, H, W]
        truth = 2 * images - 1
        generated = self.model(truth, masks).to(truth.dtype)
        completed = torch.where(masks > 0, generated, truth)
        error = (generated - truth).abs()
        hole, valid = mean_within(error, masks).mean(), mean_within(error, 1 - masks).mean()

        # the generator's loss moves no weight of the discriminator, and the other way round
        self.discriminator.requires_grad_(False)
        adversarial = -inpainted(self.discriminator(completed, masks).float(), masks).mean()
        self.discriminator.requires_grad_(True)
        both = self.discriminator(torch.cat([truth, completed.detach()]), masks.repeat(2, 1, 1, 1)).float()
        real, fake = both.chunk(2)
        discriminator = inpainted(F.relu(1 - real) + F.relu(1 + fake), masks).mean()

        losses = {"hole": hole, "valid": valid, "adversarial": adversarial, "discriminator": discriminator}
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, prog_bar=True)
        return self.hole_weight * hole + self.valid_weight * valid + self.adversarial_weight * adversarial + discriminator

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, masks = batch
        completed = self(images, masks)
        error = completed - images
        for suffix, area in (("", torch.ones_like(masks)), ("_hole", masks)):
            self.scores[f"L1{suffix}"].update(mean_within(error.abs(), area))
            self.scores[f"psnr{suffix}"].update(psnr(mean_within(error.square(), area)))
        self.scores["ssim"].update(structural_similarity_index_measure(completed, images, data_range=1.0, reduction="none"))

    def on_validation_epoch_end(self) -> None:
        for name, score in self.scores.items():
            self.log(f"val/{name}", score.compute(), prog_bar=name in ("L1", "psnr"))
            score.reset()

    def configure_optimizers(self) -> Optimizer | dict:
        optimizer = self.optimizer([{"params": list(network.parameters())} for network in (self.model, self.discriminator)])
        if self.schedule is None:
            return optimizer
        schedule = self.schedule(optimizer, total_iters=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def pictures(self, sample: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Pictures [3, H, W] in [0, 1] of one validation sample: "image" with a white hole, "mask", "prediction" and "truth" (Figure 8)."""
        image, mask = sample
        prediction = self.draw(image, mask)
        return {"image": torch.where(mask > 0, 1, image), "mask": mask.expand(3, -1, -1), "prediction": prediction, "truth": image}

    def draw(self, image: Tensor, mask: Tensor) -> Tensor:
        """Fill the hole of an image [3, H, W] in [0, 1], 1 in the mask [1, H, W] -> [3, H, W]; known pixels keep their values."""
        return self(image[None].to(self.device), mask[None].to(self.device))[0].cpu()

    def fill(self, image: Tensor, mask: Tensor, max_side: int) -> Tensor:
        """Fill the hole of a photograph of any size, see `draw`; what fills it is computed with the longer side at most `max_side` pixels.

        Raises:
            ValueError: `max_side` is less than 1.
        """
        size = image.shape[1:]
        filled = self.draw(*shrink(image, mask, max_side))
        if filled.shape[1:] == size:
            return filled
        filled = F.interpolate(filled[None], size, mode="bicubic", align_corners=False)[0].clamp(0, 1)
        return torch.where(mask > 0, filled, image)

    def view(self, image: Tensor, mask: Tensor, max_side: int) -> View:
        """What the generator sees of an image [3, H, W] in [0, 1] with a hole, see `fill`."""
        small, hole = shrink(image, mask, max_side)
        inputs = (2 * small[None].to(self.device) - 1, hole[None].to(self.device))
        return View(self.model, inputs, torch.where(mask > 0, 1, image))
