"""Image classification (paper, section 5.1; Tables II and XII), which also trains the backbones of the other tasks."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms.v2.functional import normalize

from .exportable import Exportable, Normalized
from .lettering import caption
from .pictures import enlarge
from .prediction_files import ClassTable
from .task import MakeOptimizer, MakeSchedule, Task, View, check_classes, list_class_names, register_metrics


class Classification(Task):
    """Task that trains and evaluates a network from images [N, 3, H, W] to logits [N, classes].

    Scores are the top-1 and top-5 accuracy over the whole validation set, as fractions, for one crop of each image as the data set cuts it.

    Args:
        model: the network, as a function of the number of classes.
        num_classes: the number of classes; labels are in 0..num_classes - 1.
        class_names: names of the classes for pictures and tables; None means their numbers.
        optimizer, schedule: see `Task`; norms and biases have no weight decay.
        inference_transform: crops a photograph to the part that the network is validated on; None keeps the whole photograph.
        mean, std: mean and standard deviation of the images' channels, in [0, 1].

    Raises:
        ValueError: there are fewer than two classes, or not as many names.
    """

    monitor = "val/top1"
    direction = "max"
    bench_size = (224, 224)

    def __init__(
        self,
        model: Callable[..., nn.Module],
        *,
        num_classes: int,
        optimizer: MakeOptimizer,
        schedule: MakeSchedule,
        class_names: Sequence[str] | None = None,
        inference_transform: Callable[[Tensor], Tensor] | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        super().__init__(model(num_classes=num_classes), optimizer=optimizer, schedule=schedule)
        self.num_classes = num_classes
        self.class_names = list_class_names(class_names or range(num_classes))
        if len(self.class_names) != num_classes:
            raise ValueError(f"class_names must name the {num_classes} classes, got {len(self.class_names)} names")
        self.inference_transform = inference_transform
        self.mean, self.std = list(mean), list(std)
        # with fewer than five classes, top-5 takes all of them
        accuracies = {f"top{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro") for k in (1, 5)}
        self.accuracies = register_metrics(accuracies)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] in [0, 1] to logits [N, classes]."""
        return self.model(normalize(images, self.mean, self.std))

    def setup(self, stage: str) -> None:
        """Check that the network has enough classes for the data.

        Raises:
            ValueError: the data has more classes than the network.
        """
        check_classes(self.trainer, "num_classes", self.num_classes)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of images [N, 3, H, W] in [0, 1] with labels [N]."""
        images, labels = batch  # [N, 3, H, W], [N]
        loss = F.cross_entropy(self(images).float(), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch, as in training, to the accuracies."""
        images, labels = batch
        logits = self(images).float()
        for accuracy in self.accuracies.values():
            accuracy.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies over the whole validation set."""
        for name, accuracy in self.accuracies.items():
            self.log(f"val/{name}", accuracy.compute(), prog_bar=True)
            accuracy.reset()

    def predict(self, image: Tensor) -> Tensor:
        """Return the probabilities [classes] of the classes of an image [3, H, W] in [0, 1]."""
        return self._classify(self._crop(image))

    def draw(self, image: Tensor, prediction: Tensor | None = None) -> Tensor:
        """Write the likeliest class and its probability below an image [3, H, W] in [0, 1], which is enlarged if it is small."""
        return self._caption(image, self.predict(image) if prediction is None else prediction)

    def prediction_files(self, folder: Path) -> ClassTable:
        """Return the writer of a table of classes."""
        return ClassTable(folder, self.class_names)

    def view(self, image: Tensor) -> View:
        """Return what the network sees of an image [3, H, W] in [0, 1]."""
        seen = self._crop(image)
        return View(self.model, (normalize(seen[None].to(self.device), self.mean, self.std),), seen)

    def exportable(self) -> Exportable:
        """Return the network with its normalisation, from images [N, 3, H, W] in [0, 1] to logits [N, classes]."""
        outputs = {"logits": "[N, classes], logits: a softmax over axis 1 gives probabilities"}
        network = Normalized(self.model, self.mean, self.std)
        return Exportable(network, {"images": 3}, outputs, network.facts() | {"classes": self.num_classes})

    def pictures(self, sample: tuple[Tensor, int]) -> dict[str, Tensor]:
        """Draw a validation sample -> "image", "truth" and "prediction", [3, height, width] in [0, 1], the last two with a class below.

        Small images are enlarged.
        """
        image, label = sample
        pixels = enlarge(image)
        truth = caption(pixels, self.class_names[label])
        return {"image": pixels, "truth": truth, "prediction": self._caption(image, self._classify(image))}

    def _crop(self, image: Tensor) -> Tensor:
        """Crop a photograph [3, H, W] to the part that the network is validated on."""
        return self.inference_transform(image) if self.inference_transform else image

    def _classify(self, image: Tensor) -> Tensor:
        """Return the probabilities [classes] of an image [3, H, W] as it is, on the CPU."""
        return self(image[None].to(self.device)).float().softmax(1)[0].cpu()

    def _caption(self, image: Tensor, probabilities: Tensor) -> Tensor:
        """Write the likeliest class and its probability below an enlarged image."""
        probability, label = probabilities.max(0)
        return caption(enlarge(image), f"{self.class_names[int(label)]}  {probability.item():.0%}")
