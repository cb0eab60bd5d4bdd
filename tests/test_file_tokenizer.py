"""Published tokenizers: what goes in front of a text, what ends it, and text that streams as it reads as a
whole."""

import json

import numpy as np
import pytest

from seqlab.interop.huggingface import PretrainedError, tokenizer_of
from seqlab.streaming.text import CONTEXT, RowText
from seqlab.tokenizers import FileTokenizer, begin, ends_of

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402

WORDS = ["<s>", "</s>", "<|eot|>", "[P]", "a", "b", "c", "d"]


def words(special=(), processor=None):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="d"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(word, special=True) for word in special])
    if processor:
        numbers = [(word, WORDS.index(word)) for word in ("<s>", "</s>", "[P]")]
        made.post_processor = processors.TemplateProcessing(single=processor, special_tokens=numbers)
    return made


def bytewise():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], show_progress=False)
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["for a in b: for é in €uro"] * 3, trainer)
    return made


def sentencepiece():
    """Of the kind of Llama 2: spaces are ▁, bytes are tokens where nothing else is, the first space is
    cut."""
    pieces = ["<s>", "▁", *(f"<0x{i:02X}>" for i in range(256)), "▁Hello", "▁world", "lo", "Ω"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken("<s>", special=True)])
    return made


@pytest.fixture
def folder(tmp_path):
    """Writes a published folder's files around a tokenizer and reads it."""

    def write(made, config=None, settings=None, **files):
        made.save(str(tmp_path / "tokenizer.json"))
        contents = {"config": {"model_type": "llama"} | (config or {}), "tokenizer_config": settings, **files}
        for name, content in contents.items():
            if content is not None:
                (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tokenizer_of(tmp_path)

    return write


@pytest.mark.parametrize(
    ("processor", "settings", "expected"),
    [
        (None, {}, [4, 5]),  # config.json's bos_token_id says nothing about texts
        ("<s> $A", {}, [0, 4, 5]),
        ("<s> [P] $A", {}, [0, 3, 4, 5]),
        ("<s> $A </s>", {}, [0, 4, 5, 1]),
        (None, {"add_bos_token": True, "bos_token": "<s>"}, [0, 4, 5]),
        (None, {"add_bos_token": True, "bos_token": {"content": "[P]"}}, [3, 4, 5]),
        ("<s> $A", {"add_bos_token": True, "bos_token": "<s>"}, [0, 4, 5]),
        ("<s> $A", {"add_bos_token": False, "bos_token": "<s>"}, [4, 5]),
        (None, {"add_eos_token": True, "eos_token": "</s>"}, [4, 5, 1]),
        (None, {"add_bos_token": True}, [4, 5]),  # no token has that name
    ],
)
def test_the_first_tokens_are_those_of_the_tokenizers_own_files(processor, settings, expected, folder):
    made = folder(words(processor=processor), {"bos_token_id": 7, "eos_token_id": 7}, settings)
    assert begin(made, "a b").tolist() == expected
    assert made.encode("a b").tolist() == [4, 5]
    assert [*made.prefix, 4, 5, *made.suffix] == expected
    assert made.bos == (expected[0] if expected[0] < 4 else None)
    assert begin(made, "").tolist() == ([*made.prefix, *made.suffix] or [7]), (
        "an empty text begins as generate() does"
    )


@pytest.mark.parametrize(
    ("config", "generation", "settings", "ends"),
    [
        ({"eos_token_id": 1}, None, None, {1}),
        ({"eos_token_id": [1, 2]}, None, None, {1, 2}),
        ({"eos_token_id": 1}, {"eos_token_id": [2, 5]}, None, {2, 5}),
        ({"eos_token_id": 1}, {"temperature": 0.6}, None, {1}),
        ({}, None, {"eos_token": "<|eot|>"}, {2}),
        ({"eos_token_id": None}, None, None, set()),
    ],
)
def test_every_end_of_a_text(config, generation, settings, ends, folder):
    assert ends_of(folder(words(), config, settings, generation_config=generation)) == ends


def test_tokens_that_the_settings_add_are_read_and_are_special(folder):
    settings = {
        "added_tokens_decoder": {
            "8": {"content": "<|im_end|>", "special": True, "normalized": False},
            "9": {"content": "<think>", "special": False, "normalized": False},
        },
        "eos_token": "</s>",
        "additional_special_tokens": ["<|eot|>"],
    }
    made = folder(words(), {}, settings)
    assert made.encode("a<|im_end|>b<think> </s>").tolist() == [4, 8, 5, 9, 1]
    assert made.decode([4, 8, 5, 1, 2, 9]) == "a b <think>"
    assert {made.special.get(token) for token in (8, 1, 2, 9, 4)} == {"<|im_end|>", "</s>", "<|eot|>", None}
    assert made.vocab_size == 10
    settings["added_tokens_decoder"] = {"12": {"content": "<new>", "special": True}}
    with pytest.raises(PretrainedError, match=r"token '<new>' is 8 there and 12 in the settings"):
        folder(words(), {}, settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"eos_token_id": "x"}, "eos_token_id: got 'x'"), ({"eos_token_id": [1, -2]}, "eos_token_id: got")],
)
def test_ends_that_are_no_tokens_are_refused(config, message, folder):
    with pytest.raises(PretrainedError, match=message):
        folder(words(), config)


