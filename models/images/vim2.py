"""ViM2: images scanned in four directions, channels in two, and learned sums of all earlier outputs (arXiv
2403.19888, first version).

The authors released no code. The token mixer is VMamba's first (arXiv 2401.10166), which their figure shows;
other choices that the text leaves open are noted in place.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from seqlab.checks import UserError, check_choice, check_positive
from seqlab.models.images.metaformer import ImageClassifier
from seqlab.models.images.parts import Conv, Downsample, ImageMixer, Map
from seqlab.models.kinds import make_mixer, make_norm
from seqlab.models.layers import Factory, LayerNorm, Linear
from seqlab.models.state_space.mambamixer import Direction, MambaMixerStack, SelectiveChannelMixer
from seqlab.module import Module

partial = functools.partial


def scan_orders(height: int, width: int) -> Int[np.ndarray, "4 s"]:
    """The four scan orders of a map, as indices of positions counted row by row: along the rows, along the
    columns, and both backwards."""
    rows = np.arange(height * width).reshape(height, width)
    forwards = np.stack([rows.ravel(), rows.T.ravel()])
    return np.concatenate([forwards, forwards[:, ::-1]])


class FourScans(ImageMixer):
    """ViM2's token mixer: one projection, one convolution and one gate; a selection and a scan of its own for
    each of four directions.

        a, z = in_proj(x);  c = silu(conv3x3(a));  y = Σ_k undone_k(scan_k(ordered_k(c)))
        out_proj(norm(y) * silu(z))

    Every position sees every other, at a cost linear in their number; maps may have any size. Only VMamba has
    the norm: `norm=LayerNorm`. Sizes are those of `SelectiveMixer`.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        inner: int | None = None,
        state_size: int = 16,
        dt_rank: int | None = None,
        norm: Factory | None = None,
        rngs: nnx.Rngs,
    ):
        self.dim = check_positive("dim", dim)
        inner = check_positive("expand", expand) * dim if inner is None else check_positive("inner", inner)
        options = {
            "dt_rank": -(-dim // 16) if dt_rank is None else dt_rank,
            "state_size": state_size,
            "conv_width": None,
            "conv_bias": False,
        }
        self.in_proj = Linear(dim, 2 * inner, rngs=rngs)
        self.conv = Conv(inner, inner, 3, padding=1, groups=inner, rngs=rngs)
        self.directions = nnx.List([Direction(inner, **options, rngs=rngs) for _ in range(4)])
        self.norm = None if norm is None else make_norm("norm", norm, inner, rngs=rngs)
        self.out_proj = Linear(inner, dim, rngs=rngs)

    def mix(self, x: Map) -> Map:
        a, z = jnp.split(self.in_proj(x), 2, axis=-1)
        c = jax.nn.silu(self.conv(a))
        y = sum(self._scanned(k, c) for k in range(4))
        return self.out_proj((y if self.norm is None else self.norm(y)) * jax.nn.silu(z))

    def _scanned(self, k: int, c: Map) -> Map:
        """Direction k of `scan_orders` over the map, without gathers: transposes and flips."""
        columns, backwards = k % 2 == 1, k >= 2
        c = c.swapaxes(1, 2) if columns else c
        tokens = c.reshape(c.shape[0], -1, c.shape[-1])
        y, _ = self.directions[k](jnp.flip(tokens, axis=1) if backwards else tokens)
        y = (jnp.flip(y, axis=1) if backwards else y).reshape(c.shape)
        return y.swapaxes(1, 2) if columns else y


class InRows(ImageMixer):
    """A sequence mixer over the positions of a map, row after row.

    `mixer` is called as mixer(dim, rngs=rngs), and with `tokens`, the number of positions, if given: with
    `SelectiveChannelMixer` this is ViM2's channel mixer. (The paper scans the grid in four orders before it;
    they only permute the features of that mixer, which its projections undo.)
    """

    def __init__(self, dim: int, *, mixer: Factory, tokens: int | None = None, rngs: nnx.Rngs):
        self.dim = dim
        sizes = {} if tokens is None else {"tokens": tokens}
        self.mixer = make_mixer("mixer", mixer, dim, rngs=rngs, **sizes)

    def mix(self, x: Map) -> Map:
        y, _ = self.mixer(x.reshape(x.shape[0], -1, x.shape[-1]))
        return y.reshape(x.shape)


_CHANNELS = partial(InRows, mixer=SelectiveChannelMixer)


class ViM2Backbone(Module):
    """The output maps of the stages of ViM2: each stage is a `MambaMixerStack` with its own sums.

    Args:
      widths, depths: of the stages; a depth is that of the stack, one token mixer and one channel mixer each,
        as in the equations. (The paper's table has two token mixers for a channel mixer, which its equations
        do not.)
      image: height and width of the images, required by the paper's channel mixers: their weights belong to
        one number of positions and grow with its square. (At 224 × 224 that does not match the sizes printed
        in the paper.) None for any size.
      token_mixer, channel_mixer: called as token_mixer(width, rngs=rngs) and channel_mixer(width,
        tokens=places, rngs=rngs), without `tokens` if `image` is None: InRows with a `GroupedChannelMixer` is
        a selective mixer of channels for any size.
      stem, down: as in `ImageBackbone`. By default patches of 4 × 4, and merging of 2 × 2 places under a
        norm.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        inputs: int = 3,
        image: tuple[int, int] | None = (224, 224),
        token_mixer: Factory = FourScans,
        channel_mixer: Factory = _CHANNELS,
        stem: Factory | None = None,
        down: Factory | None = None,
        rngs: nnx.Rngs,
    ):
        if len(widths) != len(depths) or not widths:
            raise UserError(f"widths and depths must name the same stages, got {widths} and {depths}")
        self.widths, self.depths = tuple(widths), tuple(depths)
        stem = partial(Downsample, kernel=4, stride=4, padding=0) if stem is None else stem
        down = partial(Downsample, kernel=2, padding=0, before=LayerNorm) if down is None else down
        ways = [stem] + [down] * (len(widths) - 1)
        self.downs = nnx.List(
            [way(a, b, rngs=rngs) for way, a, b in zip(ways, (inputs, *widths[:-1]), widths, strict=True)]
        )
        self.stages = nnx.List()
        shape = None if image is None else (1, *image, inputs)
        for down, dim, depth in zip(self.downs, widths, depths, strict=True):
            channels = channel_mixer
            if image is not None:
                shape = jax.eval_shape(down, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
                channels = partial(channel_mixer, tokens=shape[1] * shape[2])
            self.stages.append(MambaMixerStack(dim, depth, token_mixer, channels, rngs=rngs))

    def __call__(self, images: Float[Array, "b h w d"]) -> list[Map]:
        x, maps = images, []
        for down, stage in zip(self.downs, self.stages, strict=True):
            x, _ = stage(down(x))
            maps.append(x)
        return maps


# size: widths, depths of the channel mixers
VIM2S = {
    "t": ((96, 192, 384, 768), (1, 1, 3, 1)),
    "s": ((96, 192, 384, 768), (1, 1, 9, 1)),
    "b": ((128, 256, 512, 1024), (1, 1, 9, 1)),
}


def vim2(size: str, outputs: int = 1000, *, rngs: nnx.Rngs, **changes: object) -> ImageClassifier:
    """ViM2 with the widths of the paper's "t", "s" or "b"; `changes` override arguments of `ViM2Backbone`."""
    check_choice(size, tuple(VIM2S), "size")
    widths, depths = VIM2S[size]
    backbone = partial(ViM2Backbone, **({"widths": widths, "depths": depths} | changes))
    return ImageClassifier(outputs, backbone, norm=None, rngs=rngs)
