"""The CARAFE++ module: it predicts a kernel for every target location and reassembles features with it (paper, section 3)."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, ParamSpec

import torch
import torch.nn as nn
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from ..kernels.geometry import Spec, check_spec, is_scale, write_scale
from ..kernels.reassembly import autocast, reassemble, reassemble_padded
from ..kernels.reference import reassembly_kernels
from .half_encoder import encode, suits_matrix_units
from .inference import infer
from .slot_checks import check_features
from .training import train

P = ParamSpec("P")

# the names that other implementations give to arguments of CARAFE
OTHER_NAMES = {
    "up": ("scale", "scale_factor", "up_factor", "ratio"),
    "kernel_size": ("up_kernel", "k_up"),
    "encoder_kernel": ("k_enc", "encoder_size"),
    "compressed_channels": ("c_mid", "m_channels"),
    "groups": ("up_group", "group_size"),
    "channels": ("c", "c1", "in_channels"),
}


def write_argument(name: str, value: object, known: Iterable[str]) -> str:
    """Write an argument of another implementation as one of CARAFE; without one, list those of CARAFE."""
    ours = next((ours for ours, others in OTHER_NAMES.items() if name in others), None)
    if ours is None:
        return f"it has {', '.join(known)}"
    if ours == "up":
        return f"write {write_scale(value) if is_scale(value) else 'up=...'}"
    return f"write {ours}={value!r}"


def explain_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate the constructor of CARAFE: its TypeError says what to write instead of the arguments of other implementations."""
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def explained(*args: P.args, **options: P.kwargs) -> None:
        given = args[1:]
        if len(given) > 1:
            got = ", ".join(map(repr, given))
            scale = given[-1] if len(given) == 2 and not options else None
            right = f"CARAFE({given[0]!r}, {write_scale(scale) if is_scale(scale) else 'up=..., down=..., kernel_size=...'})"
            raise TypeError(
                f"CARAFE takes only channels by position, got {got}; write {right}. carafepp.integrations.signatures has the constructors "
                "of mmcv and of YOLO ports"
            )
        for name, value in options.items():
            if name not in known:
                raise TypeError(f"CARAFE has no argument {name}; {write_argument(name, value, known)}")
        init(*args, **options)

    return explained


