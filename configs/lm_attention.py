"""Softmax attention, a byte language model: windowed attention with sinks, the baseline.

Command: seqlab train lm_attention
"""

import fiddle as fdl

from seqlab.configs import parts


def base() -> fdl.Config:
    return parts.language_run(
        parts.byte_model(128, 4, parts.window_attention(window=128)), steps=600, batch_size=16
    )
