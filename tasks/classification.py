"""Image classification (paper, section 5.1; Tables II and XII), which also trains the backbones of the other tasks."""

from collections.abc import Callable, Sequence

import lightning as L
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms.v2.functional import normalize

from .optimization import parameter_groups
from .pictures import caption
from .regions import View


class Classification(L.LightningModule):
    """Train and evaluate a network that maps images [N, 3, H, W] to logits [N, classes].

    Scores are fractions of the whole validation set: top-1 and top-5 of one crop an image, as the data set cuts it.

    Args:
        model: the network, as a function of the number of classes.
        num_classes: classes; labels are 0..num_classes - 1.
        optimizer: takes parameter groups (no weight decay on norms and biases).
        schedule: takes (optimizer, total_iters=steps of the training) and is stepped after every optimizer step.
        inference_transform: cuts a whole photograph to what the network is validated on; as it is if None.
        mean, std: of the images' channels, in [0, 1].
    """

    monitor = "val/top1"

    def __init__(
        self,
        model: Callable[..., nn.Module],
        *,
        num_classes: int,
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[..., LRScheduler],
        inference_transform: Callable[[Tensor], Tensor] | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.model = model(num_classes=num_classes)
        self.optimizer, self.schedule = optimizer, schedule
        self.inference_transform = inference_transform
        self.mean, self.std = list(mean), list(std)
        # of fewer than five classes, the best of all are right
        self.accuracies = nn.ModuleDict(
            {f"top{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro") for k in (1, 5)}
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] in [0, 1] to logits [N, classes]."""
        return self.model(normalize(images, self.mean, self.std))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch  # [N, 3, H, W], [N]
        loss = F.cross_entropy(self(images).float(), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images).float()
        for accuracy in self.accuracies.values():
            accuracy.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        for name, accuracy in self.accuracies.items():
            self.log(f"val/{name}", accuracy.compute(), prog_bar=True)
            accuracy.reset()

    def configure_optimizers(self) -> dict:
        optimizer = self.optimizer(parameter_groups(self.model))
        schedule = self.schedule(optimizer, total_iters=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def pictures(self, sample: tuple[Tensor, int]) -> dict[str, Tensor]:
        """Pictures [3, H, W] in [0, 1] of one validation sample: "image", "truth" and "prediction", the number of the class below it."""
        image, label = sample
        return {"image": image, "truth": caption(image, f"{label}"), "prediction": self._guess(image, image)}

    def draw(self, image: Tensor) -> Tensor:
        """Class and its probability below an image [3, H, W] in [0, 1] -> [3, H + a line, W]."""
        return self._guess(image, self.inference_transform(image) if self.inference_transform else image)

    def view(self, image: Tensor) -> View:
        """What the network sees of an image [3, H, W] in [0, 1]."""
        seen = self.inference_transform(image) if self.inference_transform else image
        return View(self.model, (normalize(seen[None].to(self.device), self.mean, self.std),), seen)

    def _guess(self, image: Tensor, seen: Tensor) -> Tensor:
        probability, label = self(seen[None].to(self.device)).float().softmax(1)[0].max(0)
        return caption(image, f"{label.item()}  {probability.item():.0%}")
