"""Bytes as tokens: nothing is lost, and streamed text is the text of the whole."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqlab.tokenizers import ByteTokenizer, TextDecoder, Tokenizer

bytewise = ByteTokenizer()


def streamed(tokens):
    decoder = bytewise.decoder()
    return [decoder.push(token) for token in tokens] + [decoder.finish()]


def test_tokens_are_the_bytes_of_utf8():
    tokens = bytewise.encode("né\x00€")
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [0x6E, 0xC3, 0xA9, 0x00, 0xE2, 0x82, 0xAC]
    assert bytewise.encode(b"\xff\x00").tolist() == [255, 0]
    assert bytewise.encode("").tolist() == []
    assert (bytewise.vocab_size, bytewise.bos) == (256, 0)


def test_they_satisfy_the_protocols():
    assert isinstance(bytewise, Tokenizer)
    assert isinstance(bytewise.decoder(), TextDecoder)


@given(st.text())
def test_decode_inverts_encode(text):
    assert bytewise.decode(bytewise.encode(text)) == text
    assert bytewise.decode(bytewise.encode(text.encode())) == text


def test_a_character_comes_out_with_its_last_byte():
    assert streamed(bytewise.encode("a😀€b")) == ["a", "", "", "", "😀", "", "", "€", "b", ""]


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        (b"\xffa", ["�", "a", ""]),  # never a first byte
        (b"\xe2\x82a", ["", "", "�a", ""]),  # a character broken off by another
        (b"a\xf0\x9f", ["a", "", "", "�"]),  # and by the end of the stream
        (b"\xc0\x80", ["�", "�", ""]),  # overlong zero
        (b"\xed\xa0\x80", ["", "", "���", ""]),  # half a surrogate pair
    ],
)
def test_broken_bytes_become_replacement_characters(data, pieces):
    assert streamed(data) == pieces


@given(st.binary())
def test_the_pieces_joined_are_the_whole(data):
    assert "".join(streamed(data)) == bytewise.decode(data) == data.decode("utf-8", errors="replace")


def test_finish_leaves_a_new_decoder():
    decoder = bytewise.decoder()
    assert decoder.push(0xE2) == ""
    assert decoder.finish() == "�"
    assert [decoder.push(token) for token in bytewise.encode("é")] == ["", "é"]
    assert decoder.finish() == ""


@pytest.mark.parametrize("token", [-1, 256, 50_000])
def test_other_tokens_are_refused(token):
    with pytest.raises(ValueError, match=f"token: got {token}, expected a byte"):
        bytewise.decoder().push(token)
    with pytest.raises(ValueError, match=f"token: got {token}, expected a byte"):
        bytewise.decode([97, token])


def test_importing_it_imports_no_jax():
    code = "import sys, seqlab.tokenizers; assert 'jax' not in sys.modules, 'jax was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parent.parent)
