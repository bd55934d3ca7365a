"""The network of a task as other programs run it, which `carafepp-export` writes to a file."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize


class Exportable(NamedTuple):
    """A network without what only its training needs.

    Attributes:
        network: maps the inputs to one output, or to a tuple of outputs.
        inputs: the channels of each input by name; an input is [N, channels, H, W] with values in [0, 1].
        outputs: what each output is, by name, with its shape and the step that follows it.
        facts: what else a program must know to use the network, as plain values.
    """

    network: nn.Module
    inputs: dict[str, int]
    outputs: dict[str, str]
    facts: dict[str, Any]


class Normalized(nn.Module):
    """Module that normalises images before a network.

    Args:
        model: the network; its output is a tensor, or a dictionary of tensors.
        mean, std: mean and standard deviation of the images' channels, in [0, 1].
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = list(mean), list(std)

    def facts(self) -> dict[str, Any]:
        """Return what a program must know about the normalisation."""
        return {"mean": self.mean, "std": self.std, "normalization": "part of the file: give images in [0, 1], not normalised ones"}

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map images [N, 3, H, W] in [0, 1] to the output of the network; the values of a dictionary become a tuple."""
        outputs = self.model(normalize(images, self.mean, self.std))
        return tuple(outputs.values()) if isinstance(outputs, dict) else outputs
