"""Attention of a fine map to windows of a coarse one, against a definition that gathers the window of every target."""

import pytest
import torch
from carafepp.models.window_attention import AnyUpAttention, attend_windows
from torch import Tensor
from torch.nn import functional as F

# up, K, heads, queries, values: odd sides, windows as large as the map, ratios of patches, targets that are shorter than a multiple
SIZES = [
    (1, 3, 1, (5, 4), (5, 4)),
    (2, 3, 2, (10, 14), (5, 7)),
    (3, 5, 1, (15, 16), (5, 6)),
    (4, 3, 2, (9, 12), (3, 3)),
    (14, 3, 4, (42, 70), (3, 5)),
    (16, 5, 2, (96, 70), (6, 5)),
]


def gather_windows(x: Tensor, size: tuple[int, int], up: int, side: int) -> Tensor:
    """Copy the window of every target: x [N, C, H, W] to [N, C, h, w, K * K]; windows move inside at the border."""
    starts = [(torch.arange(fine) // up - side // 2).clamp(0, coarse - side) for fine, coarse in zip(size, x.shape[2:], strict=True)]
    rows, columns = (start[:, None] + torch.arange(side) for start in starts)
    return x[:, :, rows[:, None, :, None], columns[None, :, None, :]].flatten(4)


def attend_by_hand(queries: Tensor, keys: Tensor, values: Tensor, up: int, side: int, heads: int, average: bool) -> Tensor:
    size = tuple(queries.shape[2:])
    windows = gather_windows(keys, size, up, side).unflatten(1, (heads, -1))
    scores = (queries.unflatten(1, (heads, -1))[..., None] * windows).sum(dim=2) / (queries.shape[1] // heads) ** 0.5
    weights = scores.softmax(dim=-1)  # [N, heads, h, w, K * K]
    if average:
        weights, heads = weights.mean(dim=1, keepdim=True), 1
    return (gather_windows(values, size, up, side).unflatten(1, (heads, -1)) * weights[:, :, None]).sum(dim=-1).flatten(1, 2)


def make_inputs(fine: tuple[int, int], coarse: tuple[int, int], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 8, *fine), (2, 8, *coarse), (2, 12, *coarse)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("average", [False, True], ids=["NAF", "AnyUp"])
@pytest.mark.parametrize(("up", "side", "heads", "fine", "coarse"), SIZES)
def test_result_and_gradients_are_those_of_the_definition(up, side, heads, fine, coarse, average):
    inputs = make_inputs(fine, coarse)
    y = attend_windows(*inputs, up=up, kernel_size=side, heads=heads, average_heads=average)
    expected = attend_by_hand(*inputs, up, side, heads, average)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_attention_of_second_order():
    inputs = [x.detach()[:1, :2].clone().requires_grad_() for x in make_inputs((5, 6), (3, 3))]
    assert torch.autograd.gradgradcheck(lambda *x: attend_windows(*x, up=2, kernel_size=3, heads=2), inputs, fast_mode=True)


def test_a_device_without_kernels_takes_the_definition(monkeypatch):
    monkeypatch.setattr("carafepp.models.guides.default_backend", lambda *_: "reference")
    inputs = make_inputs((9, 10), (5, 5))
    y = attend_windows(*inputs, up=2, kernel_size=3, heads=2)
    torch.testing.assert_close(y, attend_by_hand(*inputs, 2, 3, 2, False))
    torch.autograd.grad(y.sum(), inputs)


def test_maps_in_channels_last_keep_it_and_half_precision_is_close():
    inputs = [x.detach().to(torch.float32, memory_format=torch.channels_last) for x in make_inputs((12, 12), (3, 3))]
    y = attend_windows(*inputs, up=4, kernel_size=3, heads=2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    half = attend_windows(*[x.bfloat16() for x in inputs], up=4, kernel_size=3, heads=2)
    torch.testing.assert_close(half.float(), y, rtol=0, atol=0.05)


def test_the_block_of_anyup_is_that_of_its_definition():
    torch.manual_seed(0)
    block = AnyUpAttention(8, up=2, kernel_size=3, heads=2).double()
    queries, keys, values = make_inputs((7, 8), (4, 4))
    state = block.state_dict()

    def project(x: Tensor, name: str) -> Tensor:
        x = x / (x.square().mean(dim=1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * state[f"norm_{name}.weight"][:, None, None]
        return F.conv2d(x, state[f"cross_attn.{name}_proj.weight"], state[f"cross_attn.{name}_proj.bias"])

    fine = project(F.conv2d(queries, state["conv2d.weight"], padding=1), "q")
    torch.testing.assert_close(block(queries, keys, values), attend_by_hand(fine, project(keys, "k"), values, 2, 3, 2, True))
    assert sum(parameter.numel() for parameter in AnyUpAttention(up=14, kernel_size=3).parameters()) == 180_736


def test_the_block_compiles_without_a_break_and_trains_in_autocast():
    block = AnyUpAttention(8, up=2, kernel_size=3, heads=2)
    inputs = make_inputs((7, 8), (4, 4), dtype=torch.float32)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), block(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(*inputs)
    torch.testing.assert_close(y.float(), block(*inputs), rtol=0, atol=0.05)
    y.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in block.parameters())


def test_an_exported_block_takes_other_sizes():
    block = AnyUpAttention(8, up=2, kernel_size=3, heads=2)
    h, w = (torch.export.Dim(name, min=3, max=64) for name in "hw")
    queries, keys, values = (x.detach() for x in make_inputs((8, 10), (4, 5), dtype=torch.float32))
    coarse = {2: h, 3: w}
    program = torch.export.export(block, (queries, keys, values), dynamic_shapes=({2: 2 * h, 3: 2 * w}, coarse, coarse))
    other = [x.detach() for x in make_inputs((14, 12), (7, 6), dtype=torch.float32)]
    torch.testing.assert_close(program.module()(*other), block(*other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": (2, 8, 11, 10)}, "queries must have 2 times the size of the keys"),
        ({"queries": (2, 8, 8, 10)}, "queries must have 2 times"),
        ({"keys": (2, 6, 5, 5)}, "keys must have"),
        ({"keys": (2, 8, 4, 5)}, "keys must have the size of the values"),
        ({"values": (12, 5, 5)}, r"values must be \[N, C, H, W\]"),
        ({"heads": 3}, "heads must divide the channels"),
        ({"heads": 0}, "heads must divide"),
        ({"up": 2.0}, "up must be an int"),
        ({"kernel_size": 7}, "7"),
        ({"kernel_size": 2}, "odd"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    arguments = {"queries": (2, 8, 10, 10), "keys": (2, 8, 5, 5), "values": (2, 12, 5, 5), "up": 2, "kernel_size": 3, "heads": 2} | change
    tensors = {name: torch.rand(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        attend_windows(**tensors)
