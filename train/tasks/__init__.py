"""Synthetic tasks that show what a sequence model can remember: recall, copying, pass keys, nested
arithmetic, and one small set of images.

Every task is a value for `train.experiment.Experiment`: `train(seed)` and `validation()` are windows by
number, the latter the same for
every seed. The functions behind them draw what the originals draw: number for number where NumPy or Python
fixes the stream of random numbers, and from the same distribution where the original asks another library.

Labels stand where they are to be predicted: `targets[t]` is the answer at step t, `valid[t]` says whether
step t is scored.
"""

from seqlab.train.tasks.copying import Copying, copying
from seqlab.train.tasks.digits import Digits
from seqlab.train.tasks.examples import IGNORE, Examples, Symbols
from seqlab.train.tasks.listops import ListOps, listops
from seqlab.train.tasks.mqar import MQAR, mqar
from seqlab.train.tasks.passkeys import Passkeys, Quiz, haystacks, quiz
from seqlab.train.tasks.recall import AssociativeRecall, Induction, associative_recall, induction

__all__ = [
    "IGNORE",
    "MQAR",
    "AssociativeRecall",
    "Copying",
    "Digits",
    "Examples",
    "Induction",
    "ListOps",
    "Passkeys",
    "Quiz",
    "Symbols",
    "associative_recall",
    "copying",
    "haystacks",
    "induction",
    "listops",
    "mqar",
    "quiz",
]
