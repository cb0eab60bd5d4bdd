"""TSM2: forecasting many series at once by selection along time and along variates (arXiv 2403.19888, first
version).

Every variate is cut into patches of P steps, one every S steps; a patch becomes a vector, so there are tokens
[b, n, m, d] for n patches of m variates. A `MambaMixerStack` mixes them: its token mixer scans the patches of
a variate forwards, its channel mixer scans the variates of a patch in both directions. One linear map, shared
by all variates, computes the forecast of a variate from its last n tokens.

`TSM2` is the published form, from a window to a forecast. Its norm uses statistics over time, so it cannot
stream. `StreamingTSM2` satisfies the streaming contract: the same layers, with statistics of the past only.
The paper's static and future covariates are left out.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from seqlab.checks import UserError, check_choice, check_positive
from seqlab.models.kinds import make_mixer
from seqlab.models.layers import Factory, Linear
from seqlab.models.state_space.mambamixer import MambaMixerStack, SelectiveMixer, within_steps
from seqlab.module import Module
from seqlab.shapes import Steps, accumulator
from seqlab.state import State

Series = Float[Array, "b t m"]
Forecast = Float[Array, "b h m"]
VariateTokens = Float[Array, "b n m d"]

EPSILON = 1e-5  # of the variance of a series, as in RevIN


class VariateNorm(Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the axes of [b, n, m, d] selected by `over`,
    separately for every other index.

    "time" is the paper's 2D norm: statistics over patches and variates together, per channel of the
    embedding, and affine weights [n, m] (eps as in TSMixer's code). It needs all n patches at once. "step"
    uses statistics over the variates and channels of one patch, with affine weights [m, d], and streams.
    """

    def __init__(
        self,
        dim: int,
        *,
        variates: int,
        patches: int,
        over: str,
        eps: float = 1e-3,
        rngs: nnx.Rngs | None = None,
    ):
        check_choice(over, ("time", "step"), "over")
        shape = (patches, variates) if over == "time" else (variates, dim)
        self.scale, self.bias = nnx.Param(jnp.ones(shape)), nnx.Param(jnp.zeros(shape))
        self.over, self.eps = over, eps

    def __call__(self, x: VariateTokens) -> VariateTokens:
        wide = x.astype(accumulator(x.dtype))
        axes = (1, 2) if self.over == "time" else (2, 3)
        centred = wide - jnp.mean(wide, axis=axes, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=axes, keepdims=True) + self.eps)
        scale, bias = (
            (p[..., None] if self.over == "time" else p[...]).astype(wide.dtype)
            for p in (self.scale, self.bias)
        )
        return (y * scale + bias).astype(x.dtype)


class TimeMixer(Module):
    """A causal `SelectiveMixer` along the patches of each variate; all variates share its weights. States
    have rows first."""

    causal, lookahead, exact = True, 0, True

    def __init__(self, dim: int, *, variates: int, mixer: Factory, rngs: nnx.Rngs):
        self.variates = variates
        self.mixer = make_mixer("mixer", mixer, dim, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> State:
        state = self.mixer.init_state(batch * self.variates, dtype)
        return jax.tree.map(lambda leaf: leaf.reshape(batch, self.variates, *leaf.shape[1:]), state)

    def __call__(
        self,
        x: VariateTokens,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[VariateTokens, State | None]:
        m = x.shape[2]
        reset, valid = (None if flag is None else jnp.repeat(flag, m, axis=0) for flag in (reset, valid))
        state = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), state)
        y, state = self.mixer(rearrange(x, "b n m d -> (b m) n d"), state, reset, valid)
        state = jax.tree.map(lambda leaf: leaf.reshape(-1, m, *leaf.shape[1:]), state)
        return rearrange(y, "(b m) n d -> b n m d", m=m), state


