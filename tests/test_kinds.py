"""A part of the wrong kind is refused by its place, with the names that fit, and before a run has a
folder."""

import pytest
from flax import nnx

from seqlab import cli
from seqlab.checks import UserError
from seqlab.models import LayerNorm, Mamba, RMSNorm
from seqlab.models.cache import parse_cache
from seqlab.models.kinds import make_mixer, make_norm

NORMS = "Valid: BatchNorm, Identity, LayerNorm, RMSNorm"
IMAGES = "seqlab.models.images"
CASES = [
    ("lm_mamba", ["model.norm=Mamba"], f"model.norm: Mamba is a mixer, expected a norm. {NORMS}"),
    ("lm_mamba", ["model.norm=Linear"], f"model.norm: Linear is no norm, expected a norm. {NORMS}"),
    (
        "lm_mamba",
        ["model.channel_mixer=RMSNorm"],
        "model.channel_mixer: RMSNorm is a norm, expected a mixer. ",
    ),
    (
        "lm_mamba",
        ["model.mixers=(Mamba,LayerNorm)"],
        "model.mixers[1]: LayerNorm is a norm, expected a mixer",
    ),
    (
        "lm_mamba",
        ["model.mixers=Embedding"],
        "model.mixers: Embedding is no mixer, expected a mixer. Valid: LMU",
    ),
    ("lm_mamba", ["model.mixers=:x"], "model.mixers: ':x' cannot be imported"),
    ("lm_mamba", ["model=Mamba"], "model: Mamba is a mixer, expected a model. Valid: TSM2, LMUFormer"),
    ("lm_mamba", ["model=RMSNorm"], "model: RMSNorm is a norm, expected a model"),
    ("lm_mamba", ["loss=os:getcwd"], "loss: getcwd cannot be called as loss(model, batch)"),
    (
        "lm_mamba",
        ["metric=seqlab.train.vision:top1"],
        "metric: it fails on this model and these data (TypeError",
    ),
    ("lm_mamba", ["loss=builtins:divmod"], "loss: it fails on this model and these data (TypeError"),
    ("lm_mamba", ["loss=builtins:max"], "loss: "),
    ("lm_mamba", ["optimizer=Mamba"], "optimizer: seqlab.models.state_space.mamba.Mamba cannot be called"),
    ("lm_mamba", ["data=Text"], "data: 'Text' has no 'train', expected data such as seqlab.train.text:Text"),
    ("lm_mamba", [f"model.mixers={IMAGES}:Pooling"], "loss: reset must be None: Pooling mixes the places"),
    ("lm_mamba", [f"model.norm={IMAGES}:MapNorm"], "loss: it fails on this model and these data (IndexError"),
    ("digits_poolformer", ["model.norm=Mamba"], "model.norm: Mamba is a mixer, expected a norm"),
    ("digits_poolformer", ["model.backbone=Mamba"], "model.backbone: "),
    (
        "digits_vim2",
        ["model.backbone.token_mixer=LayerNorm"],
        "model.backbone.token_mixer: LayerNorm is a norm",
    ),
    ("tsm2", ["model.mixer=RMSNorm"], "model.mixer: RMSNorm is a norm, expected a mixer"),
]


@pytest.mark.parametrize(("config", "changes", "message"), CASES, ids=[" ".join(case[1]) for case in CASES])
def test_parts_of_another_kind_are_refused_before_a_folder_is_made(
    config, changes, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    for n in range(4):
        (tmp_path / "corpus" / f"{n}.txt").write_text(f"line {n} " * 60)
    changes = (
        [*changes, "data.paths=corpus"] if config == "lm_mamba" and changes[0][:5] != "data=" else changes
    )
    assert cli.main(["train", config, "--fiddler", "tiny", "--workdir", "run", "--set", *changes]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"seqlab train: error: {message}"), printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "run").exists()


def test_what_fits_is_made_of_whatever_gives_it():
    rngs = nnx.Rngs(0)

    class Mine(nnx.Module):  # the protocol alone
        causal, lookahead, exact = True, 0, True

        def init_state(self, batch, dtype=None):
            return ()

        def __call__(self, x, state=None, reset=None, valid=None):
            return x, state

    assert type(make_mixer("mixer", lambda dim, rngs: Mine(), 8, rngs=rngs)) is Mine
    assert type(make_mixer("mixer", Mamba, 8, rngs=rngs)) is Mamba
    assert type(make_norm("norm", lambda dim, rngs: LayerNorm(dim), 8, rngs=rngs)) is LayerNorm
    with pytest.raises(UserError, match="norm: Mine is a mixer, expected a norm"):
        make_norm("norm", lambda dim, rngs: Mine(), 8, rngs=rngs)
    with pytest.raises(UserError, match="mixer: RMSNorm is a norm, expected a mixer"):
        make_mixer("mixer", lambda dim, rngs: RMSNorm(dim), 8, rngs=rngs)
    with pytest.raises(UserError, match=r"norm must be the factory of a norm.*got 'RMSNorm'"):
        make_norm("norm", "RMSNorm", 8, rngs=rngs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "seqlab.models:Mamba",
            r"makes no cache \(TypeError: .* missing 1 required positional argument: 'dim'\)",
        ),
        (
            "seqlab.models.cache:Window(x=3)",
            r"makes no cache \(TypeError: .* unexpected keyword argument 'x'",
        ),
        ("os:sep", "makes no cache"),
        ("os:getcwd", "is a str, not a seqlab.models.cache.Policy"),
        ("nowhere:x", "cannot import nowhere:x"),
        ("seqlab.models.cache:Window(open)", "must be literals"),
    ],
)
def test_words_that_name_no_cache_are_refused(words, message):
    with pytest.raises(UserError, match=f"cache: .*{message}"):
        parse_cache(words)
