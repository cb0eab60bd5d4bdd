"""Pass keys hidden in source code and asked for by name: attention over everything, whose heads can then be told apart by DuoAttention.

Command: seqlab train passkeys && seqlab cache-bench runs/passkeys --fit-gates 200
"""

import fiddle as fdl

from seqlab.configs import parts
from seqlab.train.tasks import Passkeys


def base() -> fdl.Config:
    model = parts.token_model(parts.BYTES, 64, 3, parts.attention(256))
    data = fdl.Config(Passkeys, length=256, keys=8, examples=40_000)
    return parts.task_run(model, data, steps=1000, batch_size=32, validate_every=200, validation_windows=200)
