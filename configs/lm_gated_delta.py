"""Gated DeltaNet, a byte language model: one matrix memory per head that decays and replaces values stored
under a key.

Command: seqlab train lm_gated_delta
"""

import fiddle as fdl

from seqlab.configs import parts


def base() -> fdl.Config:
    return parts.language_run(parts.byte_model(128, 4, parts.gated_delta()), steps=600, batch_size=16)
