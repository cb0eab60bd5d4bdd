"""Published models, as transformers wrote them: the same logits, in any chunks, and the same files back.

Each folder of tests/pretrained is a small random model saved by transformers 5.23, with the logits it gave
for some tokens in one pass.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, assert_identical

import seqlab
from seqlab.interop.huggingface import PretrainedError, load_pretrained, save_pretrained
from seqlab.models import Attention, GatedDeltaNet, LanguageModel, Window
from seqlab.module import params_of

FOLDER = pathlib.Path(__file__).parent / "pretrained"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_original_whole_and_in_chunks(name):
    expected = np.load(FOLDER / name / "expected.npz")
    tokens = expected["tokens"]
    model = seqlab.load(FOLDER / name).model
    static, params = seqlab.split(model)
    run = jax.jit(lambda params, x, state: seqlab.merge(static, params)(x, state))
    assert_close(run(params, tokens, None)[0], expected["logits"], 1e-5, "whole")
    state, pieces = model.init_state(len(tokens)), []
    for chunk in (
        tokens[:, :6],
        *np.split(tokens[:, 6:10], 4, axis=1),
        tokens[:, 10:],
    ):  # a prompt, steps, several tokens at once
        logits, state = run(params, chunk, state)
        pieces.append(logits)
    assert_close(np.concatenate(pieces, axis=1), expected["logits"], 1e-5, "in chunks")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
    from safetensors import safe_open

    model, cfg = load_pretrained(FOLDER / name)
    dtype = "bfloat16" if name == "qwen2" else "float32"
    save_pretrained(model, tmp_path, dtype=dtype, shard_bytes=8000 if name == "mistral" else 10**9)
    again, same = load_pretrained(tmp_path)
    assert_identical(params_of(again), params_of(model))
    assert same == cfg

    def tensors(folder):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="flax") as file:
                yield from ((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118

    assert_identical(
        dict(tensors(tmp_path)), dict(tensors(FOLDER / name)), "tensors as in the original files"
    )
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, FOLDER / name))
    differ = {key: (ours[key], theirs[key]) for key in ours if key in theirs and ours[key] != theirs[key]}
    assert set(differ) <= {"max_position_embeddings"}, (
        differ
    )  # a window does not know how long its sequences were
    with pytest.raises(FileExistsError, match="holds a model already"):
        save_pretrained(model, tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type: got 'gpt2', expected one of llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected 'silu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type: got 'yarn', expected 'default', 'linear' or 'llama3'",
        ),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types: got 'chunked_attention', expected",
        ),
    ],
)
def test_what_is_not_computed_is_refused_before_weights_are_read(changes, message, tmp_path):
    described = json.loads((FOLDER / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | changes))
    with pytest.raises(ValueError, match=message):
        seqlab.load(tmp_path)


def test_folders_that_lack_something(tmp_path):
    (tmp_path / "config.json").write_text((FOLDER / "llama" / "config.json").read_text())
    with pytest.raises(PretrainedError, match=r"lacks model\.safetensors"):
        seqlab.load(tmp_path)
    with pytest.raises(ValueError, match="is a published model, which has no steps"):
        seqlab.load(FOLDER / "llama", step=3)
    (tmp_path / "model.safetensors").write_bytes((FOLDER / "mamba" / "model.safetensors").read_bytes())
    with pytest.raises(KeyError, match=r"no tensor model\.layers\.0"):
        seqlab.load(tmp_path)


def test_without_the_network_a_hub_id_says_so(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(
        PretrainedError,
        match=r"nobody/nothing is no folder here and cannot be had from the hub .*no route to host",
    ):
        seqlab.load("nobody/nothing")


@pytest.mark.parametrize(
    "mixer, message",
    [
        (GatedDeltaNet, "no published family here is made of GatedDeltaNet"),
        (
            lambda dim, rngs: Attention(dim, cache=Window(8, sinks=2), rngs=rngs),
            "full caches or plain windows, got Window",
        ),
        (lambda dim, rngs: Attention(dim, sink="zero", rngs=rngs), "sink: no published family has 'zero'"),
    ],
)
def test_models_without_a_published_form_are_not_saved(mixer, message, tmp_path):
    model = nnx.eval_shape(lambda: LanguageModel(11, 32, 1, mixer, rngs=nnx.Rngs(0)))
    with pytest.raises(PretrainedError, match=message):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_published_model_streams_with_its_tokenizer_and_ends_at_its_last_token(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False
    )
    trainer.initial_alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["for a in b: for é in €uro"] * 3, trainer)

    model = LanguageModel(made.get_vocab_size(), 16, 1, Attention, rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"bos_token_id": 0, "eos_token_id": [1]}))
    made.save(str(tmp_path / "tokenizer.json"))

    run = seqlab.load(tmp_path)
    text = "for é in €uro: 漢"
    tokens = run.tokenizer.encode(text)
    assert (run.tokenizer.bos, run.tokenizer.ends) == (None, {1}) and run.tokenizer.vocab_size == len(
        made.get_vocab()
    )
    decoder = run.tokenizer.decoder()
    assert "".join(map(decoder.push, tokens)) + decoder.finish() == run.tokenizer.decode(tokens) == text
    assert decoder.push(int(run.tokenizer.encode("é漢")[-2])) == "", "half a character is not text"
    params = dict(params_of(run.model))
    drawn = [
        token.token
        for token in seqlab.stream_generate(
            run.model, text, max_tokens=3, temperature=0, tokenizer=run.tokenizer
        )
    ]
    head = np.array(params["embedding.weight"])
    head[[1, drawn[0]]] = head[[drawn[0], 1]]  # what was drawn first is now the last token
    static, _ = seqlab.split(run.model)
    ending = seqlab.merge(static, params | {"embedding.weight": jax.numpy.asarray(head)})
    (last,) = seqlab.stream_generate(ending, text, max_tokens=3, temperature=0, tokenizer=run.tokenizer)
    assert (last.token, last.finished, last.text) == (1, "stop", "")
