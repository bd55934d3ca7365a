"""The contract of a task: the interface through which the commands use a network, its training, its scores and its pictures."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric
from torchvision.transforms.v2.functional import pil_to_tensor

from .data import get_data
from .exportable import Exportable
from .image_files import ImageFiles
from .images import read_image
from .optimization import group_parameters
from .prediction_files import PredictionFiles

# Parameter groups -> optimizer.
MakeOptimizer = Callable[[list[dict]], Optimizer]

# (optimizer, total_iters=steps of the training) -> schedule, which is stepped after every optimizer step.
MakeSchedule = Callable[..., LRScheduler]


def register_metrics(named: Mapping[str, Metric]) -> Mapping[str, Metric]:
    """Make metrics, by name, sub-modules of the task that they are assigned to."""
    return cast(Mapping[str, Metric], nn.ModuleDict(named))


def list_class_names(class_names: Sequence[object], least: int = 1) -> list[str]:
    """Return the names of classes as strings; a command line turns digits into numbers.

    Raises:
        ValueError: there are fewer than `least` names, or the names are a single string instead of a list.
    """
    if isinstance(class_names, str) or len(class_names) < least:
        raise ValueError(f"class_names must be a list of {least} or more names, such as [cat,dog], got {class_names!r}")
    return [str(name) for name in class_names]


def check_classes(trainer: L.Trainer, option: str, count: int) -> None:
    """Check that a network has enough classes for the data sets that know the number of theirs.

    Raises:
        ValueError: a data set has more than `count` classes; the message names the option that gives their number.
    """
    for name in ("train", "val"):
        data = getattr(get_data(trainer), name)
        classes = getattr(data, "num_classes", 0)
        if classes > count:
            hint = (
                f"; if the files have no more classes than that, set +data.{name}.classes={count}" if isinstance(data, ImageFiles) else ""
            )
            raise ValueError(f"{option} must cover the {classes} classes of data.{name}, got {count}{hint}")


class View(NamedTuple):
    """A picture as input of a task's network."""

    network: nn.Module
    # arguments of the network, for this picture alone
    inputs: tuple[Tensor, ...]
    # [3, H, W] in [0, 1]
    picture: Tensor
    # fractions of the inputs' height and width that the picture covers; the rest, at the bottom and on the right, is padding
    covered: tuple[float, float] = (1.0, 1.0)


class Task(L.LightningModule, ABC):
    """A network with its training, its scores and its pictures; the commands work with any subclass.

    A subclass names its `monitor` and the monitor's `direction`, implements the abstract methods, and logs its scores as "val/NAME".
    The items of its data sets begin with an image [3, H, W] in [0, 1].

    A new task consists of a module with the subclass, its data sets, and the files conf/task/NAME.yaml and conf/setting/NAME_small.yaml.

    Args:
        model: the network.
        optimizer: maps parameter groups (see `parameter_groups`) to an optimizer.
        schedule: maps (optimizer, total_iters=steps of the training) to a schedule, which is stepped after every optimizer step; None
            keeps the learning rate constant.

    Attributes:
        monitor: the score that selects best.ckpt, such as "val/mIoU".
        direction: whether the "max" or the "min" of the monitor is best.
        takes_mask: whether `read` needs a mask for every image.
        bench_size: height and width in pixels of the image that `carafepp-bench models` measures the network on.
        flops_size: height and width in pixels of the image for which the FLOPs of a run are counted; None means the size of the first
            validation image.
        per_class: rows of the last validation, one for each class, for per_class.csv and per_class.png: the name, the scores as fractions
            (None without a score), and counts as integers. It is empty if the task has no scores of classes.
    """

    monitor: ClassVar[str]
    direction: ClassVar[Literal["max", "min"]]
    takes_mask: ClassVar[bool] = False
    bench_size: ClassVar[tuple[int, int]] = (224, 224)

    def __init__(self, model: nn.Module, *, optimizer: MakeOptimizer, schedule: MakeSchedule | None) -> None:
        super().__init__()
        self.model = model
        self.optimizer, self.schedule = optimizer, schedule
        self.flops_size: tuple[int, int] | None = None
        self.per_class: list[dict[str, Any]] = []

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a training batch."""

    @abstractmethod
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a validation batch to the scores."""

    def parameter_groups(self) -> list[dict]:
        """Return the parameter groups of the optimizer: matrices with weight decay, vectors without."""
        return group_parameters(self.model)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and, if there is one, the schedule.

        Raises:
            TypeError: one of them is not a function. A task that is not trained needs none.
        """
        for name, function in (("optimizer", self.optimizer), ("schedule", self.schedule)):
            if not callable(function) and not (name == "schedule" and function is None):
                raise TypeError(f"{name} must be a function that builds one, with _partial_: true in a configuration, got {function!r}")
        optimizer = self.optimizer(self.parameter_groups())
        if self.schedule is None:
            return optimizer
        schedule = self.schedule(optimizer, total_iters=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def full_load(self) -> AbstractContextManager[None]:
        """Return a context in which every image takes the largest possible number of operations; FLOPs are counted in this context."""
        return contextlib.nullcontext()

    def read(self, path: Path, mask_path: Path | None, max_side: int, **options: Any) -> tuple[Any, ...]:
        """Read a photograph and, if the task takes one, its mask.

        Args:
            path, mask_path: the files.
            max_side: see below.
            options: `carafepp.tasks.images.ReadOptions` and, if the task takes a mask, `invert` and `threshold` of
                `carafepp.tasks.masks.read_mask`.

        Returns:
            The arguments of `predict`, `draw`, `view` and `show`; here one image [3, H, W] in [0, 1], its longer side at most `max_side`
            pixels.

        Raises:
            FileNotFoundError, ValueError: a file is missing or cannot be used; the message names it.
        """
        image = read_image(path, **options)
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
        return (pil_to_tensor(image).float() / 255,)

    @abstractmethod
    def predict(self, *inputs: Any, **options: Any) -> Any:
        """Return the prediction for the inputs of one photograph, on the CPU."""

    @abstractmethod
    def draw(self, *inputs: Any, **options: Any) -> Tensor:
        """Draw the prediction for the inputs of one photograph -> [3, height, width] in [0, 1]."""

    def prediction_files(self, folder: Path) -> PredictionFiles | None:
        """Return what writes the predictions into a folder for other programs, or None if the task has only pictures.

        If it is not None, `draw` takes what `predict` returned as its option `prediction`, so that it is not computed again.
        """
        return None

    @abstractmethod
    def view(self, *inputs: Any, **options: Any) -> View:
        """Return the picture and the network's inputs for one photograph."""

    def show(self, *inputs: Any, **options: Any) -> Tensor:
        """Draw the inputs of one photograph without a prediction -> [3, height, width] in [0, 1]; here the image itself."""
        return inputs[0]

    def exportable(self) -> Exportable:
        """Return the network as `carafepp-export` writes it; it shares its weights with the task.

        Raises:
            ValueError: the task does not say how its network is used by itself.
        """
        raise ValueError(f"{type(self).__name__} cannot be exported: it does not implement the method exportable")

    @abstractmethod
    def pictures(self, sample: Any) -> dict[str, Tensor]:
        """Draw one validation sample -> pictures [3, H, W] in [0, 1] by name: "image", "truth", "prediction" and any others."""
