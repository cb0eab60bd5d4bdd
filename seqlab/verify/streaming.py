"""The streaming contract, checked: whole = any split into chunks = step by step, for any mixer or model, a
user's own included.

    print(seqlab.verify_streaming(MyMixer(64, rngs=nnx.Rngs(0))))

C1 chunk invariance     outputs, final state and gradients do not depend on how a sequence is split
C2 padding invariance   a step with valid=False does nothing, whatever it holds, NaN included, and outputs 0
C3 reset                reset=True starts a fresh sequence, whatever was before, NaN included: packed
documents
                        = separate documents
C4 constant state       the state's shapes do not depend on what it has seen
C5 device invariance    a sequence split over devices equals one device
C6 row independence     rows can be taken out, put in, forked and replaced without touching their neighbours
C7 no hidden state      a call changes nothing on the module, and fresh states are arrays of their own
"""

import contextlib

import jax
import numpy as np
from jaxtyping import Array

from seqlab.checks import UserError
from seqlab.mixer import Mixer, as_mixer
from seqlab.state import state_bytes
from seqlab.verify import clauses
from seqlab.verify.report import BOUNDS, Check, Report
from seqlab.verify.subject import subject_of


def verify_streaming(
    mixer: Mixer,
    *,
    inputs: Array | None = None,
    length: int = 29,
    batch: int = 3,
    dtype: str | None = None,
    gradients: bool = True,
    bound: float | None = None,
    seed: int = 0,
) -> Report:
    """Check the streaming contract on `mixer`, in evaluation mode, and report.

    Args:
      mixer: anything with the protocol of `seqlab.Mixer`: a mixer of width `mixer.dim`, or a model of
        `mixer.vocab_size` tokens or of numbers in `mixer.inputs` channels. It is not changed.
      inputs: what to run it on, [b, t, d] or tokens [b, t] with b >= 2, t >= 12; random of `batch` and
        `length` by default. For a window W choose lengths beyond 3 W.
      length, batch: of random inputs, in steps and rows.
      dtype: "float32", "bfloat16" or "float64"; a model's own compute dtype by default.
      gradients: also compare gradients through the chain of chunks.
      bound: allowed error relative to scale; by default that of `BOUNDS` for the dtype.
      seed: of random inputs and splits.
    Returns:
      A `Report`: true where every check passed, printed as a table.
    Raises:
      ValueError: inputs, or a dtype, that cannot be checked.
    """
    dtype = dtype or as_mixer(mixer).dtype or "float32"
    if dtype not in BOUNDS:
        raise UserError(f"dtype must be one of {', '.join(BOUNDS)}, got {dtype!r}")
    # Accelerators may take float32 products in fewer bits by default, which is a property of theirs and not
    # of the mixer.
    with (
        jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext(),
        jax.default_matmul_precision("highest"),
    ):
        subject = subject_of(
            mixer, inputs, (batch, length), dtype, BOUNDS[dtype] if bound is None else bound, seed
        )
        checks = clauses.hidden_state(subject)
        if not as_mixer(mixer).causal:
            note = "declares causal = False: only rows are checked"
            checks += [Check("C1", "chunks = whole", None, note=note), *clauses.rows_of_whole(subject)]
        # A state that changes its shape cannot be threaded, and with hidden state nothing repeats.
        elif (constant := clauses.constant_state(subject)).passed and checks[0].passed:
            rng = np.random.default_rng(seed)
            checks += [
                constant,
                *clauses.chunks(subject, rng, gradients),
                *clauses.padding(subject, rng, gradients),
                *clauses.resets(subject),
                *clauses.rows(subject),
            ]
        else:
            checks.append(constant)
        note = "ask seqlab.verify_devices, where there are several"
        checks.append(Check("C5", "devices = one device", None, note=note))
        size = state_bytes(mixer, 1, subject.inputs.dtype if subject.inputs.ndim == 3 else dtype)
    checks.sort(key=lambda check: check.clause)
    return Report(type(mixer).__name__, dtype, subject.inputs.shape[1], size, tuple(checks))
