"""Modules that own parameters and call kernels: mixers, and one backbone that takes them as arguments."""

if not __name__.startswith("seqlab."):
    raise ImportError("import seqlab.models, not models: two copies of one module would hold two sets of classes")

from seqlab.models.attention import Attention
from seqlab.models.backbone import Backbone, Block
from seqlab.models.cache import Full, Window
from seqlab.models.language_model import LanguageModel
from seqlab.models.layers import MLP, Embedding, LayerNorm, Linear, RMSNorm, ShortConv, SwiGLU
from seqlab.models.linear_attention import GatedLinearAttention
from seqlab.models.mamba import Mamba

__all__ = [
    "MLP",
    "Attention",
    "Backbone",
    "Block",
    "Embedding",
    "Full",
    "GatedLinearAttention",
    "LanguageModel",
    "LayerNorm",
    "Linear",
    "Mamba",
    "RMSNorm",
    "ShortConv",
    "SwiGLU",
    "Window",
]
