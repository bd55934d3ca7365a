"""The search for tiles without a GPU."""

import pytest
import torch
from carafepp.kernels.geometry import Spec

pytest.importorskip("triton")

from carafepp.kernels.gpu.tile_ranking import rank_tiles
from carafepp.kernels.gpu.tile_search import count_instructions
from carafepp.kernels.gpu.training_step import build_training_step


def test_without_a_gpu_the_instructions_of_the_highest_ranked_tiles_are_counted():
    step = build_training_step(1, 64, 25, 42, Spec(3, down=2), torch.float16, torch.channels_last)
    found = dict(map(reversed, count_instructions(step, "forward", 2, 80)))
    assert set(found) == set(rank_tiles("forward", step.problem((8, 0)))[:2])
    assert min(found.values()) > 0
