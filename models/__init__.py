"""Modules that own parameters and call kernels: mixers, and one backbone that takes them as arguments."""

if not __name__.startswith("seqlab."):
    raise ImportError(
        "import seqlab.models, not models: two copies of one module would hold two sets of classes"
    )

from seqlab.models.attention import Attention
from seqlab.models.backbone import Backbone, Block
from seqlab.models.batch_norm import BatchNorm
from seqlab.models.cache import Full, Window
from seqlab.models.language_model import LanguageModel
from seqlab.models.layers import MLP, Embedding, Identity, LayerNorm, Linear, RMSNorm, ShortConv, SwiGLU
from seqlab.models.legendre.lmu import LMU, RecurrentLMU
from seqlab.models.legendre.lmuformer import LMUFormer, LMUMixer, SpikingLMUMixer
from seqlab.models.legendre.spiking_attention import SpikingAttention
from seqlab.models.linear_memory.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from seqlab.models.linear_memory.linear_attention import (
    GatedLinearAttention,
    LinearAttention,
    Retention,
    SimpleGatedLinearAttention,
)
from seqlab.models.local import CausalPooling, CausalWavelets, GatedShortConv
from seqlab.models.mixture import MixtureOfExperts
from seqlab.models.parallel_mixers import ParallelMixers
from seqlab.models.sequence_model import SequenceModel
from seqlab.models.state_space.mamba import Mamba
from seqlab.models.state_space.mamba2 import Mamba2
from seqlab.models.state_space.mambamixer import (
    GroupedChannelMixer,
    MambaMixerStack,
    SelectiveChannelMixer,
    SelectiveMixer,
)
from seqlab.models.state_space.rg_lru import RGLRU
from seqlab.models.state_space.tsm2 import TSM2
from seqlab.models.state_space.tsm2_streaming import StreamingTSM2

__all__ = [
    "LMU",
    "MLP",
    "RGLRU",
    "TSM2",
    "Attention",
    "Backbone",
    "BatchNorm",
    "Block",
    "CausalPooling",
    "CausalWavelets",
    "DeltaNet",
    "Embedding",
    "Full",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedShortConv",
    "GroupedChannelMixer",
    "Identity",
    "KimiDeltaAttention",
    "LMUFormer",
    "LMUMixer",
    "LanguageModel",
    "LayerNorm",
    "Linear",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "MambaMixerStack",
    "MixtureOfExperts",
    "ParallelMixers",
    "RMSNorm",
    "RecurrentLMU",
    "Retention",
    "SelectiveChannelMixer",
    "SelectiveMixer",
    "SequenceModel",
    "ShortConv",
    "SimpleGatedLinearAttention",
    "SpikingAttention",
    "SpikingLMUMixer",
    "StreamingTSM2",
    "SwiGLU",
    "Window",
]
