"""Mamba and windowed attention in turn, a byte language model: recurrence for the gist, attention for the
letter.

Command: seqlab train lm_hybrid
"""

import fiddle as fdl

from seqlab.configs import parts


def base() -> fdl.Config:
    return parts.language_run(
        parts.byte_model(128, 4, parts.mamba(), parts.window_attention(window=64)), steps=600, batch_size=16
    )
