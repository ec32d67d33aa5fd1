"""Equivariant networks on LoRAs: layers, encoder, decoder, heads, the generator's velocity field, GL-net."""

from __future__ import annotations

from lolgen.nn.coordinates import Block, Coordinates
from lolgen.nn.decoder import Decoder, DecoderConfig
from lolgen.nn.directions import principal_directions, right_inverse
from lolgen.nn.encoder import Encoder, EncoderConfig
from lolgen.nn.familiarity import Familiarity, FamiliarityConfig
from lolgen.nn.flowfield import VelocityField, VelocityFieldConfig
from lolgen.nn.glnet import GLNet, GLNetConfig
from lolgen.nn.heads import Heads, HeadsConfig
from lolgen.nn.latent import Latent
from lolgen.nn.layers import GLLinear, GLMix, Invariants
from lolgen.nn.orthogonal import Gram, OLinear, OMix
from lolgen.nn.pretrained import Pretrained
from lolgen.nn.spectrum import Spectrum
from lolgen.nn.template import Template, TemplateConfig, word_groups
from lolgen.nn.tokens import ModuleLinear, ModuleNet, Summary

__all__ = [
    "Block",
    "Coordinates",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "Familiarity",
    "FamiliarityConfig",
    "GLLinear",
    "GLMix",
    "GLNet",
    "GLNetConfig",
    "Gram",
    "Heads",
    "HeadsConfig",
    "Invariants",
    "Latent",
    "ModuleLinear",
    "ModuleNet",
    "OLinear",
    "OMix",
    "Pretrained",
    "Spectrum",
    "Summary",
    "Template",
    "TemplateConfig",
    "VelocityField",
    "VelocityFieldConfig",
    "principal_directions",
    "right_inverse",
    "word_groups",
]
