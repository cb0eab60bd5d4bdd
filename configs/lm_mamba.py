"""Mamba, a byte language model: selective state space, without a channel mixer, as published.

Command: seqlab train lm_mamba
"""

import fiddle as fdl

from seqlab.configs import parts


def base() -> fdl.Config:
    return parts.language_run(
        parts.byte_model(160, 6, parts.mamba(), channel_mixer=None), steps=600, batch_size=16
    )