class VariateMixer(Module):
    """A `SelectiveMixer` in both directions along the variates of every patch: pointwise in time, it has no
    state."""

    causal, lookahead, exact = True, 0, True

    def __init__(self, dim: int, *, mixer: Factory, rngs: nnx.Rngs):
        self.mixer = make_mixer("mixer", mixer, dim, bidirectional=True, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[()]:
        return ()

    def __call__(
        self,
        x: VariateTokens,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[VariateTokens, State | None]:
        return within_steps(self.mixer, x, valid), state


class Forecaster(Module):
    """The common base of both forms: from patches to forecasts. Abstract."""

    exact, lookahead = True, 0

    def __init__(
        self,
        variates: int,
        length: int,
        horizon: int,
        *,
        patch: int,
        stride: int,
        dim: int,
        depth: int,
        mixer: Factory,
        norm: str,
        final_sum: bool,
        rngs: nnx.Rngs,
    ):
        self.variates, self.length, self.horizon = (
            check_positive("variates", variates),
            check_positive("length", length),
            check_positive("horizon", horizon),
        )
        self.patch, self.stride, self.width = (
            check_positive("patch", patch),
            check_positive("stride", stride),
            check_positive("dim", dim),
        )
        if patch > length:
            raise UserError(f"patch must be at most length={length}, got {patch}")
        if stride > patch:
            raise UserError(
                f"stride must be at most patch={patch}, or steps between patches are never read, got {stride}"
            )
        self.patches = (length - patch) // stride + 1
        self.embed = Linear(patch, dim, bias=True, rngs=rngs)
        self.stack = MambaMixerStack(
            dim,
            depth,
            functools.partial(TimeMixer, variates=variates, mixer=mixer),
            functools.partial(VariateMixer, mixer=mixer),
            functools.partial(VariateNorm, variates=variates, patches=self.patches, over=norm),
            final_sum=final_sum,
            rngs=rngs,
        )
        self.head = Linear(self.patches * dim, horizon, bias=True, rngs=rngs)

    def check(self, x: Series) -> None:
        if x.ndim != 3 or x.shape[2] != self.variates or not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(
                f"x must be a floating-point array [b, t, m] with m = variates = {self.variates}, got "
                f"{x.dtype}{x.shape}"
            )

    def cut(self, x: Series) -> Float[Array, "b n m p"]:
        """All complete patches of x, from its first step on."""
        starts = jnp.arange((x.shape[1] - self.patch) // self.stride + 1) * self.stride
        return x[:, starts[:, None] + jnp.arange(self.patch)].swapaxes(2, 3)

    def read(self, tokens: Float[Array, "*b n m d"]) -> Float[Array, "*b h m"]:
        """The forecast from the last n tokens of every variate."""
        return self.head(rearrange(tokens, "... n m d -> ... m (n d)")).swapaxes(-1, -2)


class TSM2(Forecaster):
    """The published form: `model(x)` maps a window [b, length, m] to its forecast [b, horizon, m], and so
    does `model.forecast(x)`.

    Args:
      variates, length, horizon: m series, the steps of a window, and the steps to forecast.
      patch, stride: P and S. n = floor((length - P) / S) + 1 patches; where S does not divide length - P,
        some steps are not read: the oldest with align="end", the newest with align="start", as frameworks'
          unfold functions do.
      dim, depth: width of a token, and blocks.
      mixer: a `SelectiveMixer` with other sizes, called as mixer(dim, rngs=rngs), with bidirectional=True for
        the variates.
      reversible: subtract every variate's mean over the window and divide by its standard deviation, undone
        on the forecast (RevIN, without its affine map). Not in the paper, but standard in later forecasters.
      final_sum: see `MambaMixerStack`; the paper's equations do not have it.

    Not causal: norm and RevIN look at the whole window.

    Raises:
      ValueError: an impossible size, or a window of another shape.

    Source: TSM2 in MambaMixer (arXiv 2403.19888 v1); RevIN (Kim et al., ICLR 2022).
    """

    causal = False

    def __init__(
        self,
        variates: int,
        length: int,
        horizon: int,
        *,
        patch: int = 16,
        stride: int = 8,
        dim: int = 32,
        depth: int = 2,
        mixer: Factory = SelectiveMixer,
        reversible: bool = True,
        final_sum: bool = True,
        align: str = "end",
        rngs: nnx.Rngs,
    ):
        sizes = {"patch": patch, "stride": stride, "dim": dim, "depth": depth}
        super().__init__(
            variates, length, horizon, **sizes, mixer=mixer, norm="time", final_sum=final_sum, rngs=rngs
        )
        check_choice(align, ("start", "end"), "align")
        self.reversible, self.align = reversible, align

    def __call__(self, x: Float[Array, "b length m"]) -> Forecast:
        self.check(x)
        if x.shape[1] != self.length:
            raise UserError(f"x must have length={self.length} steps, got {x.shape[1]}")
        mean, deviation = _statistics(x) if self.reversible else (0.0, 1.0)
        unread = (self.length - self.patch) % self.stride if self.align == "end" else 0
        tokens, _ = self.stack(self.embed(self.cut(((x - mean) / deviation)[:, unread:])))
        return self.read(tokens) * deviation + mean

    def forecast(self, x: Float[Array, "b length m"]) -> Forecast:
        """The same as the call; both forms have this method."""
        return self(x)


def _statistics(x: Series) -> tuple[Float[Array, "b 1 m"], Float[Array, "b 1 m"]]:
    """Mean and standard deviation of every variate over its window, in float32 at least."""
    wide = x.astype(accumulator(x.dtype))
    mean = jnp.mean(wide, axis=1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(wide - mean), axis=1, keepdims=True) + EPSILON)
    return mean.astype(x.dtype), deviation.astype(x.dtype)
