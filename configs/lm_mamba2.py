"""Mamba-2, a byte language model: a scan by matrix products, without a channel mixer, as published.

Command: seqlab train lm_mamba2
"""

import fiddle as fdl

from seqlab.configs import parts


def base() -> fdl.Config:
    return parts.language_run(
        parts.byte_model(160, 6, parts.mamba2(), channel_mixer=None), steps=600, batch_size=16
    )
