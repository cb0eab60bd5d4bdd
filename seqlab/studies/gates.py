"""DuoAttention for a run: gates fitted to its model on passkeys, saved in its folder, and the resulting
caches."""

import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from seqlab.checks import UserError, check_at_least, check_positive
from seqlab.mixer import as_mixer
from seqlab.models.cache import duo
from seqlab.models.duo import fit_gates, retrieval_heads
from seqlab.studies import report, runs
from seqlab.tokenizers import ByteTokenizer
from seqlab.train import config
from seqlab.train.metrics import as_json
from seqlab.train.tasks.passkeys import FRAME, digits_of, haystacks, quiz

FILE = "gates.json"


class Gates(NamedTuple):
    """`alpha` [layers, kv heads] of the checkpoint `step`, fitted against `sinks` and a `window` on contexts
    of `length` steps."""

    alpha: list[list[float]]
    step: int
    sinks: int
    window: int
    length: int
    steps: int


def fit(
    workdir: str | os.PathLike[str],
    steps: int,
    *,
    sinks: int = 4,
    window: int | None = None,
    keys: int = 4,
    batch: int = 8,
    trust: bool = False,
) -> Gates:
    """Fit gates to the run in `workdir` by distillation on passkeys in its training text, and save them as
    gates.json.

    Existing gates are returned if they were fitted with the same settings.

    Args:
      window: the window of a streaming head, besides the sinks; an eighth of the trained length by default.
      trust: as in `runs.load`.
    Raises:
      ValueError: a model that does not read bytes, or with mixers other than attention; existing gates with
        other settings.
    """
    for name, value in {"steps": steps, "keys": keys, "batch": batch}.items():
        check_positive(f"gates: {name}", value)
    check_at_least("gates: sinks", sinks, 0)
    if window is not None:
        check_positive("gates: window", window)
    trained = runs.load(workdir, trust=trust)
    model = as_mixer(trained.model).unrolled()
    if not isinstance(trained.tokenizer, ByteTokenizer):
        raise runs.RunError(f"{workdir} does not read bytes: gates are fitted on pass keys in text")
    data = config.build(trained.config).data
    digits = digits_of(data)
    turns = keys * (digits + FRAME)
    length = max(data.length, 2 * turns + 1)
    window = max(8, length // 8 - sinks) if window is None else window
    file = pathlib.Path(workdir) / FILE
    known = load(workdir, trained.step)
    if known is not None:
        asked = {"sinks": sinks, "window": window, "steps": steps}
        lines = [
            f"\n  {name}: {getattr(known, name)} -> {value}"
            for name, value in asked.items()
            if getattr(known, name) != value
        ]
        if lines:
            raise runs.RunError(
                f"{file} holds gates that were fitted otherwise (saved -> given):{''.join(lines)}"
            )
        return known
    rng = np.random.default_rng(0)
    hay = haystacks(rng, steps * batch, length - turns, getattr(data, "paths", ()))
    tokens = quiz(rng, hay, keys=keys, digits=digits).joined().reshape(steps, batch, length)
    labels = jnp.broadcast_to(jnp.arange(length) >= length - turns, (batch, length))
    alpha, _ = fit_gates(
        model, lambda step: (jnp.asarray(tokens[step]), labels), steps=steps, sinks=sinks, window=window
    )
    found = Gates(np.asarray(alpha, np.float64).round(6).tolist(), trained.step, sinks, window, length, steps)
    report.write(file, as_json(found._asdict(), indent=1) + "\n")
    return found


def load(workdir: str | os.PathLike[str], step: int) -> Gates | None:
    """The gates of the run in `workdir`; None if missing or of another checkpoint."""
    file = pathlib.Path(workdir) / FILE
    found = Gates(**json.loads(file.read_text())) if file.exists() else None
    return found if found is not None and found.step == step else None


def policies(spec: str, fitted: Gates | None, capacity: int) -> list[Any]:
    """`duo(0.75)`: one cache per layer, in which the share 0.75 of all heads, those with the smallest gates,
    are streaming heads.

    Raises:
      ValueError: a spec of another form, or no gates.
    """
    found = re.fullmatch(r"duo\((\d*\.?\d+)\)", spec)
    if found is None:
        raise UserError(
            f"cache: {spec!r} must be duo(s), s the share of the heads that stream, such as duo(0.75)"
        )
    if fitted is None:
        raise UserError(
            f"cache: {spec} needs gates, and none were fitted to this checkpoint: seqlab cache-bench "
            "--fit-gates STEPS"
        )
    heads = retrieval_heads(jnp.asarray(fitted.alpha), float(found.group(1)))
    return [duo(row, capacity=capacity, sinks=fitted.sinks, window=fitted.window) for row in heads]
