"""Every sampler of every configuration file, and every option: exact, at any size, in every mode that a user trains or ships in."""

import pytest
import torch
from carafepp.models.affinity_pooling import A2UPool
from carafepp.models.antialiased import FLCPool, MaxBlurPool
from carafepp.models.attenders import LocalAttender
from carafepp.models.dlu import DLU
from carafepp.models.freq_fusion import FreqFusion
from carafepp.models.guided_samplers import FADE, GUM, SAPA
from carafepp.models.jbu import JBU
from carafepp.models.learned_samplers import BilinearConv, Deconv, NearestConv, PixelShuffle, SpatialAttention
from carafepp.models.local_attention import LDAAQU
from carafepp.models.point_samplers import DySample
from carafepp.models.pooling import DPP, LIP, BlurPool, IndexPool, PairedLIP, SoftPool
from carafepp.models.resfu import ReSFU
from carafepp.models.resnet import ResNet
from carafepp.models.space_to_depth import HWD, SPDConv
from carafepp.models.upernet import UperNet
from configurations import CONF
from guided_upsampler_definitions import local_attender
from hydra.utils import instantiate
from networks import count_parameters
from omegaconf import OmegaConf
from sampler_cases import CASES
from torch.utils._pytree import tree_leaves

CHANNELS = 8
every_sampler = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}-{case.id}")


def build(case, **options):
    """A sampler whose parameters are all far from their initialisation, so that none is without effect."""
    torch.manual_seed(0)
    module = case.slot(CHANNELS, **options)
    for parameter in module.parameters():
        # sums of hundreds of terms would saturate every sigmoid
        scale = min(1, 100 / parameter.shape[1:].numel())
        # scalars are temperatures and widths
        torch.nn.init.normal_(parameter, mean=0.2 * scale if parameter.dim() else 1, std=0.4 * scale if parameter.dim() else 0.1)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout2d):
            layer.eval()
    return module


def inputs(case, height=5, width=3, odd=(0, 0), channels=CHANNELS):
    """x, and for a guided sampler the finer map, `odd` rows and columns short of twice the size."""
    torch.manual_seed(1)
    x = torch.randn(2, CHANNELS, height, width)
    return (x, torch.randn(2, channels, 2 * height - odd[0], 2 * width - odd[1])) if case.guided else (x,)


def test_every_configuration_file_is_among_the_cases():
    files = {(path.parent.name, path.stem) for path in CONF.glob("*sampler/*.yaml")}
    assert {file for file in files if file[1] not in ("published", "shared")} == {(case.group, case.name) for case in CASES}


@pytest.mark.parametrize("group", ["upsampler", "downsampler"])
def test_published_is_an_empty_slot(group):
    assert instantiate(OmegaConf.load(CONF / group / "published.yaml")) is None


@every_sampler
@torch.no_grad()
def test_definition(case):
    module = build(case).double()
    arguments = [tensor.double() for tensor in inputs(case, odd=(1, 0))]
    torch.testing.assert_close(module(*arguments), case.definition(module, *arguments))


@every_sampler
@pytest.mark.parametrize("size", [(1, 2), (2, 1), (4, 7), (9, 6)], ids=str)
@torch.no_grad()
def test_output_size(case, size):
    assert build(case)(*inputs(case, *size)).shape == (2, CHANNELS, *case.size(*size))


@every_sampler
def test_training_reaches_every_parameter(case):
    module = build(case)
    arguments = [tensor.requires_grad_() for tensor in inputs(case)]
    y = module(*arguments)
    (y * torch.randn_like(y)).sum().backward()
    for name, tensor in [*module.named_parameters(), *((f"input {i}", tensor) for i, tensor in enumerate(arguments))]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


# PyTorch's instance normalisation takes no empty batch; LIP is a layer of backbones, whose batch is that of the images
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "lip"], ids=lambda case: f"{case.group}-{case.id}")
def test_an_empty_batch_has_gradients(case):
    """A mask head gets no region of an image without objects."""
    module, arguments = build(case), [tensor[:0].requires_grad_() for tensor in inputs(case)]
    y = module(*arguments)
    assert y.shape == (0, CHANNELS, *case.size(*arguments[0].shape[2:]))
    y.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in arguments)


@every_sampler
def test_bfloat16_autocast(case):
    module = build(case)
    arguments = inputs(case)
    expected = module(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(*arguments)
    assert y.dtype in (torch.bfloat16, torch.float32)
    # bfloat16 has 8 bits, and sums here have up to 72 terms of order 1; offsets move by as much
    assert (y.float() - expected).abs().mean() < 0.05 * (1 + expected.abs().mean())
    if y.requires_grad:
        y.float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@every_sampler
@torch.no_grad()
def test_bfloat16_module_keeps_its_dtype(case):
    module = build(case).bfloat16()
    y = module(*(tensor.bfloat16() for tensor in inputs(case)))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@every_sampler
@torch.no_grad()
def test_channels_last(case):
    module = build(case).double()
    arguments = [tensor.double() for tensor in inputs(case)]
    expected = module(*arguments)
    module = module.to(memory_format=torch.channels_last)
    y = module(*(tensor.contiguous(memory_format=torch.channels_last) for tensor in arguments))
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)


