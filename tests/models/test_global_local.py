"""Generators of image inpainting: the published layers, samplers instead of strides, any size, any mask."""

from functools import partial

import pytest
import torch
import torch.nn as nn
from carafepp.models.carafe import CARAFE
from carafepp.models.global_local import GlobalLocal
from carafepp.models.partial_conv import PartialGlobalLocal
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import random_mask

DOWN, UP = partial(CARAFE, down=2), partial(CARAFE, up=2)

GENERATORS = [
    pytest.param(generator, slots, id=f"{generator.__name__}-{'carafe' if slots else 'published'}")
    for generator in (GlobalLocal, PartialGlobalLocal)
    for slots in ({}, {"downsample": DOWN, "upsample": UP})
]


def test_generator_has_the_published_layers():
    model = GlobalLocal()
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert [m.out_channels for m in convolutions] == [64, 128, 128, *[256] * 3, *[256] * 4, 256, 256, 128, 128, 64, 32, 3]
    assert [m.stride[0] for m in convolutions] == [1, 2, 1, 2, *[1] * 8, 2, 1, 2, 1, 1]
    assert [m.dilation[0] for m in convolutions if m.dilation[0] > 1] == [2, 4, 8, 16]
    assert [m.kernel_size[0] for m in convolutions] == [5, *[3] * 11, 4, 3, 4, 3, 3]
    assert convolutions[0].in_channels == 4


@pytest.mark.parametrize("generator", [GlobalLocal, PartialGlobalLocal])
def test_generator_names_images_and_masks_of_another_shape(generator):
    model = generator(8).eval()
    images, masks = torch.rand(3, 3, 16, 16), torch.zeros(3, 1, 16, 16)
    with pytest.raises(ValueError, match=r"images must have the shape \[N, 3, H, W\], got \(3, 1, 16, 16\)"):
        model(masks, masks)
    # both would broadcast to the images
    for wrong in (masks[:, 0], images):
        with pytest.raises(ValueError, match=r"masks must have the shape \[N, 1, H, W\]"):
            model(images, wrong)


def test_carafe_takes_the_place_of_every_stride():
    for generator in (GlobalLocal, PartialGlobalLocal):
        model = generator(8, downsample=DOWN, upsample=UP)
        carafes = [m for m in model.modules() if isinstance(m, CARAFE)]
        assert [(m.spec.up, m.spec.down) for m in carafes] == [(1, 2), (1, 2), (2, 1), (2, 1)]
        encoders = {id(m.content_encoder) for m in carafes}
        others = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and id(m) not in encoders]
        assert {m.stride for m in others} == {(1, 1)}
        assert not any(isinstance(m, nn.ConvTranspose2d) for m in others)


@pytest.mark.parametrize(("generator", "slots"), GENERATORS)
@given(size=st.tuples(st.integers(1, 37), st.integers(1, 37)))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_size_is_kept_and_the_range_too(generator, slots, size):
    torch.manual_seed(0)
    model = generator(4, **slots).eval()
    with torch.no_grad():
        model.output.bias.fill_(3)
        y = model(torch.rand(2, 3, *size), random_mask(*size).float().expand(2, -1, -1, -1))
    assert y.shape == (2, 3, *size)
    assert y.abs().max() <= 1


@pytest.mark.parametrize(("generator", "slots"), GENERATORS)
def test_content_of_the_hole_makes_no_difference(generator, slots):
    torch.manual_seed(0)
    model = generator(8, **slots).eval()
    images, masks = torch.rand(1, 3, 20, 24) * 2 - 1, random_mask(20, 24).float()
    other = torch.where(masks > 0, torch.rand(1, 3, 20, 24), images)
    with torch.no_grad():
        assert torch.equal(model(images, masks), model(other, masks))
        assert not torch.equal(model(images, masks), model(-images, masks))


@pytest.mark.parametrize(("generator", "slots"), GENERATORS)
@pytest.mark.parametrize("value", [0.0, 1.0], ids=["valid", "masked"])
def test_fully_masked_and_fully_valid_images_train(generator, slots, value):
    torch.manual_seed(0)
    model = generator(8, **slots)
    y = model(torch.rand(2, 3, 16, 16), torch.full((2, 1, 16, 16), value))
    y.square().mean().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("generator", "slots"), GENERATORS)
def test_mixed_precision_computes_nearly_the_same(generator, slots):
    torch.manual_seed(0)
    model = generator(8, **slots).eval()
    images, masks = torch.rand(1, 3, 24, 24), random_mask(24, 24, share=0.3).float()
    with torch.no_grad():
        plain = model(images, masks)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images, masks)
    torch.testing.assert_close(mixed.float(), plain, rtol=0, atol=0.02 + 0.05 * plain.abs().max().item())
