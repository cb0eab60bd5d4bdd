"""Text of streams: a stream continued from its state reads as one, wherever it is cut and whatever ends
it."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Parrot

import seqlab
from seqlab.streaming.text import RowText
from seqlab.tokenizers import ByteTokenizer, FileTokenizer

TEXT = "né→🙂 STOP and ab\xff on it goes"


def read(model, cuts, tokenizer=None, total=40, **options):
    """Text and reason of a stream of `total` tokens that is continued after each of `cuts`."""
    text, made, state = "", 0, None
    for cut in (*cuts, total):
        prompt = [0] if state is None else ()
        options |= {"max_tokens": cut - made, "state": state, "tokenizer": tokenizer, "temperature": 0}
        stream = seqlab.stream_generate(model, prompt, **options)
        tokens = list(stream)
        text += "".join(token.text for token in tokens)
        made, state = made + len(tokens), stream.state
        if tokens and tokens[-1].finished == "stop":
            return text, made, "stop"
    return text, made, "length"


@pytest.mark.parametrize("include_stop", [True, False])
@pytest.mark.parametrize(
    ("stop", "ends"),
    [
        ((), None),
        ("STOP", b"STOP"),
        (["nothing", "🙂 S"], "🙂 S".encode()),
        (b"\xff", b"\xff"),
        (b"\x99\x82 ", b"\x99\x82 "),
        ([list(b"P an")], b"P an"),
        ([ord("b")], b"b"),
    ],
    ids=str,
)
def test_a_stream_continued_from_its_state_reads_as_one(stop, ends, include_stop):
    data = TEXT.encode().replace("ÿ".encode(), b"\xff")
    model, options = Parrot(data), {"stop": stop, "include_stop": include_stop, "total": len(data)}
    whole = read(model, (), **options)
    size = len(data) if ends is None else data.index(ends) + len(ends)
    shown = data[:size] if ends is None or include_stop else data[: size - len(ends)]
    assert whole == (shown.decode(errors="replace"), size, "length" if ends is None else "stop")
    for cut in range(1, size):
        assert read(model, (cut,), **options) == whole
    assert read(model, range(1, size), **options) == whole
    assert read(model, range(3, size, 3), **options | {"block": 2}) == whole


def test_a_rewound_stream_reads_as_if_it_had_come_so_far_only():
    data = "né→🙂 STOP".encode()
    model = Parrot(data)
    options = {"temperature": 0, "stop": "STOP"}
    for include_stop, steps in itertools.product((True, False), (1, 2, 5)):
        options["include_stop"] = include_stop
        stream = seqlab.stream_generate(model, [0], max_tokens=len(data) - 1, **options)
        tokens = list(stream)
        # A parrot is a counter, and counts back.
        back = seqlab.rewind_stream(Counting(data), stream.state, steps)
        again = list(seqlab.stream_generate(model, state=back, **options))
        assert [token.token for token in again] == [*data[len(data) - 1 - steps :]]
        assert again[-1].finished == "stop"
        kept = len(data) - 1 - steps
        early = seqlab.stream_generate(model, [0], max_tokens=kept, **options)
        head = "".join(token.text for token in early)
        whole = head + "".join(token.text for token in again)
        assert whole == ("né→🙂 STOP" if include_stop else "né→🙂 ")
        assert tokens[kept - 1].token == data[kept - 1]


class Counting(Parrot):
    """A parrot whose state can be taken back."""

    def rewind(self, state, steps):
        return state - steps


def test_what_is_withheld_is_text_again_once_it_is_no_stop():
    made = list(
        seqlab.stream_generate(
            Parrot(b"a STO STOP"), [0], stop="STOP", include_stop=False, temperature=0, max_tokens=20
        )
    )
    assert [token.text for token in made] == ["a", " ", "", "", "", "STO ", "", "", "", ""]
    assert made[-1].finished == "stop"


def test_another_stop_than_before_takes_nothing_back_and_gives_nothing_twice():
    model = Parrot(b"one STxtwo")
    first = seqlab.stream_generate(model, [0], max_tokens=6, temperature=0)  # hands out "one ST"
    text = "".join(token.text for token in first)
    rest = seqlab.stream_generate(
        model, state=first.state, max_tokens=4, temperature=0, stop=["STOP", "STx"], include_stop=False
    )
    made = list(rest)
    assert (text, [token.text for token in made], made[-1].finished) == ("one ST", [""], "stop")


def test_a_prompt_begins_a_new_answer_and_ends_the_stop_texts_of_the_last():
    model = Parrot(b"ab STOP cd")
    first = seqlab.stream_generate(model, [0], max_tokens=5, temperature=0)
    assert "".join(token.text for token in first) == "ab ST"
    turn = list(
        seqlab.stream_generate(model, b"ST", state=first.state, max_tokens=3, temperature=0, stop="STOP")
    )
    assert [token.finished for token in turn] == [None, None, "length"], "the prompt is no part of an answer"
    after = seqlab.stream_generate(model, [0], temperature=0, stop="STOP")
    list(after)
    more = list(seqlab.stream_generate(model, state=after.state, max_tokens=9, temperature=0, stop="P cd"))
    assert more[-1].finished == "length", "what has ended a stream is not the beginning of the next stop"


def test_lone_lead_bytes_are_not_held_back():
    for data in (b"\xe2", b"\xc3", b"\xf0\x9f"):
        texts = [t.text for t in seqlab.stream_generate(Parrot(data), [0], max_tokens=60, temperature=0)]
        assert 0 <= 60 - len(data) * sum(map(len, texts)) <= 4


def test_tokens_beyond_the_tokenizer_have_no_text():
    class Wide(Parrot):
        vocab_size = 300

    made = list(seqlab.stream_generate(Wide([104, 299, 105]), [0], max_tokens=3, temperature=0))
    assert [(token.token, token.text) for token in made] == [(104, "h"), (299, ""), (105, "i")]


def file_tokenizer(kind, folder):
    tokenizers = pytest.importorskip("tokenizers")
    decoders, models, pre = tokenizers.decoders, tokenizers.models, tokenizers.pre_tokenizers
    if kind == "byte level":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=["<|end|>"],
            show_progress=False,
            initial_alphabet=pre.ByteLevel.alphabet(),
        )
        made.train_from_iterator(["né→🙂 STOP STOP and so on and on"] * 3, trainer)
    elif kind == "metaspace":
        words = ["<unk>", "<|end|>", "▁né", "→", "▁STOP", "▁and", "▁so", "▁on", "ST", "OP"]
        names = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
        made = tokenizers.Tokenizer(
            models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
        )
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        words = ["[UNK]", "<|end|>", "né", "##→", "ST", "##OP", "and", "so", "on", "##s", "."]
        made = tokenizers.Tokenizer(
            models.WordPiece({name: i for i, name in enumerate(words)}, unk_token="[UNK]")
        )
        made.decoder = decoders.WordPiece()
    made.add_special_tokens(["<|end|>"])
    made.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", ["byte level", "metaspace", "word piece"])
def test_files_of_every_kind_read_as_one_wherever_they_are_cut(kind, tmp_path):
    """The text, the stops and what is withheld of random tokens: in one stream, and cut anywhere."""
    tokenizer, rng = file_tokenizer(kind, tmp_path), np.random.default_rng(0)
    library = tokenizer._tokenizer
    for case in range(120):
        tokens = rng.integers(2 if kind == "metaspace" else 1, tokenizer.vocab_size, 24).tolist()
        if kind == "metaspace":  # words, characters of bytes, and a special token
            tokens = [t if t < 10 else 1 for t in tokens]
            tokens[5:5] = [10 + byte for byte in "🙂é".encode()]
        text = library.decode(tokens, skip_special_tokens=True)
        whole = RowText(tokenizer)
        assert "".join(whole.push(token)[0] for token in tokens) + whole.finish() == text
        stops = [tokenizer.decode(tokens[9:11])[1:4].encode() or b"x", b"<|end|>"]
        withhold = bool(case % 2)
        at_once = cut_text(tokenizer, tokens, (), stops, withhold)
        for cuts in [(int(cut),) for cut in rng.integers(1, 24, 4)] + [tuple(range(1, 24))]:
            assert cut_text(tokenizer, tokens, cuts, stops, withhold) == at_once


def cut_text(tokenizer, tokens, cuts, stops, withhold):
    """The text of `RowText` for `tokens`, recreated after each of `cuts` from the contents of a state."""
    pieces, held = [], 0
    for start, end in itertools.pairwise((0, *cuts, len(tokens))):
        row = RowText(tokenizer, stops, (), withhold, (), tokens[:start], held)
        for token in tokens[start:end]:
            text, ended = row.push(token)
            pieces.append(text)
            if ended:
                return "".join(pieces), "stop"
        held = row.held
    return "".join(pieces) + row.finish(), "end"


def test_a_character_that_the_prompt_began_is_completed():
    half = RowText(ByteTokenizer(), before=[0xC3])
    assert half.push(0xA9) == ("é", False)


def test_a_special_token_is_a_stop_alone_and_within_a_text(tmp_path):
    tokenizer = file_tokenizer("byte level", tmp_path)
    end = tokenizer.special and next(iter(tokenizer.special))
    plain = tokenizer.encode("so").tolist()
    newline = tokenizer.encode("\n").tolist()

    class Wide(Parrot):
        vocab_size = tokenizer.vocab_size

    for stop, size in (("<|end|>", len(plain) + 1), ("<|end|>\n", len(plain) + 2)):
        stream = seqlab.stream_generate(
            Wide([*plain, end, *newline, *plain]),
            [3],
            stop=stop,
            include_stop=False,
            temperature=0,
            tokenizer=tokenizer,
        )
        made = list(stream)
        assert (len(made), made[-1].finished) == (size, "stop")
        assert "".join(token.text for token in made) == "so"


def test_states_carry_their_text_row_by_row(tmp_path):
    model = Parrot("né→🙂".encode())
    stream = seqlab.stream_generate(model, [[0], [0]], max_tokens=[2, 5], temperature=0)
    texts = ["", ""]
    for token in stream:
        texts[token.row] += token.text
    seqlab.save_state(stream.state, tmp_path / "s")
    from seqlab.streaming.generate import stream_state

    state = seqlab.load_state(tmp_path / "s", like=stream_state(model))
    swapped = seqlab.take_rows(state, [1, 0, 1])
    for token in seqlab.stream_generate(model, state=swapped, max_tokens=[5, 8, 5], temperature=0):
        if token.row < 2:
            texts[1 - token.row] += token.text
    assert texts == ["né→🙂", "né→🙂"]
    assert jnp.array_equal(state.length, jnp.asarray([3, 6]))