@every_sampler
def test_compiles_in_one_graph(case):
    torch.compiler.reset()
    module = build(case)
    arguments = inputs(case, odd=(0, 1))
    expected = module(*arguments)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(y, expected)
    if y.requires_grad:
        y.sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


@every_sampler
@torch.no_grad()
def test_exports_for_any_batch_and_size(case):
    module = build(case).eval()
    arguments = inputs(case, 6, 5)
    any_size = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    exported = torch.export.export(module, arguments, dynamic_shapes=[any_size] * len(arguments)).module()
    for size in ((6, 5), (9, 8)):
        arguments = [tensor[:1].repeat(3, 1, 1, 1) for tensor in inputs(case, *size)]
        torch.testing.assert_close(exported(*arguments), module(*arguments))


guided_samplers = pytest.mark.parametrize("case", [case for case in CASES if case.guided], ids=lambda case: case.id)


@guided_samplers
@torch.no_grad()
def test_guide_of_other_channels(case):
    module = build(case, guide_channels=12).double()
    arguments = [tensor.double() for tensor in inputs(case, odd=(1, 1), channels=12)]
    torch.testing.assert_close(module(*arguments), case.definition(module, *arguments))


@guided_samplers
@torch.no_grad()
def test_guide_is_the_upsampled_input_where_there_is_none(case):
    module = build(case)
    x, _ = inputs(case)
    upsampled = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(module(x), module(x, upsampled))


@guided_samplers
@pytest.mark.parametrize("odd", [(-1, 0), (0, -1), (-1, -1), (-1, 1)], ids=str)
@torch.no_grad()
def test_guide_longer_than_twice_the_input(case, odd):
    module = build(case).double()
    arguments = [tensor.double() for tensor in inputs(case, 4, 3, odd)]
    y = module(*arguments)
    assert y.shape == arguments[1].shape
    torch.testing.assert_close(y, case.definition(module, *arguments))


@guided_samplers
@pytest.mark.parametrize("shape", [(2, CHANNELS, 8, 6), (2, CHANNELS, 10, 8), (2, CHANNELS, 12, 6), (2, CHANNELS + 1, 10, 6)], ids=str)
def test_guide_that_does_not_fit_is_named(case, shape):
    with pytest.raises(ValueError, match=r"guide must have 8 channels.*got \(2"):
        case.slot(CHANNELS)(torch.randn(2, CHANNELS, 5, 3), torch.randn(shape))


@guided_samplers
def test_upernet_passes_the_guides(case):
    slot = case.slot
    net = UperNet(ResNet((1, 1, 1, 1), width=8), 3, ppm=slot, fpn=slot, fuse=slot, fpn_dim=8, ppm_dim=8)
    seen = []
    for sampler in (*net.ppm_up, *net.fpn_up, *net.fuse_up):
        sampler.register_forward_hook(lambda _, arguments, y: seen.append((arguments[1].shape, tree_leaves(y)[0].shape)))
    net(torch.randn(2, 3, 71, 97)).sum().backward()
    assert len(seen) == 10
    assert all(guide[2:] == y[2:] for guide, y in seen)
    assert [guide[1] for guide, _ in seen] == [256] * 4 + [8] * 6
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("sampler", "parameters"),
    [
        (NearestConv(256), 590_080),
        (BilinearConv(256), 590_080),
        (Deconv(256), 590_080),
        (PixelShuffle(256), 2_360_320),
        (SpatialAttention(256), 2_305),
        (GUM(256), 131_842),
        (DySample(256), 8_224),
        (DLU(256), 35_489),
        (LDAAQU(256), 39_410),
        (FADE(256), 47_514),
        (FreqFusion(256, resample=False), 52_514),
        (FreqFusion(256), 104_690),
        (ReSFU(256), 47_570),
        (JBU(256), 26_726),
        (JBU(384, 3), 6_233),
        (LocalAttender(256), 5 * 257),
        (LocalAttender(256, 64, neighbours=25), 25 * 65),
        (BlurPool(256), 0),
        (MaxBlurPool(256), 0),
        (FLCPool(256), 0),
        (SPDConv(256), 36 * 256**2 + 256),
        (SPDConv(256, kernel_size=1), 4 * 256**2 + 256),
        (IndexPool(256), 64 * 256**2),
        (A2UPool(256), 42 * 256 + 38),
        (HWD(256), 4 * 256**2 + 3 * 256),
        (DPP(256), 512),
        (DPP(256, guide="full"), 11 * 256),
        (LIP(256), 9 * 256**2 + 512),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else str(value),
)
def test_parameters_are_the_published_ones(sampler, parameters):
    assert count_parameters(sampler) == parameters


