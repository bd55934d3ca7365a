"""Conversion of the weights of other implementations of CARAFE: mmcv and mmdetection, the official repository, and ports in PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..models.carafe import CARAFE
from .foreign_layers import check_layers, convert_layers, find_layers, find_prefix


@dataclass
class Converted:
    """A state dict for a network, and what happened to every tensor of the state dict that it was made from.

    Attributes:
        state: tensors under the names of the network, for its `load_state_dict`.
        used: names of the source that are those of the network.
        renamed: other names of the source whose tensors are used, and their names in the network; a removed prefix counts as another name.
        folded: names of the tensors of norms that are folded into a convolution, and the name of its weight in the network.
        zeros: biases of the network that are zero, because the convolutions of the source have none.
        left: names of the source that are not used.
        missing: tensors of the network that the source lacks; with any, `load_state_dict` needs `strict=False`.
    """

    state: dict[str, Tensor] = field(default_factory=dict, repr=False)
    used: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    zeros: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """List every tensor, one a line."""
        lines = [f"used     {name}" for name in self.used]
        lines += [f"renamed  {name} -> {ours}" for name, ours in self.renamed.items()]
        lines += [f"folded   {name} -> {ours}" for name, ours in self.folded.items()]
        lines += [f"zero     {name}" for name in self.zeros]
        lines += [f"left     {name}" for name in self.left]
        return "\n".join([*lines, *(f"missing  {name}" for name in self.missing)])


def convert_state_dict(
    state: Mapping[str, Tensor],
    network: nn.Module,
    *,
    activation: str | None = None,
    norm_eps: float | None = None,
    sub_pixels_first: bool = False,
    prefix: str | None = None,
) -> Converted:
    """Convert the state dict of another implementation of CARAFE exactly, for a network with CARAFE of this package.

    At the path of every CARAFE module of the network (`carafepp.models.carafe`, `carafepp.integrations.signatures`), the function knows the
    names of mmcv and of common ports. It takes scale, window, groups and normalizer, which a state dict does not hold, from the module. All
    other tensors keep their names. mmdetection's names become those of `carafepp.models.mmdet` if the network does not have them.

    Args:
        state: tensors by name, of a whole network or of a part. It is not changed.
        network: the network, or the part of it, that will load the result. It is not changed.
        activation: the activation after the compressor of the source, "ReLU" or "SiLU" for example; needed if a norm precedes it.
        norm_eps: the eps of the norms of the source; needed if it has norms. A norm after the encoder is folded into the convolution if the
            module of the network does not have it.
        sub_pixels_first: whether the source splits the channels of its encoder into sub-pixels, and those into taps. Pixel shuffle, which
            most implementations use, splits them into taps first.
        prefix: what precedes the names of the network in `state`, such as "model.". None finds it.

    Returns:
        The state dict for the network, and what happened to every tensor.

    Raises:
        TypeError: `state` does not map names to tensors.
        ValueError: the layers or their arithmetic cannot be converted exactly, or a shape differs. The message names the layer or tensor,
            and says what would be right.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must map names to tensors, got {type(state).__name__}; of a module, give state_dict()")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state must map names to tensors, got {type(value).__name__} for {name!r}; give the state dict inside")
    own = network.state_dict()
    found = network.named_modules(remove_duplicate=False)
    modules = {f"{path}." if path else "": module for path, module in found if isinstance(module, CARAFE)}
    if not modules:
        raise ValueError("network must have modules of CARAFE, whose layers the converted tensors are for; it has none")
    origins = {name: name for name in state}
    if any(name.startswith("neck.") for name in state) and not any(name.startswith("neck.") for name in own):
        # torchvision's detectors, which most calls do without
        from ..models import mmdet

        origins = dict(zip(renamed := mmdet.convert(state), state, strict=True))
        state = renamed
    if prefix is None:
        prefix = find_prefix(state, modules)

    tensors: dict[str, Tensor] = {}
    moved: dict[str, str] = {}
    folded: dict[str, str] = {}
    for path, module in modules.items():
        place = prefix + path
        if layers := find_layers(state, place):
            check_layers(layers, module, place, activation, norm_eps)
            part = convert_layers(state, layers, module, norm_eps=norm_eps, sub_pixels_first=sub_pixels_first)
            tensors |= {path + name: tensor for name, tensor in part.tensors.items()}
            moved |= {name: path + ours for name, ours in part.moved.items()}
            folded |= {name: path + ours for name, ours in part.folded.items()}
            known = {*moved, *folded, *(prefix + name for name in own)}
            if unknown := [name for name in state if name.startswith(place) and name not in known]:
                raise ValueError(
                    f"{origins[unknown[0]]!r} belongs to a layer that CARAFE at {path!r} does not have; if it is never called, remove it "
                    "from the state dict"
                )
    if not tensors:
        raise ValueError(f"prefix={prefix!r}: the state dict has no CARAFE at {', '.join(repr(prefix + path) for path in modules)}")
    for name in own:
        if name not in tensors and prefix + name in state:
            tensors[name], moved[prefix + name] = state[prefix + name], name

    sources = {ours: origins[name] for name, ours in moved.items()}
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{sources.get(name, name)!r} is {list(tensor.shape)} in the state dict, and {name!r} is {list(own[name].shape)} in the "
                "network; build the network with the same options, or remove the tensor"
            )
    return Converted(
        state={name: tensors[name].to(own[name].dtype) for name in own if name in tensors},
        used=[origins[name] for name in state if moved.get(name) == origins[name]],
        renamed={origins[name]: moved[name] for name in state if name in moved and moved[name] != origins[name]},
        folded={origins[name]: ours for name, ours in folded.items()},
        zeros=[name for name in tensors if name not in sources and name.removesuffix("bias") + "weight" not in folded.values()],
        left=[origins[name] for name in state if name not in moved and name not in folded],
        missing=[name for name in own if name not in tensors],
    )
