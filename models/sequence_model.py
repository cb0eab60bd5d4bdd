"""A model of numeric sequences: from signals, pixels or measurements to classes, values or forecasts at every
step."""

from flax import nnx
from jaxtyping import Array, Float

from seqlab.checks import check_positive
from seqlab.models.backbone import Backbone
from seqlab.models.layers import Factory, Linear, RMSNorm, SwiGLU
from seqlab.models.model import Model, check_dtype
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import mask_steps


class SequenceModel(Model):
    """Outputs [b, t, outputs] of numbers [b, t, inputs]: a linear map in, a backbone, a linear map out, under
    the same contract.

    An output depends on all steps up to its own: a whole sequence is classified at its last valid step.

    Args:
      inputs, outputs: input channels, and outputs (logits of classes, values) per step.
      mixers, channel_mixer, norm, scan_layers, remat: as in `Backbone`.
      dtype: compute dtype, as in `LanguageModel`; outputs are float32 at least.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dim: int,
        depth: int,
        mixers: Factory | tuple[Factory, ...],
        *,
        channel_mixer: Factory | tuple[Factory | None, ...] | None = SwiGLU,
        norm: Factory = RMSNorm,
        dtype: str = "float32",
        scan_layers: bool = False,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.inputs, self.outputs, self.dtype = (
            check_positive("inputs", inputs),
            check_positive("outputs", outputs),
            check_dtype(dtype),
        )
        self.inlet = Linear(inputs, dim, bias=True, rngs=rngs)
        self.backbone = Backbone(
            dim,
            depth,
            mixers,
            channel_mixer=channel_mixer,
            norm=norm,
            scan_layers=scan_layers,
            remat=remat,
            rngs=rngs,
        )
        # Small: initial predictions are near uniform.
        self.head = Linear(dim, outputs, bias=True, scale=0.1, rngs=rngs)

    def embed(self, inputs: Float[Array, "b t c"], valid: Steps | None = None) -> Activations:
        return self.inlet(mask_steps(inputs, valid).astype(self.dtype))

    def read_out(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        """Outputs in float32 at least, computed in that dtype."""
        return self.head(x.astype(accumulator(x.dtype)))
