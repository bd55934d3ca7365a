"""Constructors of other implementations, and what CARAFE says to those who try their arguments."""

import inspect

import pytest
import torch
import torch.nn as nn
from carafe_ports import BlockPort, ProjectedPort
from carafepp.integrations.signatures import CARAFEPack, ProjectedCARAFE, YoloCARAFE
from carafepp.models.samplers import resize

from carafepp import CARAFE, reassemble

X = torch.randn(2, 8, 5, 4)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (CARAFEPack(8, 2), dict(up=2)),
        (CARAFEPack(8, 3, 3, 2, 1, 2, 4), dict(up=3, kernel_size=3, groups=2, encoder_kernel=1, encoder_dilation=2, compressed_channels=4)),
        (CARAFEPack(channels=8, scale_factor=1, up_group=4, compressed_channels=16), dict(groups=4, compressed_channels=16)),
    ],
)
def test_arguments_of_mmcv(theirs, ours):
    ours = CARAFE(8, **ours)
    ours.load_state_dict(theirs.state_dict())
    assert theirs.spec == ours.spec
    assert torch.equal(theirs(X), ours(X))


@pytest.mark.parametrize(
    ("module", "channels", "scale"),
    [
        (YoloCARAFE(8), 8, 2),
        (YoloCARAFE(8, 8, 1, 3, 4, 3), 8, 3),
        (YoloCARAFE(8, 6), 6, 2),
        (YoloCARAFE(c1=8, c2=6, k_enc=3, k_up=5, c_mid=4, scale=2), 6, 2),
        (ProjectedCARAFE(8, 8), 8, 2),
        (ProjectedCARAFE(8, 6, 5, 3), 6, 3),
    ],
)
def test_arguments_of_ports(module, channels, scale):
    y = module(X)
    assert y.shape == (2, channels, 5 * scale, 4 * scale)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    odd = module(X, size=(5 * scale - 1, 4 * scale))
    torch.testing.assert_close(odd, module(X)[:, :, :-1])
    assert module.kernels(X).shape == (2, 1, *(module.spec.kernel_size,) * 2, 5 * scale, 4 * scale)


def test_other_output_channels_take_a_convolution():
    assert isinstance(YoloCARAFE(8, 8).out, nn.Identity)
    assert isinstance(YoloCARAFE(8).out, nn.Identity)
    module = YoloCARAFE(8, 6).eval()
    expected = module.out(reassemble(X, module.logits(X), kernel_size=5, up=2))
    torch.testing.assert_close(module(X), expected)
    assert module.out.weight.shape == (6, 8, 1, 1)
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(X), expected)


def test_parameters_are_those_of_the_ports():
    def count(module: nn.Module) -> int:
        return sum(tensor.numel() for tensor in module.parameters())

    # the convolutions of the port have no biases before their norms
    assert count(YoloCARAFE(8)) == count(BlockPort(8)) + 64 + 100
    assert count(ProjectedCARAFE(16, 6)) == count(ProjectedPort(16, 6))


def test_adapters_fill_the_slots_of_networks():
    fine = torch.zeros(2, 8, 9, 8)
    assert resize(X, fine.shape[2:], YoloCARAFE(8), fine, slot="test").shape == fine.shape


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((256,), dict(up=0.5), r"up must be an int, got 0\.5 of type float; write down=2$"),
        ((256,), dict(up=1.5), r"got 1\.5 of type float; write up=3, down=2$"),
        ((256,), dict(up=1 / 3), r"; write down=3$"),
        ((256,), dict(up=2.0), r"; write up=2$"),
        ((256,), dict(down=0.5), r"down must be an int, got 0\.5 of type float; write up=2$"),
        ((256,), dict(up=float("nan")), r"up must be an int, got nan of type float$"),
        ((256,), dict(kernel_size=5.0), r"kernel_size must be an int, got 5\.0 of type float$"),
        ((256, 2), {}, r"takes only channels by position, got 256, 2; write CARAFE\(256, up=2\)\. "),
        ((256, 0.5), {}, r"write CARAFE\(256, down=2\)\. "),
        ((256, 128), dict(up=2), r"got 256, 128; write CARAFE\(256, up=.*\)\. carafepp\.integrations\.signatures has"),
        ((256, 2, 5), {}, r"got 256, 2, 5; write CARAFE\(256, up=\.\.\., down=\.\.\., kernel_size=\.\.\.\)\. "),
        ((256,), dict(scale_factor=2), r"CARAFE has no argument scale_factor; write up=2$"),
        ((256,), dict(scale_factor=0.5), r"no argument scale_factor; write down=2$"),
        ((256,), dict(scale=4), r"no argument scale; write up=4$"),
        ((256,), dict(scale_factor=None), r"no argument scale_factor; write up=\.\.\.$"),
        ((256,), dict(up_kernel=5), r"no argument up_kernel; write kernel_size=5$"),
        ((256,), dict(up_group=2), r"no argument up_group; write groups=2$"),
        ((256,), dict(k_enc=3), r"no argument k_enc; write encoder_kernel=3$"),
        ((256,), dict(c_mid=64), r"no argument c_mid; write compressed_channels=64$"),
        ((), dict(in_channels=256), r"no argument in_channels; write channels=256$"),
        ((256,), dict(mode="nearest"), r"no argument mode; it has channels, up, down, kernel_size, .*, normalizer, border$"),
        ((), dict(up=2), r"missing 1 required positional argument: 'channels'"),
    ],
)
def test_carafe_says_what_to_write_instead(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        CARAFE(*arguments, **options)


def test_operator_says_what_to_write_for_a_fraction():
    with pytest.raises(TypeError, match=r"up must be an int, got 0\.5 of type float; write down=2$"):
        reassemble(X, X, kernel_size=1, up=0.5)


def test_signature_of_carafe_is_its_arguments():
    assert list(inspect.signature(CARAFE).parameters)[:3] == ["channels", "up", "down"]
    assert list(inspect.signature(CARAFEPack).parameters)[:2] == ["channels", "scale_factor"]
