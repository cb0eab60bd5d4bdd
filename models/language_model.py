"""A language model: token embedding, backbone, logits. Models differ in their mixers."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqlab.checks import check_positive
from seqlab.models.backbone import Backbone
from seqlab.models.layers import Embedding, Factory, Linear, RMSNorm, SwiGLU
from seqlab.models.model import Model, check_dtype
from seqlab.shapes import Activations, Steps, Tokens, accumulator


class LanguageModel(Model):
    """Next-token logits [b, t, vocab] of tokens [b, t]; a mixer over tokens, with the same contract.

    Args:
      mixers, channel_mixer, norm, norms, parallel, branch_scale, scan_layers, remat: as in `Backbone`.
      tie_embeddings: compute logits by the embedding matrix (default) or by a separate one.
      embedding_scale: a factor of the embeddings; sqrt(dim) in Gemma (arXiv 2403.08295).
      logit_scale, logit_softcap: logits are softcap · tanh(scale z / softcap); default: no cap (Gemma 2,
        arXiv 2408.00118).
      dtype: compute dtype of the activations, "float32", "bfloat16" or "float64"; parameters stay float32
        (float64), and so do norms, decays, recurrent states, softmax and logits.
      trained_length: positions that it was or will be trained on: streams in which rotary positions grow
        beyond them say so. None: not known.
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
        norms: str = "before",
        parallel: bool = False,
        branch_scale: float = 1.0,
        tie_embeddings: bool = True,
        embedding_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        dtype: str = "float32",
        scan_layers: bool = False,
        remat: str = "none",
        trained_length: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.vocab_size, self.dtype = vocab_size, check_dtype(dtype)
        if trained_length is not None:
            self.trained_length = check_positive("trained_length", trained_length)
        self.embedding_scale, self.logit_scale = embedding_scale, logit_scale
        self.logit_softcap = logit_softcap
        self.embedding = Embedding(vocab_size, dim, rngs=rngs)
        self.backbone = Backbone(
            dim,
            depth,
            mixers,
            channel_mixer=channel_mixer,
            norm=norm,
            norms=norms,
            parallel=parallel,
            branch_scale=branch_scale,
            scan_layers=scan_layers,
            remat=remat,
            rngs=rngs,
        )
        self.head = None if tie_embeddings else Linear(dim, vocab_size, rngs=rngs)

    def embed(self, tokens: Tokens, valid: Steps | None = None) -> Activations:
        x = self.embedding(tokens).astype(self.dtype)
        return x if self.embedding_scale == 1.0 else x * self.embedding_scale

    def read_out(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits in float32 at least."""
        z = self.embedding.read_out(x) if self.head is None else self.head(x, accumulator(x.dtype))
        z = z if self.logit_scale == 1.0 else z * self.logit_scale
        return z if self.logit_softcap is None else self.logit_softcap * jnp.tanh(z / self.logit_softcap)
