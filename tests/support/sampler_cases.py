"""Every sampler of the configuration with its options and its definition."""

import functools
from typing import NamedTuple

from configurations import CONF
from downsampler_definitions import (
    a2u_pool,
    avg_pool,
    blur_pool,
    dpp,
    flc_pool,
    hwd,
    index_pool,
    lip,
    max_blur_pool,
    max_pool,
    soft_pool,
    spd_conv,
    strided_conv,
)
from guided_upsampler_definitions import a2u, fade, freq_fusion, gum, indexnet, jbu, local_attender, resfu, sapa
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from upsampler_definitions import (
    bilinear,
    bilinear_conv,
    carafe,
    deconv,
    dlu,
    dysample,
    lda_aqu,
    nearest,
    nearest_conv,
    pixel_shuffle,
    spatial_attention,
)


@functools.cache
def read_sampler(group: str, name: str) -> DictConfig:
    """Read the configuration file of a sampler, which takes milliseconds."""
    return OmegaConf.load(CONF / group / f"{name}.yaml")


class Case(NamedTuple):
    group: str
    name: str
    options: dict
    definition: object

    @property
    def id(self):
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}[{options}]" if options else self.name

    @property
    def slot(self):
        return instantiate(read_sampler(self.group, self.name), **self.options)

    @property
    def guided(self):
        return getattr(get_object(read_sampler(self.group, self.name)._target_), "needs_guide", False)

    def size(self, height, width):
        """Output size for a source of height x width."""
        return (2 * height, 2 * width) if self.group == "upsampler" else (-(-height // 2), -(-width // 2))


def list_cases(group: str, table: list[tuple]) -> list[Case]:
    """List every sampler of a table of (name, definition, options, more options ...), first without options."""
    return [Case(group, name, options, definition) for name, definition, *variants in table for options in ({}, *variants)]


# At the 8 channels of the tests, the defaults of these have parameters without a gradient: the normalisation of one channel leaves nothing,
# and far offsets all read the border.
SMALLER = [
    Case("upsampler", "dlu", {"compressed_channels": 4}, dlu),
    Case("upsampler", "lda_aqu", {"reduction": 1, "offset_range": 1.5}, lda_aqu),
]

CASES = [
    *SMALLER,
    *list_cases(
        "upsampler",
        [
            ("nearest", nearest),
            ("bilinear", bilinear),
            ("nearest_conv", nearest_conv),
            ("bilinear_conv", bilinear_conv),
            ("deconv", deconv),
            ("pixel_shuffle", pixel_shuffle),
            ("spatial_attention", spatial_attention),
            ("gum", gum),
            ("dysample", dysample, {"style": "pl"}, {"dynamic_scope": True}, {"style": "pl", "groups": 8, "dynamic_scope": True}),
            ("indexnet", indexnet),
            ("a2u", a2u),
            ("sapa", sapa, {"gated": True, "embedding": 8}),
            ("fade", fade, {"lite": True}),
            ("freq_fusion", freq_fusion),
            ("jbu", jbu),
            ("resfu", resfu),
            ("local_attender", local_attender),
            (
                "carafe",
                carafe,
                {"compressed_channels": None, "normalizer": "sigmoid"},
                {"kernel_size": 3, "encoder_kernel": 1, "groups": 2, "normalizer": "sigmoid_normalized"},
                {"kernel_size": 7, "encoder_kernel": 5, "encoder_dilation": 2, "normalizer": "none"},
            ),
        ],
    ),
    *list_cases(
        "downsampler",
        [
            ("max_pool", max_pool),
            ("avg_pool", avg_pool),
            ("strided_conv", strided_conv),
            ("blur_pool", blur_pool),
            ("max_blur_pool", max_blur_pool),
            ("flc_pool", flc_pool),
            ("spd_conv", spd_conv),
            ("hwd", hwd),
            ("index_pool", index_pool),
            ("a2u_pool", a2u_pool),
            ("soft_pool", soft_pool),
            ("dpp", dpp, {"symmetric": False}, {"guide": "full"}, {"guide": "full", "symmetric": False}),
            ("lip", lip, {"bottleneck": 8}),
            ("carafe", carafe, {"compressor_norm": True, "groups": 4}),
        ],
    ),
]
