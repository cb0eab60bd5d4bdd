"""Runs that begin with trained weights, and low-rank maps beside frozen ones."""

from functools import partial

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, assert_identical

import seqlab
from seqlab import cli
from seqlab.interop.huggingface import save_pretrained
from seqlab.models import Attention, Full, GatedShortConv, LanguageModel, SwiGLU
from seqlab.models.lora import has_lora, lora, merged
from seqlab.module import count_params, params_of, split, statistics_of
from seqlab.studies.finetune import begin_from
from seqlab.train import config, loop


def small(rngs, **options):
    attention = partial(Attention, heads=2, cache=Full(64))
    mixers = (attention, partial(GatedShortConv, bias=True))
    return LanguageModel(40, 16, 2, mixers, channel_mixer=(SwiGLU, None), rngs=rngs, **options)


def logits(model, tokens):
    static, params = split(model)
    return jax.jit(lambda params: seqlab.merge(static, params)(tokens)[0])(params)


def stirred(model):
    """With random numbers in the second maps, which are 0 in a new model."""
    static, params = split(model)
    for i, name in enumerate(sorted(name for name in params if name.endswith("adapter.up"))):
        params[name] = 0.3 * jax.random.normal(jax.random.key(i), params[name].shape)
    return seqlab.merge(static, params)


def test_a_new_one_is_the_model_and_trains_its_maps_alone():
    tokens = np.arange(24).reshape(2, 12) % 40
    plain, adapted = small(nnx.Rngs(0)), lora(small, rank=2, rngs=nnx.Rngs(0))
    assert_close(logits(adapted, tokens), logits(plain, tokens), 0)
    static, params = split(adapted)
    learnt = set(params) - statistics_of(static)
    assert learnt == {name for name in params if ".adapter." in name} and len(learnt) == 2 * 6
    assert count_params(adapted) < 0.2 * count_params(plain)
    assert {name: params[name].shape for name in params if name not in learnt} == {
        name: leaf.shape for name, leaf in params_of(plain).items()
    }


@pytest.mark.parametrize("scanned", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_merged_weights_are_the_same_function(scanned):
    tokens = np.arange(24).reshape(2, 12) % 40
    adapted = stirred(lora(partial(small, scan_layers=scanned), rank=3, rngs=nnx.Rngs(0)))
    whole = merged(adapted)
    assert not has_lora(whole) and has_lora(adapted) and merged(whole) is whole
    assert_close(logits(whole, tokens), logits(adapted, tokens), 1e-5)
    assert np.abs(np.asarray(logits(adapted, tokens) - logits(small(nnx.Rngs(0)), tokens))).max() > 0.1
    assert statistics_of(split(whole)[0]) == frozenset()


def test_targets_that_are_no_maps_are_refused():
    with pytest.raises(ValueError, match=r"targets: .'query',. names no map of the model, which has"):
        lora(small, targets=("query",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="targets: 'dt_proj' names a map without a low-rank form"):
        lora(small, targets=("dt_proj",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rank must be a positive integer, got 0"):
        lora(small, rank=0, rngs=nnx.Rngs(0))


WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published model of words, and text of them."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("published")
    attention = partial(Attention, heads=2, cache=Full(64))
    save_pretrained(LanguageModel(32, 16, 1, attention, rngs=nnx.Rngs(1)), folder)
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(["<s>", *WORDS])}, unk_token="w0")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    (folder / "text.txt").write_text(" ".join(WORDS[i * i % 30] for i in range(3000)))
    return folder


def run_of(published, rank):
    cfg = config.load("lm_attention")
    for change in (
        *("batch_size=4", "steps=12", "log_every=4", "validate_every=12", "checkpoint_every=12"),
        *("data.length=16", "validation_windows=8", "optimizer.peak=0.05"),
        f"data.paths=('{published / 'text.txt'}',)",
    ):
        cfg = config.override(cfg, change)
    return begin_from(cfg, published, rank)


@pytest.mark.slow
def test_a_run_begins_with_published_weights_and_is_published_again(published, tmp_path):
    cfg = run_of(published, 4)
    experiment = config.build(cfg)
    static, params = loop.build(experiment)
    assert_identical({name: params[name] for name in experiment.start()}, experiment.start())
    result = loop.run(experiment, tmp_path / "run", cfg)
    before, after = seqlab.load(published), seqlab.load(tmp_path / "run")
    assert after.tokenizer.encode("w3 w4").tolist() == [4, 5]
    assert not has_lora(after.model) and after.model.origin == before.model.origin
    moved = {
        name
        for name, leaf in params_of(after.model).items()
        if not np.array_equal(leaf, params_of(before.model)[name])
    }
    block = "backbone.blocks.0."
    maps = ("mixer.qkv", "mixer.out", "channel_mixer.gate_up", "channel_mixer.down")
    assert moved == {f"{block}{name}.weight" for name in maps}, "the frozen weights have not moved"
    static, params = split(seqlab.merge(static, result.state.params))
    tokens = jnp.arange(20)[None] % 30
    assert_close(after.model(tokens)[0], seqlab.merge(static, params)(tokens)[0], 1e-5, "merged")
    save_pretrained(after.model, tmp_path / "out")
    again = seqlab.load(tmp_path / "out")
    assert_identical(params_of(again.model), params_of(after.model))
    assert again.tokenizer.encode("w3").tolist() == [4]


@pytest.mark.slow
def test_the_command_line_fine_tunes_and_resumes(published, tmp_path, capsys):
    settings = {
        "batch_size": 4,
        "steps": 8,
        "data.length": 16,
        "validation_windows": 8,
        "validate_every": 8,
        "checkpoint_every": 4,
        "data.paths": f"('{published / 'text.txt'}',)",
    }
    command = ["train", "lm_attention", "--workdir", str(tmp_path / "a"), "--start", str(published)]
    command += [f"--set={name}={value}" for name, value in settings.items()]
    assert cli.main(command) == 0
    assert cli.main(command) == 0 and "is complete: 8 steps" in capsys.readouterr().err
    second = ["train", "lm_attention", "--workdir", str(tmp_path / "b"), "--lora", "2", *command[6:]]
    assert cli.main([*second, "--start", str(tmp_path / "a")]) == 0, "from a run, which keeps its tokenizer"
    assert seqlab.load(tmp_path / "b").tokenizer.vocab_size == 31
    assert cli.main(["train", "lm_attention", "--lora", "2"]) == 2
    assert "--lora is for --start" in capsys.readouterr().err
    assert cli.main(["train", "lm_attention", "--start", str(tmp_path / "nothing")]) == 2
    assert "is no run, no published model and no GGUF file" in capsys.readouterr().err


def test_other_parameters_are_refused(published):
    cfg = run_of(published, None)
    cfg.model = fdl.copy_with(cfg.model, depth=2)
    with pytest.raises(ValueError, match=r"start: its parameters are not those of the model: it lacks"):
        loop.build(config.build(cfg))
    cfg = run_of(published, None)
    cfg.model.channel_mixer.hidden = 8
    with pytest.raises(ValueError, match=r"start: .*down.weight has shape .*, expected \(8, 16\)"):
        loop.build(config.build(cfg))
