"""Numbers from codes, which XLA fuses with the reading of them where it can, then the attention that runs everywhere."""

from seqlab.kernels.decode_attention.reference import of_numbers


def decode_attention(q, k, v, visible, *, scale):
    """`out, lse`; see `seqlab.kernels.decode_attention`, which has checked the arguments."""
    return of_numbers(q, k, v, visible, scale, "xla")
