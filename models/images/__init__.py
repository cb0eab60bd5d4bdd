"""Models of images: pooling, convolutions, attention, wavelets and scans as mixers of one kind of block.
Images are [b, h, w, c], NHWC."""

from seqlab.models.images.dense import ImageToMap, MapHead
from seqlab.models.images.metaformer import (
    METAFORMERS,
    POOLFORMERS,
    ImageBackbone,
    ImageClassifier,
    ImagePyramid,
    MLPHead,
    baseline,
    metaformer,
    poolformer,
)
from seqlab.models.images.mixers import (
    IdentityMixing,
    ImageAttention,
    Pooling,
    RandomMixing,
    SepConv,
    SpatialLinear,
)
from seqlab.models.images.parts import Conv, ConvTranspose, Downsample, ImageMixer, MapNorm, StarReLU
from seqlab.models.images.vim2 import VIM2S, FourScans, InRows, ViM2Backbone, scan_orders, vim2
from seqlab.models.images.wavemix import (
    ParallelWaveMixing,
    PatchStem,
    ShuffleWaveMixing,
    StridedStem,
    WaveMixing,
    wave_backbone,
    wavemix,
)

__all__ = [
    "METAFORMERS",
    "POOLFORMERS",
    "VIM2S",
    "Conv",
    "ConvTranspose",
    "Downsample",
    "FourScans",
    "IdentityMixing",
    "ImageAttention",
    "ImageBackbone",
    "ImageClassifier",
    "ImageMixer",
    "ImagePyramid",
    "ImageToMap",
    "InRows",
    "MLPHead",
    "MapHead",
    "MapNorm",
    "ParallelWaveMixing",
    "PatchStem",
    "Pooling",
    "RandomMixing",
    "SepConv",
    "ShuffleWaveMixing",
    "SpatialLinear",
    "StarReLU",
    "StridedStem",
    "ViM2Backbone",
    "WaveMixing",
    "baseline",
    "metaformer",
    "poolformer",
    "scan_orders",
    "vim2",
    "wave_backbone",
    "wavemix",
]
