"""Multi-query associative recall, solved by the gated delta rule: which value was paired with this key?

Command: seqlab train mqar
Measured: 3 min on two busy cores, accuracy 0.9995.
"""

import fiddle as fdl

from seqlab.configs import parts
from seqlab.train.tasks import MQAR


def base() -> fdl.Config:
    data = fdl.Config(MQAR, vocab_size=64, length=64, pairs=8)
    model = parts.token_model(64, 64, 2, parts.gated_delta(heads=2))
    return parts.task_run(
        model, data, peak=5e-3, steps=400, batch_size=64, validate_every=100, validation_windows=500
    )
