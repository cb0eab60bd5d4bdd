"""ListOps with short lists: the value of nested MIN, MAX, MED and SM, read once from left to right.

Command: seqlab train listops
Measured: 5 min on two busy cores, accuracy 0.47 (0.1 is chance).
"""

import fiddle as fdl

from seqlab.configs import parts
from seqlab.models import SwiGLU
from seqlab.train.tasks import ListOps


def base() -> fdl.Config:
    data = fdl.Config(ListOps, length=64, shortest=8, depth=4, arguments=4, examples=20_000)
    model = parts.token_model(16, 64, 4, parts.mamba(), parts.attention(64), channel_mixer=SwiGLU)
    return parts.task_run(model, data, peak=2e-3, steps=600, batch_size=64, validation_windows=1000)