class CARAFE(nn.Module):
    """Module that resizes features by `up` / `down`, with a reassembly kernel for each output pixel that it predicts from the features.

    A 1x1 convolution compresses the channels, a convolution of stride `down` encodes their content into groups * K * K * up**2 logits,
    and `carafepp.kernels.reassemble` normalises the logits and sums the K x K windows of the input (Eqn. 1 to 3). State-dict keys and
    initialisation are those of mmcv's CARAFEPack, so that its weights load. `CARAFE(256, up=2)` has 74,148 parameters and takes 199 K FLOPs
    per source pixel.

    Args:
        channels: C, the channels of input and output.
        up, down: the output has ceil(H * up / down) x ceil(W * up / down) pixels.
        kernel_size: K, the side of the reassembly window; odd.
        encoder_kernel: side of the content encoder's kernel, odd; the paper's rule is K - 2 (section 3.2).
        compressed_channels: C_m. "auto" is the paper's choice, 64 for upsampling and 16 for downsampling; None omits the compressor.
        groups: number of channel groups, each with its own kernels; must divide C.
        encoder_dilation: dilation of the content encoder.
        compressor_norm: whether batch normalisation and ReLU follow the compressor, as in the paper's classification backbones
            (section 5.1).
        normalizer: "softmax", "sigmoid", "sigmoid_normalized" or "none" (Table XIV).
        border: how windows that leave the map are computed: "zero" (as in the paper), "renormalize", "replicate" or "shift", see
            `carafepp.kernels.reassemble`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value. The message names it and says what would be right.
    """

    @explain_arguments
    def __init__(
        self,
        channels: int,
        *,
        up: int = 1,
        down: int = 1,
        kernel_size: int = 5,
        encoder_kernel: int = 3,
        compressed_channels: int | Literal["auto"] | None = "auto",
        groups: int = 1,
        encoder_dilation: int = 1,
        compressor_norm: bool = False,
        normalizer: str = "softmax",
        border: str = "zero",
    ):
        super().__init__()
        self.spec = Spec(kernel_size, up, down, groups, normalizer, border)
        check_spec(self.spec)
        if compressed_channels == "auto":
            compressed_channels = 64 if up > 1 else 16
        for name, value in (
            ("channels", channels),
            ("encoder_kernel", encoder_kernel),
            ("encoder_dilation", encoder_dilation),
            ("compressed_channels", 1 if compressed_channels is None else compressed_channels),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                also = ', "auto" or None' if name == "compressed_channels" else ""
                raise TypeError(f"{name} must be an int{also}, got {value!r} of type {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if encoder_kernel % 2 == 0:
            raise ValueError(f"encoder_kernel must be odd, so that the logits keep the positions of the input, got {encoder_kernel}")
        if channels % groups:
            raise ValueError(f"groups must divide channels, got groups={groups} for channels={channels}")
        if compressor_norm and compressed_channels is None:
            raise ValueError("compressor_norm=True needs a compressor, got compressed_channels=None")

        width = compressed_channels or channels
        self.channel_compressor = nn.Conv2d(channels, width, 1) if compressed_channels else nn.Identity()
        self.compressor_norm = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True)) if compressor_norm else nn.Identity()
        self.content_encoder = nn.Conv2d(
            width,
            groups * self.spec.taps * up**2,
            encoder_kernel,
            stride=down,
            padding=(encoder_kernel - 1) // 2 * encoder_dilation,
            dilation=encoder_dilation,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as mmcv does: the encoder's logits start near 0, so that the first kernels are close to a box blur."""
        if isinstance(self.channel_compressor, nn.Conv2d):
            nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=0.001)
        for layer in (self.channel_compressor, self.content_encoder):
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def logits(self, x: Tensor) -> Tensor:
        """Encode the content of x [N, C, H, W] into logits [N, groups * K * K * up**2, ceil(H / down), ceil(W / down)]."""
        try:
            return self.content_encoder(self.compressor_norm(self.channel_compressor(x)))
        except (RuntimeError, TypeError):
            # the message of PyTorch names no argument; a check in advance would slow down small maps
            self._check(x)
            raise

    def _check(self, x: Tensor) -> Tensor:
        """Check that x has the channels of the first layer, and return it; the layer need not be the one that this class has built."""
        first = self.content_encoder if isinstance(self.channel_compressor, nn.Identity) else self.channel_compressor
        return check_features(x, getattr(first, "in_channels", None))

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Resample x [N, C, H, W] to [N, C, ceil(H * up / down), ceil(W * up / down)], or to [N, C, *size].

        Args:
            x: features [N, C, H, W].
            size: rows and columns of the output, which may each differ by less than `up` from those above. A shorter output is cut at the
                bottom and right; a longer one repeats its last row or column.

        Raises:
            TypeError, ValueError: `x` or `size` is wrong; the message says what would be right.
        """
        # unless a subclass, or a patch of the class or of this module, replaces the method
        if type(self).logits is CALL_LAYERS and "logits" not in self.__dict__:
            # once for the layers and the operator; autocast casts nothing for layers that vmap calls
            if isinstance(x, Tensor) and not is_batchedtensor(x):
                (x,) = autocast(x)
            if suits_matrix_units(x):
                layers = self.channel_compressor, self.compressor_norm, self.content_encoder
                y = (train if torch.is_grad_enabled() else infer)(*layers, x, self.spec, size)
                if y is not None:
                    return y
                encoded = encode(*layers, self._check(x))
                # with other channels, the operator names those that are right
                if encoded is not None and self.content_encoder.out_channels == self.spec.groups * self.spec.taps * self.spec.up**2:
                    return reassemble_padded(*encoded, self.spec, size)
        return reassemble(x, self.logits(x), **self.spec._asdict(), size=size)

    def kernels(self, x: Tensor) -> Tensor:
        """Compute the normalised kernels [N, groups, K, K, Ho, Wo] of x [N, C, H, W], for analysis and figures."""
        kernels = reassembly_kernels(self.logits(self._check(x)), self.spec, *x.shape[2:])
        return kernels.unflatten(2, (self.spec.kernel_size,) * 2)

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse torch.jit.script, which calls this method of a module and of its parts."""
        raise TypeError(
            "torch.jit.script cannot compile CARAFE, whose operator is chosen by device in Python: "
            "use torch.jit.trace, torch.export.export or torch.compile"
        )

    def extra_repr(self) -> str:
        """Show the options in the representation of the module."""
        return ", ".join(f"{name}={value!r}" for name, value in self.spec._asdict().items())


# the `logits` that `forward` may compute without calling it
CALL_LAYERS = CARAFE.logits
