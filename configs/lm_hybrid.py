"""Alternating Mamba and windowed attention, a byte language model: recurrence for the long context, attention
for exact recall of recent steps.

Command: seqlab train lm_hybrid
"""

import fiddle as fdl

from seqlab.configs import parts


def base() -> fdl.Config:
    return parts.language_run(
        parts.byte_model(128, 4, parts.mamba(), parts.window_attention(window=64)), steps=600, batch_size=16
    )
