"""Gated linear attention and windowed attention in turn: a byte language model that trains in minutes and then streams for ever.

Command: seqlab train demo && seqlab stream runs/demo
"""

import fiddle as fdl

from seqlab.configs import parts


def base() -> fdl.Config:
    model = parts.byte_model(128, 4, parts.gated_linear(), parts.window_attention(window=64))
    return parts.language_run(model, steps=600, batch_size=16)
