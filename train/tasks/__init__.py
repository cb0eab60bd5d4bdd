"""Synthetic tasks that test the memory of sequence models: recall, copying, passkeys, nested arithmetic, and
a small set of images.

Every task is a data source for `train.experiment.Experiment`: `train(seed)` and `validation()` are indexable
windows, the latter the same for every seed. The generators reproduce the originals: exactly where NumPy or
Python fixes the random stream, and in distribution where the original uses another library.

Labels are aligned with predictions: `targets[t]` is the answer at step t, and `valid[t]` whether step t is
scored.
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