ODD = [
    None,
    True,
    -1,
    1.5,
    "x",
    [],
    {},
    [1],
    {"a": 1},
    {"0": None},
    {"0": {"content": 3}},
    2**70,
    ["a", None],
]


@pytest.mark.parametrize(
    "key",
    ["add_bos_token", "bos_token", "added_tokens_decoder", "additional_special_tokens", "chat_template"],
)
def test_odd_settings_are_read_or_refused_in_one_line(key, folder):
    for value in ODD:
        try:
            begin(folder(words(), {}, {"bos_token": "<s>", key: value}), "a b")
        except PretrainedError as error:
            assert "\n" not in str(error)


def test_a_tokenizer_that_is_none_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer") as error:
        FileTokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


def test_a_file_that_cuts_texts_does_not_cut_prompts(tmp_path):
    made = words()
    made.enable_truncation(2)
    made.enable_padding(length=5)
    made.save(str(tmp_path / "tokenizer.json"))
    assert FileTokenizer(tmp_path / "tokenizer.json").begin("a b c d").tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("make", [words, bytewise, sentencepiece])
def test_pieces_joined_are_the_text_of_all_tokens_wherever_a_stream_is_cut(make, tmp_path):
    made = make()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer, rng = FileTokenizer(tmp_path / "tokenizer.json"), np.random.default_rng(0)
    text = tokenizer.encode("for a in b: é € 漢 😀 Hello world").tolist()
    for case in range(150):
        # The library makes a whole run of byte tokens U+FFFD if one is broken: no stream can know that
        # beforehand.
        least = 258 if make is sentencepiece else 0
        noise = rng.integers(least, tokenizer.vocab_size, rng.integers(1, 40)).tolist()
        tokens = noise if case % 2 else noise[:5] + text + noise[5:]
        cut = int(rng.integers(0, len(tokens) + 1))
        first, second = tokenizer.decoder(), RowText(tokenizer, before=tokens[:cut][-CONTEXT:])
        whole = "".join(map(first.push, tokens)) + first.finish()
        assert whole == tokenizer.decode(tokens)
        before = RowText(tokenizer)
        head = "".join(before.push(token)[0] for token in tokens[:cut])
        rest = "".join(second.push(token)[0] for token in tokens[cut:]) + second.finish()
        assert head + rest == whole


def test_broken_text_is_not_held_back_without_limit(tmp_path):
    bytewise().save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    lead = int(tokenizer.encode("é")[0]) if len(tokenizer.encode("é")) > 1 else int(tokenizer.encode("漢")[0])
    decoder = tokenizer.decoder()
    pieces = [decoder.push(lead) for _ in range(50)]
    assert sum(map(len, pieces)) >= 40
    assert "".join(pieces) + decoder.finish() == tokenizer.decode([lead] * 50)
    assert decoder.push(int(tokenizer.encode("a")[0])) == "a", "as new"
