"""Full softmax attention trained on windows of 512 bytes: a model for streams longer than its training
length.

Command: seqlab train lm_streaming
Measured: 1.77 validation bits per byte; its streams under several caches are compared in docs/science.md.
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
