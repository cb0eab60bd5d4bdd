"""Published models, as transformers wrote them: the same logits, in any chunks, and the same files back.

Each folder of tests/pretrained is a small random model saved by transformers 5.23, with the logits it gave
for some tokens in one pass.
"""

import io
import json
import pathlib
import shutil
from functools import partial

import fiddle as fdl
import jax
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, assert_identical

import seqlab
from seqlab import cli
from seqlab.interop.families import model_config, published_config
from seqlab.interop.huggingface import PretrainedError, load_pretrained, save_pretrained
from seqlab.models import MLP, Attention, Full, GatedDeltaNet, LanguageModel, Mamba2, Window
from seqlab.models.attention import with_cache
from seqlab.module import params_of
from seqlab.studies.conversation import Conversation

FOLDER = pathlib.Path(__file__).parent / "pretrained"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())


def in_chunks(run, params, model, tokens, size):
    """Logits of a stream read in chunks of one size, the last one padded."""
    state, pieces, steps = model.init_state(len(tokens)), [], tokens.shape[1]
    for begin in range(0, steps, size):
        chunk = np.zeros((len(tokens), size), np.int32)
        own = tokens[:, begin : begin + size]
        chunk[:, : own.shape[1]] = own
        valid = np.broadcast_to(begin + np.arange(size) < steps, chunk.shape)
        logits, state = run(params, chunk, state, valid)
        pieces.append(np.asarray(logits))
    return np.concatenate(pieces, axis=1)[:, :steps]


def compiled(model):
    static, params = seqlab.split(model)
    return jax.jit(
        lambda params, x, state, valid: seqlab.merge(static, params)(x, state, None, valid)
    ), params


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_a_stream_are_those_of_the_original(name):
    expected = np.load(FOLDER / name / "expected.npz")
    model = seqlab.load(FOLDER / name).model
    streamed = in_chunks(*compiled(model), model, expected["tokens"], 5)
    assert_close(streamed, expected["logits"], 1e-5, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_whole_and_step_by_step(name):
    expected = np.load(FOLDER / name / "expected.npz")
    model = seqlab.load(FOLDER / name).model
    run, params = compiled(model)
    assert_close(run(params, expected["tokens"], None, None)[0], expected["logits"], 1e-5, "whole")
    assert_close(in_chunks(run, params, model, expected["tokens"], 1), expected["logits"], 1e-5, "steps")


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
    given = {key: value for key, value in theirs.items() if value is not None}
    differ = {key: (ours[key], given[key]) for key in ours if key in given and ours[key] != given[key]}
    # The state of a window does not depend on the length of its sequences.
    assert set(differ) <= {"max_position_embeddings"}, differ
    with pytest.raises(FileExistsError, match="holds a model already"):
        save_pretrained(model, tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type: got 'gpt2', expected one of llama, bamba"),
        ({"hidden_act": "quick_gelu"}, "hidden_act: got 'quick_gelu', expected one of 'silu', 'swish'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type: got 'yarn', expected 'default', 'linear' or 'llama3'",
        ),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types: got 'chunked_attention', expected",
        ),
        ({"is_causal": False}, "is_causal: got False, expected True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: got True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the weights are quantized .'fp8'."),
        (
            {"auto_map": {"AutoModel": "modeling.Mine"}},
            "auto_map: the model has code of its own, which is not run",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected .'LlamaForCausalLM'."),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: got 30.0, and no llama has this key"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers: got .1, 0., and no llama has this key"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config: got"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "a llama has full_attention alone"),
        ({"layer_types": ["full_attention"]}, "expected a list of num_hidden_layers=2"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, expected 1.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type: got 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}},
            "beta_fast: got 1, which rope_type",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_parameters: low_freq_factor is missing",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters: full_attention: got",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads: got 0, expected an integer from 1"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers: got 1000000000, expected an integer from 1 to 10000",
        ),
        ({"hidden_size": "16"}, "hidden_size: got '16', expected an integer"),
        ({"rms_norm_eps": {"__float__": "NaN"}}, "rms_norm_eps: got nan, expected a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: got 'yes', expected true or false"),
        ({"num_key_value_heads": 3}, "kv_heads must divide heads"),
    ],
)
def test_what_is_not_computed_is_refused_before_weights_are_read(changes, message, tmp_path):
    described = json.loads((FOLDER / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | changes))
    with pytest.raises(PretrainedError, match=message) as error:
        seqlab.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"hidden_activation": "quick_gelu"}, "hidden_activation: got 'quick_gelu'"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping: got 0, expected a positive"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: got True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: got 50.0, expected None"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "default"}},
            "rope_parameters: got .* expected an object of full_attention and sliding_attention",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
            "rope_type: got 'longrope', expected 'default'",
        ),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "a phi3 has no scaling but 'longrope'"),
        ("phi3", {"partial_rotary_factor": 1.5, "rope_parameters": None}, "got 1.5, expected a number up to"),
        ("gpt_neox", {"hidden_act": "gelu_fast"}, "hidden_act: got 'gelu_fast', expected one of"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: got .1., expected a list of 0 and 1"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv: got 8.0, and no olmo2 has this key"),
        ("granite", {"logits_scaling": 0.0}, "logits_scaling: got 0.0, expected a positive number"),
    ],
)
def test_options_of_a_family_that_are_not_computed_are_refused(family, changes, message):
    described = json.loads((FOLDER / family / "config.json").read_text())
    with pytest.raises(PretrainedError, match=message):
        model_config(described | changes)


