"""Gated linear attention, a byte language model: one matrix memory per head instead of a cache.

Command: seqlab train lm_gated_linear
"""

import fiddle as fdl

from seqlab.configs import parts


def base() -> fdl.Config:
    return parts.language_run(parts.byte_model(128, 4, parts.gated_linear()), steps=600, batch_size=16)
