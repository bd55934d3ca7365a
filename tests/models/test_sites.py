"""conf/sites/paper.yaml lists every shape at which a network of the paper calls the operator."""

import pytest
import torch
import yaml
from carafepp.models.carafe import CARAFE
from configurations import CONF, compose_config
from hydra.utils import instantiate

SITES = yaml.safe_load((CONF / "sites" / "paper.yaml").read_text())


class Levels(torch.nn.Module):
    """A feature pyramid of a list of levels."""

    def __init__(self, fpn: torch.nn.Module) -> None:
        super().__init__()
        self.fpn = fpn

    def forward(self, levels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.fpn({str(i): level for i, level in enumerate(levels)})


def called_sites(network: torch.nn.Module, *inputs: torch.Tensor) -> set[tuple[int, ...]]:
    """Call a network and return (channels, height, width, up, down) of the input of every CARAFE++ module."""
    found = set()

    def note(module: CARAFE, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        found.add((*inputs[0].shape[1:], module.spec.up, module.spec.down))

    hooks = [module.register_forward_hook(note) for module in network.modules() if isinstance(module, CARAFE)]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("prefixes", "row", "size"),
    [
        (["resnet_224_"], "table2/resnet50_carafe", (224, 224)),
        (["resnet_800_", "fpn_"], "table5/fpn_backbone", (800, 1344)),
        (["upernet_"], "table9/ppm_fpn_fuse_backbone", (480, 608)),
        (["inpainting_"], "table10/global_local_carafe", (256, 256)),
    ],
)
def test_sites_are_those_of_the_network(prefixes, row, size):
    config = compose_config("train", f"experiment={row.split('/')[0]}", f"row={row}", "data.root=FOLDER")
    with torch.device("meta"):
        network = instantiate(config.task).model.eval()
        # the rest of a detector depends on values
        network = torch.nn.Sequential(network.backbone.body, Levels(network.backbone.fpn)) if row.startswith("table5") else network
        inputs = [torch.rand(1, 3, *size), *([torch.rand(1, 1, *size)] if row.startswith("table10") else [])]
        called = called_sites(network, *inputs)
    listed = {
        (site["channels"], site["height"], site["width"], site.get("up", 1), site.get("down", 1))
        for name, site in SITES.items()
        if name.startswith(tuple(prefixes))
    }
    assert listed == called
