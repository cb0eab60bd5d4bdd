"""GGUF files: the same logits as the published weights, the tokenizer of the file, and one line for what is
damaged."""

import json
import pathlib

import numpy as np
import pytest

import seqlab
from seqlab.interop.folder import Folder, PretrainedError
from seqlab.interop.gguf import _NAMES

gguf = pytest.importorskip("gguf")
FOLDER = pathlib.Path(__file__).parent / "pretrained"
NAMES = {published: name for name, published in _NAMES.items()}
TOKENS = ["<s>", "</s>", *"abcdefgh", "Ġ", "ab", "Ġab", *"0123456789", *(f"x{i}" for i in range(25))]


def write(path, family="llama", pre="smollm", model="gpt2", drop=(), **more):
    """A small published model as a GGUF file, as llama.cpp's converter writes one."""
    described = Folder(FOLDER / family).json("config.json")
    writer, front = gguf.GGUFWriter(path, family), family + "."
    rope = described.get("rope_parameters") or {}
    numbers = {
        "block_count": described["num_hidden_layers"],
        "context_length": described["max_position_embeddings"],
        "embedding_length": described["hidden_size"],
        "feed_forward_length": described["intermediate_size"],
        "attention.head_count": described["num_attention_heads"],
        "attention.head_count_kv": described["num_key_value_heads"],
        "attention.key_length": described["head_dim"],
        "attention.value_length": described["head_dim"],
        "rope.dimension_count": described["head_dim"],
        "vocab_size": described["vocab_size"],
    }
    for name, value in numbers.items():
        if name not in drop:
            writer.add_uint32(front + name, value)
    writer.add_float32(front + "rope.freq_base", rope.get("rope_theta", 1e4))
    writer.add_float32(front + "attention.layer_norm_rms_epsilon", described["rms_norm_eps"])
    for name, value in more.items():
        writer.add_float32(front + name.replace("__", "."), value)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS[: described["vocab_size"]])
    writer.add_token_types([3, 3, *[1] * (len(TOKENS[: described["vocab_size"]]) - 2)])
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    tensors = Folder(FOLDER / family).tensors()
    for name in tensors:
        value, stem = tensors[name], name.rpartition(".")[0]
        layer = stem.split(".")[2] if ".layers." in stem else None
        short = stem if layer is None else stem.split(".", 3)[3]
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if family == "llama" and short == f"self_attn.{part}":
                halves = value.reshape(described[heads], 2, -1, *value.shape[1:])
                value = halves.swapaxes(1, 2).reshape(value.shape)
        end = name.rpartition(".")[2]
        writer.add_tensor(
            (f"blk.{layer}." if layer else "") + f"{NAMES[short]}.{end}", np.ascontiguousarray(value)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_those_of_the_published_weights(family, tmp_path):
    expected = np.load(FOLDER / family / "expected.npz")
    run = seqlab.load(write(tmp_path / "m.gguf", family))
    assert np.abs(np.asarray(run.model(expected["tokens"])[0]) - expected["logits"]).max() < 1e-5


def test_the_tokenizer_ends_and_template_are_the_files_own_and_are_saved(tmp_path):
    run = seqlab.load(write(tmp_path / "m.gguf"))
    assert run.tokenizer.begin("ab ab42").tolist() == [TOKENS.index(t) for t in ("ab", "Ġab", "4", "2")]
    assert (run.tokenizer.bos, run.tokenizer.ends, run.tokenizer.decode([11, 12, 1])) == (
        None,
        {1, 2},
        "ab ab",
    )
    assert run.chat([{"role": "user", "content": "ab"}]).tolist() == [11]
    seqlab.save_pretrained(run.model, tmp_path / "folder")
    again = seqlab.load(tmp_path / "folder")
    assert again.tokenizer.begin("ab ab42").tolist() == run.tokenizer.begin("ab ab42").tolist()
    assert again.tokenizer.ends == {1, 2} and again.tokenizer.template == run.tokenizer.template
    described = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert described["eos_token_id"] == [1, 2]


def test_a_text_of_llama_3_begins_behind_its_first_token(tmp_path):
    run = seqlab.load(write(tmp_path / "m.gguf", pre="llama-bpe"))
    assert run.tokenizer.begin("ab").tolist() == [0, 11]


def test_another_kind_of_tokenizer_lies_beside_the_file(tmp_path):
    path = write(tmp_path / "m.gguf", model="llama", pre="default")
    with pytest.raises(PretrainedError, match=r"put the model's tokenizer\.json beside it"):
        seqlab.load(path)
    (tmp_path / "tokenizer.json").write_text(seqlab.load(write(tmp_path / "o.gguf")).tokenizer.as_json())
    (tmp_path / "o.gguf").unlink()
    assert seqlab.load(path).tokenizer.encode("ab").tolist() == [11]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention__sliding_window": 8.0},
            r"llama\.attention\.sliding_window: got 8\.0, which is not supported",
        ),
        ({"expert_count": 8.0}, r"llama\.expert_count: got 8\.0"),
        ({"drop": ("embedding_length",)}, "weights|shape|needs"),
    ],
)
def test_what_a_file_asks_for_and_is_not_computed_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        seqlab.load(write(tmp_path / "m.gguf", **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"x" * 200])
def test_a_file_that_is_damaged_is_one_line(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(PretrainedError, match=r"m\.gguf is damaged or no GGUF file") as error:
        seqlab.load(tmp_path / "m.gguf")
    assert "\n" not in str(error.value)


def test_a_file_that_breaks_off_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PretrainedError, match=r"m\.gguf"):
        seqlab.load(path)


def test_a_file_that_is_not_there_and_a_folder_around_one(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        seqlab.load("models/none.gguf")
    write(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="name the GGUF file in it"):
        seqlab.load(tmp_path)
