"""Synthetic tasks: token for token where NumPy or Python fixes the stream, else what must hold of every
example, from its own numbers."""

import random

import numpy as np
import pytest

from seqlab.train.tasks import IGNORE, associative_recall, copying, induction, listops, mqar
from seqlab.train.tasks.listops import TOKENS, bracketed, evaluate
from seqlab.train.tasks.mqar import assemble
from seqlab.train.tasks.recall import next_tokens, vocabulary


def check(case):
    original = case.meta.get("original", "")
    if "multiquery_ar" in original:
        _check_mqar(case)
    elif "copying" in original:
        _check_copying(case)
    elif "generate_induction_head" in original:
        _check_recall(
            case, induction, {"copied": case.meta["induction_len"], "triggers": case.meta["num_triggers"]}
        )
    elif "generate_assoc_recall" in original:
        dots = (
            vocabulary(case.meta["vocab_size"]).index(".") in case.outs["sequence"]
        )  # the original's option is not in every meta
        _check_recall(
            case,
            associative_recall,
            {"keys": case.meta["num_keys"], "allow_dot": case.meta.get("allow_dot", dots)},
        )
    elif "listops" in original:
        _check_listops(case)
    elif "pathfinder" in case.meta.get("repository", ""):
        pytest.skip("seqlab draws no Pathfinder images; the case is a sample of a distribution, not a target")
    else:
        raise AssertionError(f"no adapter for {original or case.meta}")


def _check_mqar(case):
    options = case.meta["kwargs"]
    pairs, length, vocab_size = options["num_kv_pairs"], options["input_seq_len"], options["vocab_size"]
    filled, power = options["random_non_queries"], options.get("power_a", 0.01)
    inputs, labels, gaps = mqar(
        options["seed"],
        options["num_examples"],
        vocab_size=vocab_size,
        length=length,
        pairs=pairs,
        power=power,
        fill=filled,
    )
    case.check("labels", labels, exact=True)
    case.check_all({"gap_slots": np.sort(gaps, axis=1)}, exact=True)
    expected = case.outs["inputs"]
    if filled:  # drawn by torch: in range, and uniform enough to be no constant
        free = assemble(inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2], gaps, length)[0] == 0
        assert expected[free].min() >= 0 and expected[free].max() < vocab_size
        assert inputs[free].min() >= 0 and inputs[free].max() < vocab_size
        assert (
            min(len(np.unique(expected[free])), len(np.unique(inputs[free])))
            > min(vocab_size, free.sum()) / 3
        )
        inputs = np.where(free, expected, inputs)
    case.check("inputs", inputs, exact=True)
    # in their own words: every scored step shows a key, and its label is the value bound to that key
    rows, steps = np.nonzero(case.outs["labels"] != IGNORE)
    assert len(rows) == pairs * len(expected) and (steps >= 2 * pairs).all()
    for row, step in zip(rows, steps, strict=True):
        bound = dict(zip(expected[row, 0 : 2 * pairs : 2], expected[row, 1 : 2 * pairs : 2], strict=True))
        assert bound[expected[row, step]] == case.outs["labels"][row, step]


def _check_copying(case):
    """Torch drew tokens and places. They are read off the inputs; what is made of them has to be the inputs,
    and what was drawn, fair."""
    noise, count, alphabet = (case.meta[name] for name in ("L_noise", "M_memorize", "A_alphabet"))
    inputs, targets = case.outs["inputs"], case.outs["targets"]
    rows, slots = np.nonzero(inputs[:, : noise + count])
    assert (np.bincount(rows, minlength=len(inputs)) == count).all(), (
        "every example holds as many data tokens"
    )
    slots = slots.reshape(len(inputs), count)
    assert case.meta.get("variable") or (slots == np.arange(count)).all()
    tokens = np.take_along_axis(inputs, slots, axis=1)
    assert tokens.min() >= 1 and tokens.max() <= alphabet - 2
    case.check("inputs", copying(tokens, slots, noise=noise, alphabet=alphabet), exact=True)
    case.check("targets", tokens, exact=True)
    assert targets.shape[1] == (inputs == alphabet - 1).sum() / len(inputs), "one marker a target"


def _check_recall(case, generate, options):
    meta = case.meta
    names = vocabulary(meta["vocab_size"])
    assert names == meta.get("vocabulary_in_id_order", names)
    rng = np.random.default_rng(meta["numpy_default_rng_seed"])
    sequences = generate(
        rng,
        len(case.outs["sequence"]),
        vocab_size=meta["vocab_size"],
        length=meta["input_seq_len"],
        **options,
    )
    case.check("sequence", sequences, exact=True)
    scored = options.get("copied", 1)
    case.check_all({"test_labels": next_tokens(sequences, scored).labels}, exact=True)


def _check_listops(case):
    meta, count = case.meta, len(case.outs["tokens"])
    assert meta.get("vocabulary_of_this_file", list(TOKENS)) == list(TOKENS)
    rng = random.Random(meta["python_random_seed"])
    drawn = listops(
        rng, meta["max_depth"], meta["max_args"], meta["min_length_exclusive"], meta["max_length_exclusive"]
    )
    trees = [next(drawn) for _ in range(count)]
    tokens = np.zeros(case.outs["tokens"].shape, np.int64)
    for row, tree in zip(tokens, trees, strict=True):
        row[: len(tree.tokens)] = tree.tokens
    case.check("tokens", tokens, exact=True)
    case.check_all(
        {"lengths": [len(tree.tokens) for tree in trees], "targets": [tree.value for tree in trees]},
        exact=True,
    )
    assert [evaluate(row) for row in case.outs["tokens"]] == [tree.value for tree in trees]
    if "source_with_parens" in case.outs:
        texts = case.outs["source_with_parens"]
        case.check("source_with_parens", [bracketed(tree.tokens) for tree in trees[: len(texts)]], exact=True)
