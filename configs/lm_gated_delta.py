"""Gated DeltaNet, a byte language model: a matrix memory a head that forgets, and replaces what a key already
holds.

Command: seqlab train lm_gated_delta
"""

import fiddle as fdl

from seqlab.configs import parts


def base() -> fdl.Config:
    return parts.language_run(parts.byte_model(128, 4, parts.gated_delta()), steps=600, batch_size=16)
