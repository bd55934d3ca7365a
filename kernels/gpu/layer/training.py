"""The module with gradients, in half precision and channels_last: its forward and backward pass as launches that are planned once.

PyTorch computes what libraries do best: the gradient of the encoder's weight, and the products with the gradient of the compressed
features. The launches of this package compute everything else. What backward needs lies in one piece of memory.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...execution import Layouts, view_cells
from ..launch import Launch, Plan, distinguish, on_device_of
from ..operator_launches import INTERPRETED, adds_product, backward_launches, forward_launches
from .batch_norm import combine_launch, differentiate_launch
from .encoder import Layers, Parameters, compress_launch, encode_launch, feature_blocks
from .encoder_gradient import Division, Norm, encoder_gradient_launch
from .memory import place
from .sums import finish_launch

PRECISION = "widened" if INTERPRETED else "ieee"
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
        # features, weights for backward, logits, log-sum-exp, statistics; and, until the operator fills y, the encoder's weight in the
        # order of `encode`, and statistics of blocks
        self.pieces, self.kept = place(
            (
                (features if layers.compressed else none, False, False),
                ((layers.kept + layers.compressed * layers.width * c,), False, False),
                ((*cells, layers.row), False, False),
                (layouts.lse_shape, True, False),
                ((2, layers.width) if layers.batch else none, True, False),
                ((layers.copied,), False, True),
                ((2, layers.width, feature_blocks(self.pixels)[0]) if layers.batch else none, True, True),
            ),
            math.prod(layouts.y_shape),
        )
        division = Division((n, h, w), (cells[1], cells[2]), layers)
        # the gradient of the logits, that of the features, the features after a norm with statistics of the batch, partial sums of both
        # gradients, and the gradient of the compressor's weight
        self.scratch_pieces, self.scratch = place(
            (
                ((*cells, layers.kept_rows), False, False),
                (features if layers.compressed else none, False, False),
                (features if layers.batch else none, False, False),
                (division.logit_partials, True, False),
                (division.partials if layers.compressed else none, True, False),
                ((layers.width, c) if layers.compressed else none, False, False),
            ),
            0,
        )
        self.plans: dict[Any, list[Plan]] = {}
        self.adding: dict[Any, bool] = {}

    def _view(self, x: Tensor, y: Tensor | None, kept: Tensor) -> list[Tensor]:
        """Return the pieces; the features are x without a compressor, and the logits are also viewed as cells at the end."""
        memories = kept if y is None else y.as_strided((y.numel(),), (1,)), kept
        views = [piece.view(memories) if y is not None or piece.memory else x for piece in self.pieces]
        if not self.layers.compressed:
            views[0] = x
        return [*views, view_cells(views[2], self.layouts)]

    def _forward(
        self,
        x: Tensor,
        y: Tensor,
        features: Tensor,
        weights: Tensor,
        logits: Tensor,
        lse: Tensor,
        statistics: Tensor,
        copy: Tensor,
        partials: Tensor,
        cells: Tensor,
        *given: Any,
    ) -> list[Launch]:
        layers = self.layers
        *parameters, batches = given
        parameters = Parameters(*parameters)
        launches = [compress_launch(x, features, copy, parameters, layers, weights, partials, precision=PRECISION)]
        if layers.batch:
            running: Any = (parameters.mean, parameters.variance, batches)
            launches.append(combine_launch(self.pixels, partials, statistics, running, layers))
        read = features, copy, logits, parameters, layers, statistics if layers.batch else None
        launches.append(encode_launch(*read, precision=PRECISION))
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
        return [*addresses, addresses[2]]

    def backward(self, dy: Tensor, x: Tensor, kept: Tensor, given: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
        """Compute the gradients of x and of the parameters, in the order of `Gradients`; None for those that are not needed.

        Args:
            dy: [N, C, Ho, Wo], any strides.
            x, given: as for `forward`.
            kept: the memory that `forward` returned.
            needs: which gradients are needed; at least one.
        """
        layers, needs = self.layers, Gradients(*needs)
        c = x.shape[1]
        scratch = x.new_empty(self.scratch)
        dx = x.new_empty_strided(x.shape, x.stride()) if needs.x else None
        # what the encoder read of a norm with statistics of the batch is computed again with the gradient
        differentiated = needs.features or (layers.batch and needs.encoder_weight)
        pieces = self._addresses(x, None, kept)
        base = scratch.data_ptr()
        places = [base + 2 * piece.first for piece in self.scratch_pieces]

        layout = dy.stride(), dy.data_ptr() % 16 == 0
        added = layers.compressed and needs.x and self._adds_product(layout, dy, x, kept)

        def view_scratch() -> list[Tensor]:
            views = [piece.view((scratch, scratch)) for piece in self.scratch_pieces]
            return [*views, view_cells(views[0], self.layouts)]

        def build_gradients() -> Built:
            features, weights, _, lse, statistics, *_, cells = self._view(x, None, kept)
            dlogits, dfeatures, normalized, logit_partials, partials, _, dcells = view_scratch()
            gradient, source, variance, scale, shift = distinguish((dy, x, *given[3:6]))
            features = features if layers.compressed else source
            matrix = weights[layers.kept :].view(layers.width if layers.compressed else 0, c)
            target = dfeatures if layers.compressed else dx
            spec = self.layouts.spec
            launches = backward_launches(gradient, source, cells, lse, None if added else dx, dcells, spec)
            launches.append(
                encoder_gradient_launch(
                    dlogits,
                    weights,
                    features,
                    target if differentiated else None,
                    logit_partials,
                    partials if layers.compressed else None,
                    Norm(variance, scale, shift),
                    layers,
                    *((statistics, normalized) if layers.batch else ()),
                    precision=PRECISION,
                )
            )
            if layers.batch and needs.features:
                launches.append(differentiate_launch(dfeatures, features, statistics, scale, partials, layers))
            if added:
                launches += backward_launches(gradient, source, cells, lse, dx, None, spec, factors=(dfeatures, matrix))
            maps = gradient, source, dx, cells, dlogits, dcells
            own = lse, weights, statistics, dfeatures, normalized, logit_partials, partials
            return [*maps, *own, variance, scale, shift, features, matrix], launches

        dlogits, dfeatures, normalized, logit_partials, partials, dcompressor = places
        features, weights, cells, lse, statistics = pieces[:5]
        at = (
            *(dy.data_ptr(), x.data_ptr(), 0 if dx is None else dx.data_ptr(), cells, dlogits, dlogits),
            *(lse, weights, statistics, dfeatures, normalized, logit_partials, partials),
            *[0 if t is None else t.data_ptr() for t in given[3:6]],
            *(features, weights + 2 * layers.kept),
        )
        self.start(("gradients", needs.x, needs.features, differentiated, *layout), x, at, build_gradients)

        dweight = self._differentiate_weight(x, kept, scratch) if needs.encoder_weight else None
        if layers.compressed and needs.features:
            flat = scratch.as_strided((self.pixels, layers.width), (layers.width, 1), self.scratch_pieces[1].first)
            if needs.weight:
                # autocast does not change the dtype of a product with a given output
                rows = x.as_strided((self.pixels, c), (c, 1))
                torch.mm(flat.t(), rows, out=scratch.as_strided((layers.width, c), (c, 1), self.scratch_pieces[5].first))
            if dx is not None and not added:
                compressor = kept.as_strided((layers.width, c), (c, 1), self.pieces[1].first + layers.kept)
                dx.as_strided((self.pixels, c), (c, 1)).addmm_(flat, compressor)
        if not any(needs[1:]):
            return [dx, *[None] * 6]
        parameters = (*given[:2], *given[4:8])
        gradients = [None if t is None else t.new_empty_strided(t.shape, t.stride()) for t in parameters]
        summed = layers.compressed and needs.features

        def build_finish() -> Built:
            *_, logit_partials, partials, dcompressor, _ = view_scratch()
            compressor, features = dcompressor if needs.weight else None, partials if summed else None
            launch = finish_launch(gradients, dweight, compressor, logit_partials, features, layers)
            return [*gradients, dweight, compressor, logit_partials, features], [launch]

        ends = [0 if t is None else t.data_ptr() for t in gradients]
        at = *ends, 0 if dweight is None else dweight.data_ptr(), dcompressor, logit_partials, partials
        self.start(("finish", summed, needs.weight, needs.encoder_weight), x, at, build_finish)
        return [dx, *(t if needed else None for t, needed in zip(gradients, needs[1:], strict=True))]

    def _adds_product(self, layout: Any, dy: Tensor, x: Tensor, kept: Tensor) -> bool:
        """Return whether the operator's gradient to x adds that of the compressor, for a `dy` of this layout."""
        if layout not in self.adding:
            self.adding[layout] = adds_product(dy, x, self._view(x, None, kept)[-1], self.layouts.spec)
        return self.adding[layout]

    def _differentiate_weight(self, x: Tensor, kept: Tensor, scratch: Tensor) -> Tensor:
        """Return the gradient of the encoder's weight [kept_rows, width, *kernel] in channels_last."""
        layers = self.layers
        n, _, h, w = x.shape
        read = x
        if layers.compressed:
            memory, piece = (scratch, self.scratch_pieces[2]) if layers.batch else (kept, self.pieces[0])
            read = memory.as_strided((n, layers.width, h, w), (h * w * layers.width, 1, w * layers.width, layers.width), piece.first)
        taps = layers.kernel_h * layers.kernel_w
        # its values are not read
        weight = kept.as_strided(
            (layers.kept_rows, layers.width, layers.kernel_h, layers.kernel_w),
            (taps * layers.width, 1, layers.kernel_w * layers.width, layers.width),
            self.pieces[1].first,
        )
        _, hq, wq, row = self.scratch_pieces[0].shape
        dlogits = scratch.as_strided((n, row, hq, wq), (hq * wq * row, 1, wq * row, row))
        pairs = [(getattr(layers, f"{name}_h"), getattr(layers, f"{name}_w")) for name in ("stride", "padding", "dilation")]
        needs = False, True, False
        _, gradient, _ = torch.ops.aten.convolution_backward.default(dlogits, read, weight, None, *pairs, False, (0, 0), 1, needs)
        return gradient.contiguous(memory_format=torch.channels_last)
