"""A language model: token embedding, backbone, logits. What is special about a model is in its mixers."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from seqlab.models.backbone import Backbone, unrolled
from seqlab.models.layers import Embedding, Factory, Linear, RMSNorm, SwiGLU
from seqlab.module import Module
from seqlab.shapes import Activations, Steps, Tokens, accumulator
from seqlab.state import State


class LanguageModel(Module):
    """Next-token logits [b, t, vocab] of tokens [b, t]; a mixer over tokens, under the same law.

    Args:
      mixers, channel_mixer, norm, scan_layers, remat: as in `Backbone`.
      tie_embeddings: read logits out through the embedding (default) or through a matrix of their own.
      dtype: compute dtype of the activations, "float32", "bfloat16" or "float64"; parameters stay float32 (float64), and so do norms,
        decays, recurrent states, softmax and logits.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        mixers: Factory | tuple[Factory, ...],
        *,
        channel_mixer: Factory | tuple[Factory | None, ...] | None = SwiGLU,
        norm: Factory = RMSNorm,
        tie_embeddings: bool = True,
        dtype: str = "float32",
        scan_layers: bool = False,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        if dtype not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"dtype must be 'float32', 'bfloat16' or 'float64', got {dtype!r}")
        self.vocab_size, self.dtype = vocab_size, dtype
        self.embedding = Embedding(vocab_size, dim, rngs=rngs)
        self.backbone = Backbone(
            dim, depth, mixers, channel_mixer=channel_mixer, norm=norm, scan_layers=scan_layers, remat=remat, rngs=rngs
        )
        self.head = None if tie_embeddings else Linear(dim, vocab_size, rngs=rngs)

    @property
    def causal(self) -> bool:
        return self.backbone.causal

    @property
    def lookahead(self) -> int:
        return self.backbone.lookahead

    @property
    def exact(self) -> bool:
        return self.backbone.exact

    @property
    def capacity(self) -> int | None:
        return self.backbone.capacity

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike | None = None) -> State:
        return self.backbone.init_state(batch, self.dtype if dtype is None else dtype)

    def __call__(
        self, tokens: Tokens, state: State | None = None, reset: Steps | None = None, valid: Steps | None = None
    ) -> tuple[Float[Array, "b t v"], State | None]:
        x, state = self.features(tokens, state, reset, valid)
        return self.read_out(x), state

    def features(
        self, tokens: Tokens, state: State | None = None, reset: Steps | None = None, valid: Steps | None = None
    ) -> tuple[Activations, State | None]:
        """What the logits are read from: where only some steps' logits are wanted, `read_out` those of their features."""
        return self.backbone(self.embedding(tokens).astype(self.dtype), state, reset, valid)

    def read_out(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits in float32 at least."""
        return self.embedding.read_out(x) if self.head is None else self.head(x).astype(accumulator(x.dtype))

    def unrolled(self) -> "LanguageModel":
        """The same model with one set of parameters a layer, for decoding; itself where it is so already."""
        if not self.backbone.scan_layers:
            return self
        static_copy = nnx.merge(*nnx.split(self))
        static_copy.backbone = unrolled(self.backbone)
        return static_copy
