"""The discriminator of image inpainting."""

import pytest
import torch
from carafepp.models.discriminator import PatchGAN, average_over_hole


def test_discriminator_judges_patches_of_the_hole_alone():
    torch.manual_seed(0)
    masks = torch.zeros(3, 1, 64, 64)
    masks[0, :, 30, 40] = 1
    masks[1] = 1
    scores = PatchGAN(4)(torch.rand(3, 3, 64, 64), masks)
    assert scores.shape[:2] == (3, 1)
    one, whole, none = average_over_hole(scores, masks)
    assert one.item() in [pytest.approx(score) for score in scores[0].flatten().tolist()]
    torch.testing.assert_close(whole, scores[1].mean())
    assert none == 0