def test_initial_states():
    """The initial state of each sampler, before it learns anything."""
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(LIP(8)(x), torch.nn.AvgPool2d(3, 2, 1, count_include_pad=False)(x))
    upsampled = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(DySample(8)(x), upsampled, atol=0.02, rtol=0)
    torch.testing.assert_close(GUM(8)(x, torch.randn(1, 8, 12, 12)), upsampled, atol=0.05, rtol=0)
    assert SAPA(8).query.bias.abs().max() == 0
    # no offset: the four targets of a source pixel share its kernel, close to a box blur
    box = torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2)
    torch.testing.assert_close(DLU(8)(x), torch.nn.functional.interpolate(box, scale_factor=2), atol=0.02, rtol=0)


def test_flc_pool_keeps_waves_of_low_frequency_and_drops_the_others():
    """A wave of 3 periods in 16 pixels stays what it is at 8 pixels; one of 5 would become an alias of 3 and is dropped."""
    angles = 2 * torch.pi * torch.arange(16) / 16
    low, high = (2 + (k * angles).cos()[:, None] * torch.ones(16) for k in (3, 5))
    y = FLCPool(2)(torch.stack([low, high])[None])
    torch.testing.assert_close(y[0, 0], low[::2, ::2])
    torch.testing.assert_close(y[0, 1], torch.full((8, 8), 2.0))


@torch.no_grad()
def test_sapa_is_the_same_on_a_device_without_kernels(monkeypatch):
    torch.manual_seed(0)
    sapa, x, guide = SAPA(8).double(), torch.randn(2, 8, 5, 4).double(), torch.randn(2, 8, 9, 8).double()
    expected = sapa(x, guide)
    monkeypatch.setattr("carafepp.models.guides.default_backend", lambda *_: "reference")
    torch.testing.assert_close(sapa(x, guide), expected)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("neighbours", [9, 13, 17, 25])
@torch.no_grad()
def test_every_neighbourhood_of_the_local_attender(neighbours, residual):
    torch.manual_seed(0)
    module = LocalAttender(8, 30, neighbours=neighbours, residual=residual).double()
    x, guide = torch.randn(2, 8, 3, 2).double(), torch.randn(2, 30, 6, 3).double()
    torch.testing.assert_close(module(x, guide), local_attender(module, x, guide))


def test_paired_lip_pools_both_paths_by_importances_of_the_blocks_input():
    torch.manual_seed(0)
    pair = PairedLIP(8, 4, bottleneck=6)
    x, y = torch.randn(2, 8, 7, 6), torch.randn(2, 4, 7, 6)
    average = torch.nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    for pooled, given in zip(pair(x, y), (x, y), strict=True):
        torch.testing.assert_close(pooled, average(given))
    for logits in (pair.main_logits, pair.shortcut_logits):
        torch.nn.init.normal_(logits[0].weight)
    alone = LIP(8, bottleneck=6)
    alone.logits = torch.nn.Sequential(*pair.shared, *pair.shortcut_logits)
    torch.testing.assert_close(pair(x, y)[0], alone(x))
    # Gao et al., equation 6, at a pixel in the middle: rows 3 to 5, columns 1 to 3
    importance = (12 * pair.main_logits(pair.shared(x))).exp()[..., 3:6, 1:4]
    expected = (importance * y[..., 3:6, 1:4]).sum((2, 3)) / importance.sum((2, 3))
    torch.testing.assert_close(pair(x, y)[1][..., 2, 1], expected)


def test_soft_pool_and_lip_do_not_overflow():
    huge = torch.full((1, 2, 4, 4), 1e4)
    torch.testing.assert_close(SoftPool(2)(huge), torch.full((1, 2, 2, 2), 1e4))
    lip = LIP(2).half()
    torch.nn.init.constant_(lip.logits[1].bias, 20.0)
    assert lip(torch.ones(1, 2, 4, 4, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DPP(8, guide="medium"), 'guide must be "lite" or "full", got \'medium\''),
        (lambda: DySample(8, style="xx"), 'style must be "lp" or "pl", got \'xx\''),
        (lambda: DySample(6), "groups=4 for channels=6"),
        (lambda: LDAAQU(12), r"channels must be divisible by reduction \* groups = 8, got 12"),
        (lambda: DySample(6, style="pl", groups=2), "divisible by 4"),
        (lambda: FreqFusion(6), "groups=4 for channels=6"),
        (lambda: FreqFusion(8, compressed_channels=12), "compressed_channels must be a multiple of 8, got 12"),
        (lambda: ReSFU(8, embedding=12), "embedding must be a multiple of 8, got 12"),
        (lambda: LocalAttender(8, neighbours=7), "neighbours must be one of 5, 9, 13, 17, 25, got 7"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else None,
)
def test_wrong_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