def test_the_older_form_of_gemma_3_stands_for_the_same():
    described = json.loads((FOLDER / "gemma3_text" / "config.json").read_text())
    older = {key: value for key, value in described.items() if key not in ("layer_types", "rope_parameters")}
    older |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3}
    older["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    assert model_config(older) == model_config(described)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", {"logit_scale": 0.5}),
        ("granite", {"logit_softcap": 3.0}),
        ("olmo2", {"embedding_scale": 2.0}),
        ("llama", {"norms": "both"}),
        ("gpt_neox", {"channel_mixer": partial(MLP, bias=False)}),
    ],
)
def test_a_model_that_a_family_would_change_is_not_saved_as_one(family, change):
    cfg = model_config(json.loads((FOLDER / family / "config.json").read_text()))
    model = nnx.eval_shape(lambda: fdl.build(fdl.copy_with(cfg, **change))(rngs=nnx.Rngs(0)))
    with pytest.raises(PretrainedError):
        published_config(model)


def layer(changes, family="llama", removed=()):
    """The first layer's mixer of the model that a changed description stands for."""
    described = json.loads((FOLDER / family / "config.json").read_text()) | changes
    cfg = model_config({key: value for key, value in described.items() if key not in removed})
    return nnx.eval_shape(lambda: fdl.build(cfg)(rngs=nnx.Rngs(0))).backbone.blocks[0].mixer


def test_missing_keys_stand_for_what_transformers_takes():
    assert layer({}, removed=["max_position_embeddings"]).cache.capacity == 2048
    assert layer({}, "mistral", ["sliding_window"]).cache == Window(4096)
    assert layer({"sliding_window": None}, "mistral").cache.capacity is not None
    assert layer({}, "qwen3", ["head_dim"]).head_dim == 128
    assert layer({"num_attention_heads": 8}, "mistral", ["num_key_value_heads"]).kv_heads == 8
    assert layer({"num_attention_heads": 8, "num_key_value_heads": None}, "llama").kv_heads == 8
    assert layer({"time_step_limit": [0.0, float("inf")]}, "mamba2").dt_limit == (0.0, float("inf"))
    assert layer({}, "mamba2", ["time_step_limit"]).dt_limit == (0.0, float("inf"))


def test_rope_scaling_stands_for_all_of_rope_parameters():
    parameters = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    scaled = layer(parameters | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    assert (scaled.rotary_scaling.factor, scaled.rotary_base) == (4.0, 1e4)
    assert layer(parameters | {"rope_scaling": None}).rotary_base == 5e5
    scaled = layer(parameters | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 3e5})
    assert (scaled.rotary_scaling.factor, scaled.rotary_base) == (2.0, 3e5)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert layer({"rope_parameters": llama3, "max_position_embeddings": 96}).rotary_scaling[3] == 96


