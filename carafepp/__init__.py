"""CARAFE++: content-aware reassembly of features (Wang et al., 2020).

`CARAFE` is the module, `reassemble` and `reassemble_weights` are the operator, `replace` puts the module into any network, and
`convert_state_dict` converts weights of other implementations. Names are imported when they are first used, so that `import carafepp` costs
nothing.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from carafepp.integrations.replacing import replace as replace
    from carafepp.integrations.state_dicts import convert_state_dict as convert_state_dict
    from carafepp.kernels import reassemble as reassemble
    from carafepp.kernels import reassemble_weights as reassemble_weights
    from carafepp.models.carafe import CARAFE as CARAFE

__version__ = "0.1.0"

_MODULES = {
    "CARAFE": "models.carafe",
    "reassemble": "kernels",
    "reassemble_weights": "kernels",
    "convert_state_dict": "integrations.state_dicts",
    "replace": "integrations.replacing",
}
__all__ = ["CARAFE", "__version__", "convert_state_dict", "reassemble", "reassemble_weights", "replace"]

# In a checkout the sub-packages are the folders beside this one; in an installed package they are inside it.
_CHECKOUT = Path(__file__).parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "kernels").is_dir():
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
