"""Softmax attention over everything, trained on 512 bytes at a time: the model whose streams outlive what it
has seen.

Command: seqlab train lm_streaming
Measured: 1.77 validation bits a byte; what its streams are worth under which cache is in docs/science.md.
"""

import fiddle as fdl

from seqlab.configs import parts


def base() -> fdl.Config:
    model = parts.byte_model(128, 4, parts.attention(512))
    return parts.language_run(
        model,
        length=512,
        lead=True,
        peak=4e-3,
        steps=1200,
        batch_size=8,
        validate_every=300,
        checkpoint_every=100,
    )
