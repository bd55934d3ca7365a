"""CARAFE in CUDA graphs, recorded by hand as docs/performance.md says, and by torch.compile."""

import re
from pathlib import Path

import pytest
import torch
from carafepp.models.carafe import CARAFE
from torch import nn


def make(**options):
    """Return a module on the GPU whose kernels are far from a box blur."""
    module = CARAFE(16, compressed_channels=6, **options)
    nn.init.normal_(module.content_encoder.weight, std=0.5)
    return module.cuda()


def draw():
    return torch.randn(2, 16, 24, 20, device="cuda").to(memory_format=torch.channels_last)


def read_graph_recipe():
    """Return the code of docs/performance.md that records a CUDA graph."""
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    (recipe,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "torch.cuda.graph" in block)
    return recipe


def test_graph_recipe_has_seven_lines():
    recipe = read_graph_recipe()
    compile(recipe, "docs/performance.md", "exec")
    assert len(recipe.splitlines()) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_graph_recipe():
    network = nn.Sequential(make(down=2, compressor_norm=True), make(up=2)).eval()
    images = draw()
    names = {"torch": torch, "network": network, "images": images}
    exec(read_graph_recipe(), names)
    for scale in (1, 2):
        names["x"].copy_(scale * images)
        names["graph"].replay()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            torch.testing.assert_close(names["y"], network(scale * images))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_compiles_into_graphs():
    torch.compiler.reset()
    module, x = make(up=2), draw()
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = module(x)
        # the first calls compile and record
        for _ in range(3):
            y = compiled(x).clone()
    assert (y - expected).norm() < 0.01 * expected.norm()
