"""The module with gradients, in half precision and channels_last: its forward and backward pass as launches that are planned once.

PyTorch computes what libraries do best: the gradients of the encoder's convolution, and the products with the gradient of the compressed
features. The launches of this package compute everything else. What backward needs lies in one piece of memory.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..execution import Layouts, view_cells
from .batch_norm import combine_launch, differentiate_launch, normalize_launch
from .encoder import Layers, Parameters, compress_launch, encode_launch, feature_blocks
from .launch import Launch, Plan, distinguish, on_device_of
from .memory import place
from .operator_launches import INTERPRETED, backward_launches, forward_launches
from .sums import Summed, find_tiles, finish_launch, sum_launch

# tensors, and the launches that work on them
Built = tuple[Sequence[Tensor | None], list[Launch]]


class Gradients(NamedTuple):
    """Which gradients are needed."""

    x: bool
    weight: bool  # of the compressor
    bias: bool
    scale: bool  # of the norm
    shift: bool
    encoder_weight: bool
    encoder_bias: bool

    @property
    def features(self) -> bool:
        """Whether something before the encoder needs a gradient."""
        return any(self[:5])


class Training:
    """The launches of the module for maps and parameters of one layout. Tensors must begin at multiples of 16 bytes.

    Args:
        x: [N, C, H, W] in channels_last, float16 or bfloat16.
        layers: what is compiled in of the layers; `kept_rows` channels have the gradients of the logits.
        layouts: those of the reassembly.
    """

    def __init__(self, x: Tensor, layers: Layers, layouts: Layouts):
        self.layers, self.layouts = layers, layouts
        n, c, h, w = x.shape
        self.pixels, cells = n * h * w, (n, *layouts.cells_shape[-2:])
        features = (n, h, w, layers.width)
        none = (0,)
        # features, those after a norm with statistics of the batch, weights for backward, logits, log-sum-exp, statistics; and, until the
        # operator fills y, the encoder's weight in the order of `encode`, and statistics of blocks
        self.pieces, self.kept = place(
            (
                (features if layers.compressed else none, False, False),
                (features if layers.batch else none, False, False),
                ((layers.kept + layers.compressed * layers.width * c,), False, False),
                ((*cells, layers.row), False, False),
                (layouts.lse_shape, True, False),
                ((2, layers.width) if layers.batch else none, True, False),
                ((layers.copied,), False, True),
                ((2, layers.width, feature_blocks(self.pixels)[0]) if layers.batch else none, True, True),
            ),
            math.prod(layouts.y_shape),
        )
        self.logits_summed = Summed(layers.kept_rows, layers.outputs, False, False, False, 0.0)
        scaled = layers.normalized and not layers.batch
        self.features_summed = Summed(layers.width, layers.width, layers.rectified, scaled, layers.batch, layers.eps if scaled else 0.0)
        parts, feature_parts = (
            (1 + summed.centred, find_tiles(pixels, summed).parts, summed.columns)
            for pixels, summed in ((math.prod(cells), self.logits_summed), (self.pixels, self.features_summed))
        )
        # the gradient of the logits, partial sums of it and of that of the features, and the gradient of the compressor's weight
        self.scratch_pieces, self.scratch = place(
            (
                ((*cells, layers.kept_rows), False, False),
                (parts, True, False),
                (feature_parts if layers.compressed else none, True, False),
                ((layers.width, c) if layers.compressed else none, False, False),
            ),
            0,
        )
        self.plans: dict[Any, list[Plan]] = {}

    def _view(self, x: Tensor, y: Tensor | None, kept: Tensor) -> list[Tensor]:
        """Return the pieces; the features are x without a compressor, and the logits are also viewed as cells at the end."""
        memories = kept if y is None else y.as_strided((y.numel(),), (1,)), kept
        views = [piece.view(memories) if y is not None or piece.memory else x for piece in self.pieces]
        if not self.layers.compressed:
            views[0] = x
        return [*views, view_cells(views[3], self.layouts)]

    def _forward(
        self,
        x: Tensor,
        y: Tensor,
        features: Tensor,
        normalized: Tensor,
        weights: Tensor,
        logits: Tensor,
        lse: Tensor,
        statistics: Tensor,
        copy: Tensor,
        partials: Tensor,
        cells: Tensor,
        *given: Any,
    ) -> list[Launch]:
        layers, precision = self.layers, "widened" if INTERPRETED else "ieee"
        *parameters, batches = given
        parameters = Parameters(*parameters)
        launches = [compress_launch(x, features, copy, parameters, layers, weights, partials, precision=precision)]
        if layers.batch:
            running: Any = (parameters.mean, parameters.variance, batches)
            launches.append(combine_launch(self.pixels, partials, statistics, running, layers))
            scale: Any = parameters.scale
            shift: Any = parameters.shift
            launches.append(normalize_launch(features, statistics, scale, shift, normalized, layers))
            features = normalized
        launches.append(encode_launch(features, copy, logits, parameters, layers, precision=precision))
        return launches + forward_launches(x, cells, y, lse, self.layouts.spec)

    def start(self, key: Any, like: Tensor, addresses: Sequence[int], build: Callable[[], Built]) -> None:
        """Run launches on tensors at `addresses`, which `build` returns with the tensors."""
        if INTERPRETED:
            for launch in build()[1]:
                launch.interpret()
            return
        with on_device_of(like):
            plans = self.plans.get(key)
            if plans is None:
                tensors, launches = build()
                plans = self.plans[key] = [Plan(launch, tensors) for launch in launches]
            for plan in plans:
                plan.run(addresses)

    def forward(self, x: Tensor, given: Sequence[Tensor | None], addresses: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Compute the output [N, C, Ho, Wo], and update the running statistics of a norm with statistics of the batch.

        Args:
            x: [N, C, H, W].
            given: the parameters (`encoder.Parameters`) and the number of batches of such a norm.
            addresses: theirs.

        Returns:
            The output, and the memory that backward needs.
        """
        y, kept = x.new_empty_strided(self.layouts.y_shape, self.layouts.y_strides), x.new_empty(self.kept)
        at = x.data_ptr(), y.data_ptr(), *self._addresses(x, y, kept), *addresses

        def build() -> Built:
            tensors = [x, y, *self._view(x, y, kept), *distinguish(given)]
            return tensors, self._forward(*tensors)  # pyright: ignore[reportArgumentType]

        self.start("forward", x, at, build)
        return y, kept

    def _addresses(self, x: Tensor, y: Tensor | None, kept: Tensor) -> list[int]:
        bases = 0 if y is None else y.data_ptr(), kept.data_ptr()
        addresses = [bases[piece.memory] + 2 * piece.first for piece in self.pieces]
        if not self.layers.compressed:
            addresses[0] = x.data_ptr()
        return [*addresses, addresses[3]]

    def backward(self, dy: Tensor, x: Tensor, kept: Tensor, given: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
        """Compute the gradients of x and of the parameters, in the order of `Gradients`; None for those that are not needed.

        Args:
            dy: [N, C, Ho, Wo], any strides.
            x, given: as for `forward`.
            kept: the memory that `forward` returned.
            needs: which gradients are needed; at least one.
        """
        layers, needs = self.layers, Gradients(*needs)
        n, c, h, w = x.shape
        scratch = x.new_empty(self.scratch)
        dx = x.new_empty_strided(x.shape, x.stride()) if needs.x else None
        pieces = self._addresses(x, None, kept)
        base = scratch.data_ptr()
        dlogits, partials, feature_partials, dcompressor = [base + 2 * piece.first for piece in self.scratch_pieces]

        def view_scratch() -> list[Tensor]:
            views = [piece.view((scratch, scratch)) for piece in self.scratch_pieces]
            return [*views, view_cells(views[0], self.layouts)]

        def build_operator() -> Built:
            *_, lse, _, _, _, cells = self._view(x, None, kept)
            dlogits, partials, _, _, dcells = view_scratch()
            gradient, source = distinguish((dy, x))
            launches = backward_launches(gradient, source, cells, lse, dx, dcells, self.layouts.spec)
            launches.append(sum_launch(dlogits, partials, self.logits_summed))
            return [gradient, source, dx, cells, lse, dlogits, dcells, partials], launches

        at = dy.data_ptr(), x.data_ptr(), 0 if dx is None else dx.data_ptr(), pieces[3], pieces[4], dlogits, dlogits, partials
        self.start(("operator", needs.x, dy.stride(), at[0] % 16 == 0), x, at, build_operator)

        encoded = 1 if layers.batch else 0
        size, strides = (n, layers.width, h, w), (h * w * layers.width, 1, w * layers.width, layers.width)
        features = kept.as_strided(size, strides, self.pieces[encoded].first) if layers.compressed else x
        taps = layers.kernel_h * layers.kernel_w
        weight = kept.as_strided(
            (layers.kept_rows, layers.width, layers.kernel_h, layers.kernel_w),
            (taps * layers.width, 1, layers.kernel_w * layers.width, layers.width),
            self.pieces[2].first,
        )
        _, hq, wq, row = self.scratch_pieces[0].shape
        gradient = scratch.as_strided((n, row, hq, wq), (hq * wq * row, 1, wq * row, row))
        dfeatures, dweight, _ = torch.ops.aten.convolution_backward.default(
            gradient,
            features,
            weight,
            None,
            (layers.stride_h, layers.stride_w),
            (layers.padding_h, layers.padding_w),
            (layers.dilation_h, layers.dilation_w),
            False,
            (0, 0),
            1,
            (needs.features, needs.encoder_weight, False),
        )
        if needs.features:
            dfeatures = dfeatures.contiguous(memory_format=torch.channels_last)
            if layers.compressed:
                self._differentiate_features(dfeatures, x, kept, given, feature_partials, view_scratch)
                flat = dfeatures.as_strided((self.pixels, layers.width), (layers.width, 1))
                if needs.weight:
                    # autocast does not change the dtype of a product with a given output
                    rows = x.as_strided((self.pixels, c), (c, 1))
                    torch.mm(flat.t(), rows, out=scratch.as_strided((layers.width, c), (c, 1), self.scratch_pieces[3].first))
                if dx is not None:
                    compressor = kept.as_strided((layers.width, c), (c, 1), self.pieces[2].first + layers.kept)
                    dx.as_strided((self.pixels, c), (c, 1)).addmm_(flat, compressor)
            elif dx is not None:
                dx.add_(dfeatures)
        if not any(needs[1:]):
            return [dx, *[None] * 6]
        if needs.encoder_weight:
            dweight = dweight.contiguous(memory_format=torch.channels_last)
        parameters = (*given[:2], *given[4:8])
        gradients = [None if t is None else t.new_empty_strided(t.shape, t.stride()) for t in parameters]
        summed = layers.compressed and needs.features

        def build_finish() -> Built:
            _, partials, feature_partials, dcompressor, _ = view_scratch()
            encoder, compressor = dweight if needs.encoder_weight else None, dcompressor if needs.weight else None
            features = feature_partials if summed else None
            launch = finish_launch(gradients, encoder, compressor, partials, features, layers)
            return [*gradients, encoder, compressor, partials, features], [launch]

        ends = [0 if t is None else t.data_ptr() for t in gradients]
        at = *ends, dweight.data_ptr() if needs.encoder_weight else 0, dcompressor, partials, feature_partials
        self.start(("finish", summed, needs.weight, needs.encoder_weight), x, at, build_finish)
        return [dx, *(t if needed else None for t, needed in zip(gradients, needs[1:], strict=True))]

    def _differentiate_features(
        self,
        gradient: Tensor,
        x: Tensor,
        kept: Tensor,
        given: Sequence[Tensor | None],
        partials: int,
        view_scratch: Callable[[], list[Tensor]],
    ) -> None:
        """Replace the gradient of what the encoder reads by that of what the compressor computes, and its partial sums at `partials`."""
        layers = self.layers
        pieces = self._addresses(x, None, kept)

        def build() -> Built:
            features, normalized, *_, statistics, _, _, _ = self._view(x, None, kept)
            partials, (variance, scale) = view_scratch()[2], distinguish(given[3:5])
            tensors = [gradient, features, normalized, statistics, variance, scale, partials]
            if not layers.batch:
                return tensors, [sum_launch(gradient, partials, self.features_summed, rectified=features, variance=variance, scale=scale)]
            affine: Any = scale
            maps = {"rectified": normalized, "features": features, "statistics": statistics}
            return tensors, [
                sum_launch(gradient, partials, self.features_summed, **maps),
                differentiate_launch(gradient, normalized, features, statistics, affine, partials, layers),
            ]

        ends = [0 if t is None else t.data_ptr() for t in given[3:5]]
        self.start("features", x, (gradient.data_ptr(), *pieces[:2], pieces[5], *ends, partials), build)
