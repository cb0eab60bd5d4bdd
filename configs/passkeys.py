"""Passkey retrieval in source code: full attention, whose heads DuoAttention can then classify.

Command: seqlab train passkeys && seqlab cache-bench runs/passkeys --fit-gates 200
Measured: 2 min on two busy cores, accuracy 1.000; without the key convolution 0.37 after 1,750 steps of
3,000.
"""

import fiddle as fdl

from seqlab.configs import parts
from seqlab.train.tasks import Passkeys


def base() -> fdl.Config:
    model = parts.token_model(parts.BYTES, 64, 2, parts.attention(128, heads=2, key_conv=4))
    data = fdl.Config(Passkeys, length=128, keys=(16, 16, 8, 4), digits=1, examples=40_000)
    return parts.task_run(model, data, steps=1500, batch_size=32, validate_every=250, validation_windows=200)