def test_infinity_as_transformers_5_writes_it(tmp_path):
    model = LanguageModel(
        8, 32, 1, partial(Mamba2, head_dim=16, state_size=8), channel_mixer=None, rngs=nnx.Rngs(0)
    )
    save_pretrained(model, tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert seqlab.load(tmp_path).model.backbone.blocks[0].mixer.dt_limit == (0.0, float("inf"))


def header(entries):
    """A safetensors file of this header and four bytes of data."""
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 4


HOSTILE = {
    "empty": b"",
    "short": b"\0" * 7,
    "header beyond the file": (2**62).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "not an object": (2).to_bytes(8, "little") + b"[]",
    "deep": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "offsets beyond": header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
    "offsets backwards": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}),
    "overflow": header({"a": {"dtype": "F32", "shape": [2**63, 2], "data_offsets": [0, 4]}}),
    "negative": header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
    "unknown dtype": header({"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}),
    "quantized": header({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}),
    "integers": header({"a": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_hostile_weights_are_one_line(name, tmp_path):
    (tmp_path / "config.json").write_text((FOLDER / "llama" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(PretrainedError, match=r"model\.safetensors") as error:
        seqlab.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "", "link", 3]
)
def test_a_weight_index_stays_inside_its_folder(name, tmp_path):
    folder, outside = tmp_path / "m", tmp_path / "x.safetensors"
    folder.mkdir()
    outside.write_bytes((FOLDER / "llama" / "model.safetensors").read_bytes())
    (folder / "link").symlink_to(outside)
    (folder / "config.json").write_text((FOLDER / "llama" / "config.json").read_text())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(PretrainedError, match=r"nothing outside the folder is read|must name a file"):
        seqlab.load(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_links_that_leave_the_folder_are_not_followed(name, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(FOLDER / "llama", folder)
    (folder / name).unlink(missing_ok=True)
    (tmp_path / "outside").write_bytes((FOLDER / "llama" / "config.json").read_bytes())
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"leads to .*: nothing outside the folder is read"):
        seqlab.load(folder)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_own_blobs(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (FOLDER / "llama").iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert seqlab.load(snapshot).model.vocab_size == seqlab.load(FOLDER / "llama").model.vocab_size


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "PyTorch's pickle format, which runs code"),
        ("consolidated.safetensors", "Mistral's own names"),
        ("adapter_model.safetensors", "a LoRA adapter alone"),
        ("model-q4.gguf", "a GGUF file"),
    ],
)
def test_other_forms_of_weights_say_what_to_do(name, message, tmp_path):
    (tmp_path / "config.json").write_text((FOLDER / "llama" / "config.json").read_text())
    (tmp_path / name).touch()
    with pytest.raises(PretrainedError, match=rf"lacks model\.safetensors; it holds .*{message}"):
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
        match=r"nobody/nothing is not a local folder and could not be downloaded from the hub .*no route "
        "to host",
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


def test_saving_keeps_tokenizer_ends_and_template(tmp_path):
    first, second = tmp_path / "m", tmp_path / "n"
    shutil.copytree(FOLDER / "qwen3", first)
    described = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps(described | {"bos_token_id": 6, "eos_token_id": [7, 5]}))
    texts = {
        "generation_config.json": '{"eos_token_id": [7, 5]}',
        "tokenizer_config.json": '{"eos_token": "x"}',
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in texts.items():
        (first / name).write_text(text)
    model = seqlab.load(first).model
    static, params = seqlab.split(with_cache(model, "window(8)"))
    save_pretrained(seqlab.merge(static, params), second)
    again = json.loads((second / "config.json").read_text())
    assert (again["bos_token_id"], again["eos_token_id"]) == (6, [7, 5])
    assert {name: (second / name).read_text() for name in texts} == texts
    assert seqlab.load(second).model.origin == model.origin
    with pytest.raises(
        FileExistsError, match=r"holds a model already .chat_template.jinja, config.json, generation"
    ):
        save_pretrained(model, second)


def test_the_dtype_that_a_loaded_model_computes_in():
    tokens = np.load(FOLDER / "llama" / "expected.npz")["tokens"]
    run = seqlab.load(FOLDER / "llama", dtype="bfloat16")
    assert run.model.dtype == run.config.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in params_of(run.model).values()} == {"float32"}
    expected = np.load(FOLDER / "llama" / "expected.npz")["logits"]
    error = np.abs(np.asarray(run.model(tokens)[0], np.float32) - expected).max()
    assert 1e-5 < error < 0.1 * np.abs(expected).max()
    with pytest.raises(ValueError, match="dtype must be 'float32', 'bfloat16' or 'float64', got 'int8'"):
        seqlab.load(FOLDER / "llama", dtype="int8")


def text_model(folder, with_tokenizer):
    """A published folder that reads words, or bytes where it has no tokenizer."""
    attention = partial(Attention, heads=2, head_dim=8, cache=Full(64))
    model = LanguageModel(256, 16, 1, attention, rngs=nnx.Rngs(0))
    save_pretrained(model, folder)
    if with_tokenizer:
        tokenizers = pytest.importorskip("tokenizers")
        words = {word: i for i, word in enumerate(["<s>", *(f"w{i}" for i in range(255))])}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(folder / "tokenizer.json"))
    return model


def nats_of(model, stream, length):
    """Mean cross entropy over windows of a stream, and how many targets there are."""
    total = count = 0
    for begin in range(0, len(stream) - 1, length):
        window = np.asarray(stream[begin : begin + length + 1])
        logits = jax.nn.log_softmax(model(window[None, :-1])[0][0])
        total -= np.asarray(logits)[np.arange(len(window) - 1), window[1:]].sum()
        count += len(window) - 1
    return total / count, count


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_eval_takes_published_models_and_text(with_tokenizer, tmp_path, capsys):
    model = text_model(tmp_path / "m", with_tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 200}" for i in range(90)))
    command = ["eval", str(tmp_path / "m"), "--text", str(text), "--length", "32", "--json"]
    assert cli.main(command) == 0
    record = json.loads(capsys.readouterr().out)
    words, letters = [1 + i * i % 200 for i in range(90)], [0, *text.read_bytes()]
    expected, count = nats_of(model, words if with_tokenizer else letters, 32)
    assert record["targets"] == count == (89 if with_tokenizer else len(letters) - 1)
    assert record["perplexity"] == pytest.approx(np.exp(expected), rel=1e-4)
    assert record["bits_per_token"] == pytest.approx(expected / np.log(2), rel=1e-4)
    assert cli.main([*command, "--set", "data.length=3"]) == 2
    assert "use --text and --length" in capsys.readouterr().err


def test_cache_bench_takes_published_models_and_text(tmp_path, capsys):
    text_model(tmp_path / "m", with_tokenizer=True)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 200}" for i in range(400)))
    sizes = ["--length", "96", "--rows", "2", "--items", "1", "--turns", "1", "--json"]
    command = ["cache-bench", str(tmp_path / "m"), "--text", str(text), "--caches", "full(1024)"]
    assert cli.main([*command, *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["trained"] == 64 and found["settings"]["length"] == 96
    assert sum(found["rows"][0]["targets"]) == 2 * 96 - 0
    assert found["rows"][0]["passkey"] is None, "quizzes are in bytes"


def test_a_folder_without_tokenizer_says_so(tmp_path, capsys):
    shutil.copytree(FOLDER / "llama", tmp_path / "m")
    for command in (["stream"], ["eval"], ["cache-bench"]):
        assert cli.main([*command, str(tmp_path / "m")]) == 2
        error = capsys.readouterr().err
        assert "tokenizer.json" in error and error.count("\n") == 1


def test_what_needs_images_says_so(capsys):
    assert cli.main(["show", str(FOLDER / "llama")]) == 2
    assert "is a published language model, which does not look at images" in capsys.readouterr().err


def test_the_state_of_short_streams_is_small_whatever_the_model_could_read(tmp_path):
    shutil.copytree(FOLDER / "llama", tmp_path / "m")
    described = json.loads((tmp_path / "m" / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (tmp_path / "m" / "config.json").write_text(json.dumps(described))
    model = seqlab.load(tmp_path / "m").model
    stream = seqlab.stream_generate(model, [[1, 2, 3]] * 8, temperature=0, max_tokens=2)
    assert len(list(stream)) == 16
    assert stream.stats["state_bytes"] < 0.05 * seqlab.state_bytes(model, 8)


def test_a_conversation_goes_on_in_one_stream(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jinja2")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<u>", "<a>", *(f"w{i}" for i in range(30))])}
    model = LanguageModel(
        32, 16, 1, partial(Attention, heads=2, cache=Full(64)), tie_embeddings=False, rngs=nnx.Rngs(0)
    )
    save_pretrained(model, tmp_path)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<u>", "<a>"])
    made.save(str(tmp_path / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ '<u> ' if m.role == 'user' else '<a> ' }}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    run = seqlab.load(tmp_path)
    talk = Conversation(run, temperature=0, max_tokens=3)
    first = [token.token for token in talk.say("w5 w6")]
    second = [token.token for token in talk.say("w7")]
    assert talk.stream.stats["prompt_tokens"] == 3, "only what is new is read"
    whole = run.chat(talk.messages[:3]).tolist()
    assert whole == [0, 7, 8, 1, *first, 0, 9, 1]
    again = seqlab.stream_generate(model, [whole], temperature=0, max_tokens=3, tokenizer=run.tokenizer)
    assert second == [token.token for token in again]

    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6\n\nw7\n"))
    assert cli.main(["stream", str(tmp_path), "--chat", "--temperature", "0", "--max-tokens", "3"]) == 0
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert said == [run.tokenizer.decode(first), run.tokenizer.decode(second)]
    one = ["stream", str(tmp_path), "--chat", "--temperature", "0", "--max-tokens", "3", "--prompt", "w5 w6"]
    assert cli.main(one) == 0
    assert capsys.readouterr().out.strip() == said[0]
    assert cli.main(["stream", str(tmp_path), "--system", "x"]) == 2
    assert "--system is for --chat" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variant", [{"norm": "norm_first"}, {"norm_groups": 2}, {"channel_skip": True}, {"ssm_channels": 16}]
)
def test_variants_of_mamba2_that_transformers_lacks_are_not_saved(variant, tmp_path):
    mixer = partial(Mamba2, head_dim=8, state_size=4, **variant)
    model = LanguageModel(16, 16, 1, mixer, channel_mixer=None, rngs=nnx.Rngs(0))
    with pytest.raises(PretrainedError, match=f"{next(iter(variant))}: the published Mamba2"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
