"""Put CARAFE++ into a segmentation network of torchvision, train it, write it as ONNX, and draw where its predictions come from."""

from functools import partial
from pathlib import Path

import lightning as L
import onnxruntime
import torch
from carafepp.models.regions import trace_regions
from carafepp.tasks.data import Data
from carafepp.tasks.pictures import enlarge
from carafepp.tasks.scenes import Scenes
from carafepp.tasks.segmentation import Segmentation
from carafepp.tasks.sheets import arrange
from torch import Tensor, nn
from torchvision.models import feature_extraction, resnet, segmentation
from torchvision.utils import save_image

import carafepp

SIDE, BATCH = 64, 16
PATH = ["*.maxpool", "*.conv1.sampler", "*.classifier.interpolate_0.*", "*.interpolate_0.*"]


class Network(nn.Module):
    """LR-ASPP on a ResNet, with CARAFE++ in the place of its own samplers: images [N, 3, H, W] -> logits [N, num_classes, H, W]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        backbone = feature_extraction.create_feature_extractor(resnet.ResNet(resnet.BasicBlock, 4 * [1]), dict(layer1="low", layer2="high"))
        self.lraspp = segmentation.LRASPP(backbone, low_channels=64, high_channels=128, num_classes=num_classes, inter_channels=64)
        image = torch.rand(1, 3, SIDE, SIDE)
        print(carafepp.replace(self.lraspp, up="carafe", down="carafe", example=image))
        # "carafe" enlarges by 2, and the logits are enlarged by 4
        print(carafepp.replace(self.lraspp, up=partial(carafepp.CARAFE, up=4, compressed_channels=32), example=image))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, which torchvision wraps in a dictionary."""
        return self.lraspp(images)["out"]


class Digits(Scenes):
    """Scenes with two classes: background, and digits."""

    num_classes = 2

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        image, labels = super().__getitem__(key)
        return image, labels.clamp(max=1)


def draw(task: Segmentation, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Draw image, truth, prediction and, in orange, what all samplers of PATH reassemble a blue dot from: the root of the weights."""
    y, x = labels.nonzero()[int(labels.sum()) // 2].tolist()
    weights = trace_regions(task.model, task.view(image).inputs, PATH, [(y / SIDE, x / SIDE)])[0].weights  # [1, SIDE / 2, SIDE / 2]
    orange, blue = torch.tensor([[0.9, 0.3, 0.0], [0.3, 0.8, 1.0]])[..., None, None]
    sources = torch.lerp(image.mean(0), orange, enlarge(weights / weights.max(), 2).sqrt())
    sources[:, y - 1 : y + 2, x - 1 : x + 2] = blue
    return task.pictures((image, labels)) | {"sources of the blue dot": sources}


def main(steps: int, folder: Path) -> None:
    """Train for `steps` batches, and write network.onnx and figure.png to `folder`."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    optimizer, schedule = partial(torch.optim.AdamW, lr=3e-3), partial(torch.optim.lr_scheduler.PolynomialLR, power=0.9)
    task = Segmentation(Network, class_names=["background", "digit"], optimizer=optimizer, schedule=schedule)
    data = Data(Digits("train", BATCH * steps, SIDE), Digits("val", 200, SIDE), batch_size=BATCH, epochs=1, val_batch_size=20)
    L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, num_sanity_val_steps=0).fit(task, datamodule=data)
    network, images = task.cpu().exportable().network.eval(), torch.stack([data.val[index][0] for index in range(4)])
    file = folder / "network.onnx"
    torch.onnx.export(network, (images,), file, dynamo=True, external_data=False, dynamic_shapes=({0: "batch"},))
    (logits,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), network(images), rtol=1e-3, atol=1e-3)
    rows = [draw(task, *data.val[index]) for index in (3, 6, 8)]
    save_image(arrange([[*row.values()] for row in rows], columns=[*rows[0]]), folder / "figure.png")


if __name__ == "__main__":
    main(steps=400, folder=Path("runs/example"))
