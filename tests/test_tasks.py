"""Synthetic tasks: what each example promises, that answers can be found from what is shown, and what is
refused."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.tokenizers import TextDecoder
from seqlab.train.data import Batches
from seqlab.train.quality import accuracy, bits_per_token, metric, quality_of
from seqlab.train.step import next_token_loss
from seqlab.train.tasks import (
    IGNORE,
    MQAR,
    AssociativeRecall,
    Copying,
    Digits,
    Examples,
    Induction,
    ListOps,
    Passkeys,
    Symbols,
    haystacks,
    induction,
    listops,
    quiz,
)
from seqlab.train.tasks.listops import TOKENS, bracketed, evaluate

SMALL = {"examples": 60, "held_out": 20}
TASKS = {
    "mqar": MQAR(vocab_size=32, length=32, pairs=5, **SMALL),
    "mqar_filled": MQAR(vocab_size=32, length=32, pairs=5, power=1.0, fill=True, **SMALL),
    "induction": Induction(vocab_size=12, length=21, **SMALL),
    "induction_long": Induction(vocab_size=12, length=23, copied=3, triggers=4, everywhere=True, **SMALL),
    "associative_recall": AssociativeRecall(vocab_size=10, length=14, **SMALL),
    "copying": Copying(length=24, data=4, selective=False, **SMALL),
    "selective_copying": Copying(length=24, data=4, **SMALL),
    "listops": ListOps(length=30, **SMALL),
    "passkeys": Passkeys(length=96, keys=2, **SMALL),
    "passkeys_mixed": Passkeys(length=96, keys=(3, 1), digits=2, **SMALL),
    "digits": Digits(),
}


def solve(name, inputs, step):
    """The answer at `step`, from nothing but the steps up to it."""
    shown = inputs[: step + 1].tolist()
    if name.startswith("mqar"):
        return dict(zip(shown[0:10:2], shown[1:10:2], strict=True))[shown[-1]]
    if name.startswith("induction"):
        copied = 3 if name.endswith("long") else 1
        sign, asked = shown[20], step - 20
        place = shown.index(sign)
        assert shown[-1] == (sign if asked == 0 else shown[place + asked]) and asked < copied
        return shown[place + 1 + asked]
    if name == "associative_recall":
        return dict(zip(shown[0:12:2], shown[1:12:2], strict=True))[shown[-1]]
    if name.startswith("passkeys"):
        shown = bytes(shown)
        asked = shown.rindex(b"<")
        return shown[shown.index(shown[asked:]) + len(shown) - asked]
    if name == "listops":
        return 1 + evaluate(shown)
    marker = shown[-1]
    return [token for token in shown if token not in (0, marker)][shown.count(marker) - 1]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "digits"])
def test_every_answer_follows_from_what_was_shown(name):
    answers = {
        "mqar": 5,
        "mqar_filled": 5,
        "induction_long": 3,
        "copying": 4,
        "selective_copying": 4,
        "passkeys": 8,
    }.get(name, 1)
    for i, item in enumerate(TASKS[name].validation()):
        if name == "passkeys_mixed":
            answers = 2 * (3 if i < 10 else 1)
        assert item["inputs"].dtype == item["targets"].dtype == np.int32
        assert (
            item["inputs"].min() >= 0
            and max(item["inputs"].max(), item["targets"].max()) < TASKS[name].tokenizer.vocab_size
        )
        steps = np.flatnonzero(item["valid"])
        assert len(steps) == answers
        assert [solve(name, item["inputs"], step) for step in steps] == item["targets"][steps].tolist()
        assert not item["targets"][~item["valid"]].any()


@pytest.mark.parametrize("name", TASKS)
def test_data_are_a_function_of_the_seed_and_held_out_data_are_apart(name):
    task = TASKS[name]
    train, again, other, held_out = task.train(3), task.train(3), task.train(4), task.validation()
    assert (len(held_out), task.validation().fingerprint) == (task.held_out, held_out.fingerprint)
    assert train.fingerprint == again.fingerprint != held_out.fingerprint
    assert (train.fingerprint == other.fingerprint) == (name == "digits"), (
        "digits are the same images in another order"
    )
    np.testing.assert_array_equal(train[7]["inputs"], again[7]["inputs"])
    seen = {row.tobytes() for row in train.inputs}
    assert not any(row.tobytes() in seen for row in held_out.inputs)
    batch = Batches(train, 8, seed=0)[5]
    assert {key: value.shape[:2] for key, value in batch.items()} == dict.fromkeys(
        ("inputs", "targets", "valid"), (8, train.labels.shape[1])
    )


def test_induction_is_trained_on_every_token_if_asked():
    train = TASKS["induction_long"].train(0)
    for item in (train[0], train[59]):
        assert item["valid"].all()
        np.testing.assert_array_equal(item["inputs"][1:], item["targets"][:-1])


def test_pass_keys_stand_where_they_are_put_and_are_asked_for_once_each():
    hay = haystacks(np.random.default_rng(0), 3, 60)
    for depth, place in ((0, 1), (0.5, 27), (1, 53)):
        asked = quiz(np.random.default_rng(1), hay, keys=1, depth=depth)
        for row, question, answer, before in zip(*(x.astype(np.uint8) for x in asked), hay, strict=True):
            needle = question[0].tobytes() + answer[0].tobytes()
            assert (
                row.tobytes()
                == before[:place].tobytes() + needle + before[place : 60 - len(needle)].tobytes()
            )
            assert needle[:1] + needle[6:] == b"<>" and needle[2:6].isdigit()
    several = quiz(np.random.default_rng(2), hay, keys=4, digits=3)
    text = bytes(several.joined()[2].astype(np.uint8))
    needles = [text[60 + 6 * i : 66 + 6 * i] for i in range(4)]
    assert len(text) == 84 and all(text.count(needle) == 2 for needle in needles) and len(set(needles)) == 4
    with pytest.raises(
        ValueError, match="haystacks must have at least 64 bytes for keys=9 of 7 bytes, got 60"
    ):
        quiz(np.random.default_rng(0), hay, keys=9)
    with pytest.raises(ValueError, match=r"keys must not exceed the \d+ names that the text leaves, got 27"):
        quiz(np.random.default_rng(0), haystacks(np.random.default_rng(0), 1, 400), keys=27)
    with pytest.raises(ValueError, match="depth must be from 0 to 1, or None, got 2"):
        quiz(np.random.default_rng(0), hay, keys=1, depth=2)


@pytest.mark.parametrize("triggers, copied", [(1, 1), (3, 2), (6, 1)])
def test_induction_repeats_what_stood_behind_every_sign(triggers, copied):
    sequences = induction(
        np.random.default_rng(0), 200, vocab_size=9, length=16, copied=copied, triggers=triggers
    )
    sign = Induction(vocab_size=9, length=16).tokenizer.names.index("=>")
    counts = set()
    for row in sequences:
        places = np.flatnonzero(row == sign)
        assert places[-1] == 16
        assert all((row[place + 1 : place + 1 + copied] == row[17:]).all() for place in places)
        counts.add(len(places) - 1)
    assert counts == set(range(1, min(triggers, max(counts)) + 1)) and max(counts) > triggers / 2


def test_mqar_power_says_how_far_the_queries_stand():
    mean = [
        np.nonzero(MQAR(length=128, pairs=4, power=power, **SMALL).train(0).labels != IGNORE)[1].mean()
        for power in (0.01, 1.0)
    ]
    # Near the 8 steps of the pairs; anywhere from 8 to 128: in the mean 68
    assert mean[0] < 40 < 60 < mean[1] < 76


def test_digits_are_what_scikit_learn_has():
    train, held_out = Digits(held_out=300).train(0), Digits(held_out=300).validation()
    assert len(train) + len(held_out) == 1797
    answers = np.concatenate([data.labels[:, -1] for data in (train, held_out)])
    np.testing.assert_array_equal(np.bincount(answers), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    item = train[0]
    assert item["inputs"].shape == (64, 1) and item["inputs"].dtype == np.float32
    assert 0 <= item["inputs"].min() < item["inputs"].max() <= 1
    assert np.flatnonzero(item["valid"]).tolist() == [63]


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("[MAX 2 9 4 ]", 9),
        ("[MED 1 4 ]", 2),  # 2.5, rounded down
        ("[MED 9 1 4 ]", 4),
        ("[SM 8 9 [MIN 5 3 ] ]", 0),
        ("[SM [MED 1 8 9 2 ] 7 ] <pad> <pad>", 2),
    ],
)
def test_listops_values(text, value):
    tokens = Symbols(TOKENS).encode(text)
    assert evaluate(tokens) == value
    assert Symbols(TOKENS).decode(tokens).strip() == text


def test_listops_brackets_are_the_originals():
    assert (
        bracketed(Symbols(TOKENS).encode("[MAX 4 [SM 1 2 ] ]"))
        == "( ( ( [MAX 4 ) ( ( ( [SM 1 ) 2 ) ] ) ) ] )"
    )


@pytest.mark.parametrize("text", ["", "1 2", "]", "[MAX ]", "[MAX 1", "[MAX 1 ] ]"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError, match="tokens: "):
        evaluate(Symbols(TOKENS).encode(text))


def test_listops_trees_keep_their_bounds():
    trees = listops(random.Random(0), 4, 3, 3, 20)
    drawn = [next(trees) for _ in range(300)]
    assert len(set(drawn)) == 300
    assert all(3 < len(tree.tokens) < 20 and evaluate(tree.tokens) == tree.value for tree in drawn)
    known = set(drawn[:100])
    assert next(listops(random.Random(0), 4, 3, 3, 20, known)) == drawn[100]


def test_symbols_are_a_tokenizer():
    symbols = Induction(vocab_size=13).tokenizer
    assert symbols.names == (".", "0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9", "=>")
    assert symbols.encode("10 => .").tolist() == [3, 12, 0]
    assert isinstance(symbols.decoder(), TextDecoder)
    with pytest.raises(ValueError, match="'x' is no token of this task"):
        symbols.encode("1 x")
    with pytest.raises(ValueError, match="token: got 13, expected 0 to 12"):
        symbols.decode([13])


@pytest.mark.parametrize(
    "task, options, message",
    [
        (
            MQAR,
            {"length": 30, "pairs": 8},
            r"length must be an integer of at least 32 \(4 \* pairs, pairs=8\), got 30",
        ),
        (MQAR, {"length": 33, "pairs": 8}, "length must be even, got 33"),
        (MQAR, {"vocab_size": 17}, "vocab_size must be an integer of at least 18"),
        (MQAR, {"power": 0.0}, "power must be positive"),
        (Induction, {"length": 5, "copied": 2}, "length must be an integer of at least 6"),
        (AssociativeRecall, {"length": 20, "keys": 2}, r"length must be a multiple of keys \+ 1 = 3, got 20"),
        (AssociativeRecall, {"keys": 0}, "keys must be an integer of at least 1"),
        (
            Copying,
            {"length": 10, "data": 8},
            r"length must be an integer of at least 16 \(2 \* data, data=8\), got 10",
        ),
        (Copying, {"alphabet": True}, "alphabet must be an integer of at least 3 .*, got True"),
        (ListOps, {"arguments": 1}, "arguments must be an integer of at least 2"),
        (Passkeys, {"keys": ()}, r"keys must be a number, or several, got \(\)"),
        (Passkeys, {"length": 55}, "length must be an integer of at least 56"),
        (Digits, {"held_out": 1797}, "held_out must leave some"),
    ],
)
def test_tasks_refuse(task, options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ValueError, match=r"only \d+ different ones were found of 5000"):
        Induction(vocab_size=6, length=5).train(0)
    with pytest.raises(ValueError, match="hardly any new expression of 3 to 5 tokens"):
        ListOps(length=6, shortest=2, depth=2, arguments=2, examples=10_000, held_out=10).train(0)
    with pytest.raises(ValueError, match=r"labels must have the shape \(2, 3\) of the inputs, got \(2, 4\)"):
        Examples(np.zeros((2, 3), int), np.zeros((2, 4), int))


def test_metrics_count_what_is_scored():
    def model(inputs, state, reset, valid):
        return jnp.eye(4)[inputs] * 2.0, state  # the likeliest token is the one shown

    batch = {
        "inputs": np.array([[0, 1, 2, 3]]),
        "targets": np.array([[0, 1, 0, 3]]),
        "valid": np.array([[True, False, True, True]]),
    }
    assert [float(x) for x in accuracy(model, batch)] == [2.0, 3.0]
    loss, count = bits_per_token(model, batch)
    right = np.log2(np.exp(2) + 3) - 2 / np.log(2)
    np.testing.assert_allclose([loss, count], [3 * right + 2 / np.log(2), 3], rtol=1e-6)
    assert quality_of(accuracy) == ("accuracy", "accuracy", "higher")
    assert quality_of(accuracy).sentence(0.5) == "accuracy 0.5000"
    assert quality_of(bits_per_token).sentence(1.5) == "1.5000 bits a token"
    assert quality_of(next_token_loss) == ("next_token_loss", "next token loss", "lower")
    with pytest.raises(ValueError, match="better: got 'bigger', expected one of 'higher', 'lower'"):
        metric("x", better="bigger")
