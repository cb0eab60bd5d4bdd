"""Configs: every one is built, saved, shrunk and stepped; what a user can get wrong is refused before work
starts."""

import dataclasses
import json
import pathlib
import re
import sys

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_identical

from seqlab import configs
from seqlab.configs import parts
from seqlab.models import Attention, GatedLinearAttention, LanguageModel, Mamba, Window
from seqlab.module import params_of
from seqlab.train import config
from seqlab.train.config import ConfigError
from seqlab.train.data import ArraySource, Batches
from seqlab.train.experiment import Experiment
from seqlab.train.forecast import forecast_loss
from seqlab.train.loop import build as initialise
from seqlab.train.optim import named
from seqlab.train.override import check, children
from seqlab.train.step import init_state, train_step
from seqlab.train.text import Text, TfdsText
from seqlab.train.vision import picture_loss

NAMES = config.names()


@pytest.fixture
def cfg():
    return config.load("demo")


def test_all_files_are_found():
    files = {path.stem for folder in configs.__path__ for path in pathlib.Path(folder).glob("[!_]*.py")}
    assert set(NAMES) == files - {"parts", "fiddlers"}
    assert {"demo", "lm_attention", "lm_gated_linear", "lm_hybrid", "lm_mamba"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_built_and_survives_json(name):
    cfg = config.load(name)
    experiment = config.build(cfg)
    again = config.from_json(config.to_json(cfg), trust=True)
    assert config.flat(again) == config.flat(cfg)
    assert config.diff(cfg, again) == []
    factories = {"model": None, "optimizer": None, "loss": None}  # equal ones are not the same
    assert dataclasses.replace(config.build(again), **factories) == dataclasses.replace(
        experiment, **factories
    )
    # modules are factories: a Config of a module would be built once, and shared by all layers
    nodes = [cfg]
    while nodes:
        node = nodes.pop()
        if isinstance(node, fdl.Config):
            assert not issubclass(fdl.get_callable(node), nnx.Module)
        nodes += [value for _, value in children(node)]


def batch_of(experiment):
    """The first batch of a task; random bytes in place of text, which takes long to read."""
    if not isinstance(experiment.data, Text):
        return Batches(experiment.data.train(0), experiment.batch_size, 0)[0]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (experiment.batch_size, experiment.data.length + 1), dtype=np.int32)
    reset = rng.random(tokens[:, :-1].shape) < 0.1
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "reset": reset, "valid": np.ones_like(reset)}


# One of each kind of model and of data; all of them are built above, and stepped among the slow tests.
STEPPED = ("demo", "lm_hybrid", "tsm2", "digits", "digits_upscale", "mqar")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in STEPPED)) for name in NAMES]
)
def test_a_config_is_shrunk_and_stepped_twice(name):
    experiment = config.build(config.fiddle(config.load(name), "tiny"))
    static, params = initialise(experiment)
    optimizer = experiment.optimizer(experiment.steps)
    state = init_state(static, params, optimizer)
    step = jax.jit(
        lambda state, batch: train_step(
            static, optimizer, experiment.loss, experiment.accumulate, state, batch
        )
    )
    batch = batch_of(experiment)
    losses = []
    for _ in range(2):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        assert metrics.finite
    model = nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0)))
    if experiment.loss not in (forecast_loss, picture_loss):
        guess = np.log(getattr(model, "vocab_size", None) or model.outputs)
        assert abs(losses[0] - guess) < 0.5, "at random parameters the loss is that of a guess"
    assert int(state.step) == 2
    # the first update has learning rate 0 (warm-up), the second moves every parameter
    still = [name for name, leaf in state.params.items() if np.array_equal(leaf, params[name])]
    if getattr(model, "variates", None) == 1:  # a scan over a single variate has nothing that could decay
        still = [name for name in still if not re.fullmatch(r"stack\.channel_mixers\..*\.A_log", name)]
    assert not still


@pytest.mark.parametrize(
    ("call", "lines"),
    [
        ("bf16", ["model.dtype: 'float32' -> 'bfloat16'"]),
        ("remat", ["model.remat: 'none' -> 'block'"]),
        ("scan_layers()", ["model.scan_layers: False -> True"]),
        ("accumulate(2)", ["accumulate: 1 -> 2"]),
        ("longer(factor=3)", ["steps: 600 -> 1800"]),
        ("stretch", ["data.length: 256 -> 512", "batch_size: 16 -> 8"]),
        ("width(64)", ["model.dim: 128 -> 64"]),
    ],
)
def test_fiddlers(cfg, call, lines):
    cfg.steps, cfg.batch_size, cfg.data.length = 600, 16, 256
    changed = config.fiddle(cfg, call)
    assert config.diff(cfg, changed) == lines
    config.build(changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("tinny", "no fiddler 'tinny'; did you mean 'tiny'"),
        ("longer('a')", r"fiddler .*: expected longer\(factor: int = 2\)"),
        ("longer(1, 2)", r"expected longer\(factor: int = 2\)"),
        ("longer(", r"expected longer\(factor: int = 2\)"),
        ("stretch(7)", "factor must divide batch_size"),
        ("mixer(mambo)", "'mambo' is no module of seqlab.models; did you mean 'Mamba'"),
        ("mixer(mamba, state=4)", "Mamba has no option 'state'; did you mean 'state_size'"),
        ("mixer", r"expected mixer\(name: str, \*\*options"),
    ],
)
def test_fiddlers_refuse(cfg, call, message):
    with pytest.raises(ConfigError, match=message):
        config.fiddle(cfg, call)


@pytest.mark.parametrize(
    ("assignment", "lines"),
    [
        ("model.dim=64", ["model.dim: 128 -> 64"]),
        ("model.mixers[0].heads = 8", ["model.mixers[0].heads: 4 -> 8"]),
        ("model.mixers.0.heads=8", ["model.mixers[0].heads: 4 -> 8"]),
        ("model.mixers[-1].cache.window=16", ["model.mixers[1].cache.window: 64 -> 16"]),
        ("optimizer.peak=1", ["optimizer.peak: 0.003 -> 1.0"]),  # an int where a float is expected
        ("optimizer.clip=None", ["optimizer.clip: 1.0 -> None"]),
        ("model.dtype=bfloat16", ["model.dtype: 'float32' -> 'bfloat16'"]),
        ("model.dtype='bfloat16'", ["model.dtype: 'float32' -> 'bfloat16'"]),
        ("model.tie_embeddings=False", ["model.tie_embeddings: True -> False"]),
        # A default that the config does not mention.
        ("model.channel_mixer.hidden=96", ["model.channel_mixer.hidden: None -> 96"]),
        ("data.paths=/some/folder", ["data.paths: () -> ('/some/folder',)"]),
        ("data.paths=[a, b]", ["data.paths: () -> ('a', 'b')"]),
        ("data.paths=2026", ["data.paths: () -> ('2026',)"]),  # a name that looks like a number
        ("model.channel_mixer=None", ["model.channel_mixer: seqlab.models.layers:SwiGLU -> None"]),
        (
            "model.norm=LayerNorm",
            [
                "model.norm: seqlab.models.layers:RMSNorm -> seqlab.models.layers:LayerNorm",
                "model.norm.bias: absent -> True",
            ],
        ),
        ("model.norm=seqlab.models.layers:RMSNorm", []),
    ],
)
def test_overrides(assignment, lines):
    cfg = parts.language_run(parts.byte_model(128, 2, parts.gated_linear(), parts.window_attention(64)))
    before = config.flat(cfg)
    changed = config.override(cfg, assignment)
    assert config.diff(cfg, changed) == lines
    assert config.flat(cfg) == before, "the config given is left alone"
    check(changed)


def test_a_mixer_can_be_named(cfg):
    changed = config.override(
        config.override(cfg, "model.mixers=(Mamba, Attention)"), "model.mixers[0].state_size=4"
    )
    model = nnx.eval_shape(lambda: config.build(changed).model(rngs=nnx.Rngs(0)))
    assert [type(block.mixer) for block in model.backbone.blocks][:2] == [Mamba, Attention]
    assert model.backbone.blocks[0].mixer.state_size == 4


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "model.dmi=3",
            "model.dmi: LanguageModel has no field 'dmi'; did you mean 'dim'.* Valid: vocab_size, dim, depth",
        ),
        ("stpes=3", "stpes: Experiment has no field 'stpes'; did you mean 'steps'"),
        (
            "model.mixers[0].heds=8",
            r"model.mixers\[0\].heds: GatedLinearAttention has no field 'heds'; did you mean 'heads'",
        ),
        ("model.rngs=3", "has no field 'rngs'"),
        ("model.mixers[5].heads=8", "model.mixers: got 5, expected an index from 0 to 1"),
        ("model.mixers[x].heads=8", "expected names and indices"),
        ("model.dim.x=8", "model.dim is 128, which has no field 'x'"),
        ("model.dim", "expected path=value"),
        ("=3", "expected path=value"),
        ("model.dim=abc", "model.dim: got 'abc', expected int"),
        ("model.dim=1.5", "model.dim: got 1.5, expected int"),
        ("model.dim=True", "model.dim: got True, expected int"),
        ("model.dim=None", "model.dim: got None, expected int"),
        ("optimizer.peak=fast", "optimizer.peak: got 'fast', expected float"),
        ("optimizer.peak=True", "optimizer.peak: got True, expected float"),
        ("optimizer.b1=None", "optimizer.b1: got None, expected float"),
        ("optimizer.clip=abc", "optimizer.clip: got 'abc', expected float or None"),
        ("model.tie_embeddings=1", "model.tie_embeddings: got 1, expected bool"),
        ("model.tie_embeddings=no", "model.tie_embeddings: got 'no', expected bool"),
        ("data.paths=(a, 3)", "data.paths: got .*, expected a tuple of str"),
        ("model.mixers=3", "model.mixers: got 3, expected a constructor"),
        ("model.mixers[1]=Mambo", "'Mambo' is no module of seqlab.models; did you mean 'Mamba'"),
        ("model.norm=nowhere:Norm", "'nowhere:Norm' cannot be imported"),
    ],
)
def test_overrides_refuse(assignment, message):
    cfg = parts.language_run(parts.byte_model(128, 2, parts.gated_linear(), parts.window_attention(64)))
    with pytest.raises(ConfigError, match=message):
        config.override(cfg, assignment)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "model.mixers[1].cache.window=0",
            r"model.mixers\[1\].cache: window must be a positive integer, got 0",
        ),
        ("model.mixers[0].heads=5", r"model.mixers\[0\]: heads=5 must divide"),
        ("model.depth=0", "model: depth must be a positive integer, got 0"),
        ("model.dtype=float8", "model: dtype must be 'float32', 'bfloat16' or 'float64', got 'float8'"),
        ("model.mixers[0].dim=3", r"model.mixers\[0\]: .*multiple values for argument 'dim'"),
        ("model.vocab_size=100", "model.vocab_size: got 100, expected at least 256"),
        ("optimizer.peak=-1", r"optimizer: peak must be in \(0, inf\), got -1"),
        ("optimizer.clip=0.0", r"optimizer: clip must be in \(0, inf\), got 0.0"),
        ("optimizer.b2=1.0", r"optimizer: b2 must be in \[0, 1\), got 1.0"),
        ("optimizer=optax:sgd", "first argument is learning_rate; say .*:named optimizer.name=sgd"),
        ("optimizer=os:getcwd", "optimizer: .*getcwd cannot be called as optimizer"),
        ("data.length=0", "data: length must be a positive number"),
        ("data=3", "data: int has no 'train'"),
        ("seed=-1", r"^seed must be an integer in \[0, 2\*\*32\), got -1"),
        ("steps=0", "^steps must be a positive integer, got 0"),
        ("accumulate=3", "^accumulate must divide batch_size=16"),
    ],
)
def test_build_refuses_before_work(assignment, message):
    cfg = parts.language_run(
        parts.byte_model(128, 2, parts.gated_linear(), parts.window_attention(64)), batch_size=16
    )
    with pytest.raises(ConfigError, match=message):
        config.build(config.override(cfg, assignment))


def test_types_are_checked_in_python_too(cfg):
    cfg.model.dim = "wide"
    with pytest.raises(ConfigError, match=r"model\.dim: got 'wide', expected int"):
        config.build(cfg)
    cfg.model.dim, cfg.data = 128, fdl.Config(Window, window=3)
    with pytest.raises(ConfigError, match="data: Window has no 'train'"):
        config.build(cfg)
    with pytest.raises(AttributeError, match="No parameter named 'heds'"):
        cfg.model.mixers[0].heds = 3
    with pytest.raises(ConfigError, match="builds Text, expected Experiment"):
        config.build(fdl.Config(Text))


def test_the_mixer_of_any_config_can_be_another():
    cfg = config.load("mqar")
    mamba = config.build(config.fiddle(cfg, "mixer(mamba, state_size=4)"))
    blocks = nnx.eval_shape(lambda: mamba.model(rngs=nnx.Rngs(0))).backbone.blocks
    assert [(type(block.mixer), block.mixer.state_size) for block in blocks] == [(Mamba, 4)] * 2
    attention = config.fiddle(cfg, "mixer('Attention', heads=2)")
    assert attention.model.mixers.cache.capacity == cfg.data.length, (
        "a cache as long as what there is to remember"
    )
    window = config.fiddle(config.load("digits"), "mixer(gated_linear_attention)")
    assert (
        type(nnx.eval_shape(lambda: config.build(window).model(rngs=nnx.Rngs(0))).backbone.blocks[0].mixer)
        is GatedLinearAttention
    )
    assert (
        config.override(cfg, "model.mixers=gated_linear_attention").model.mixers.__fn_or_cls__
        is GatedLinearAttention
    )


def test_nothing_is_shared_after_a_change():
    mixer = fdl.Partial(Mamba)
    cfg = parts.language_run(
        fdl.Partial(LanguageModel, vocab_size=256, dim=32, depth=2, mixers=(mixer, mixer))
    )
    changed = config.override(cfg, "model.mixers[0].state_size=4")
    assert config.diff(cfg, changed) == ["model.mixers[0].state_size: 16 -> 4"]


def test_the_operative_config_names_everything():
    cfg = parts.language_run(fdl.Partial(LanguageModel, vocab_size=256, dim=32, depth=2, mixers=Attention))
    lines = config.flat(cfg).splitlines()
    for line in (
        "experiment = seqlab.train.experiment:Experiment",
        "model.mixers = seqlab.models.attention:Attention",
        "model.mixers.cache = seqlab.models.cache.full:Full",
        "model.mixers.cache.capacity = 4096",
        "model.norm.eps = 1e-05",
        "data.paths = ()",
        "optimizer.b2 = 0.95",
        "loss = seqlab.train.step:next_token_loss",
        "batch_size = 16",
    ):
        assert line in lines
    assert len(lines) == len({line.partition(" = ")[0] for line in lines})
    assert config.override(cfg, "model.mixers.cache.capacity=8").model.mixers.cache.capacity == 8


@dataclasses.dataclass(frozen=True)
class Odd:
    """Data with one of everything that a config may hold."""

    items: tuple = ()
    table: dict | None = None
    limit: float = float("inf")
    call: object = None


def test_json_holds_tuples_lists_tables_functions_and_classes():
    inner = fdl.Config(
        Odd, items=(1, (2.5, "x"), [None, True]), table={"a": (1,), "$b": [2]}, call=json.dumps
    )
    cfg = fdl.Config(Odd, items=(fdl.Partial(Mamba, expand=3), Window), call=inner)
    again = config.from_json(config.to_json(cfg), trust=True)
    assert config.flat(again) == config.flat(cfg)
    assert again.call.items == (1, (2.5, "x"), [None, True])
    assert again.call.table == {"a": (1,), "$b": [2]}
    assert again.call.call is json.dumps
    assert again.items[1] is Window
    assert again.limit == float("inf")
    built = fdl.build(again)
    assert built.items[0].keywords["expand"] == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (jax.nn.silu, None),
        (lambda x: x, "call: .*<lambda> cannot be imported again"),
        (nnx.initializers.lecun_normal(), "call: .*cannot be imported again"),
        (jnp.ones(2), "call: a saved config cannot hold"),
        (jax.sharding.PartitionSpec("data"), "call: a saved config cannot hold"),
    ],
)
def test_json_refuses_what_would_not_come_back(value, message):
    cfg = fdl.Config(Odd, call=value)
    if message is None:
        assert config.from_json(config.to_json(cfg), trust=True).call is value
    else:
        with pytest.raises(ConfigError, match=message):
            config.to_json(cfg)


class Custom(Mamba):
    """A mixer whose default JSON cannot hold, as many of Flax's are."""

    def __init__(self, dim, *, init=nnx.initializers.lecun_normal(), expand: int = 1, rngs):  # noqa: B008
        super().__init__(dim, expand=expand, rngs=rngs)
        self.init = init


def test_defaults_that_json_cannot_hold_stay_with_the_code(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(Custom, "__module__", "custom_mixers")
    monkeypatch.setitem(sys.modules, "custom_mixers", sys.modules[__name__])
    cfg.model.mixers = Custom
    assert "init" not in json.loads(config.to_json(cfg))["config"]["model"]["mixers"]
    config.prepare(cfg, tmp_path)
    config.prepare(cfg, tmp_path)
    config.build(config.from_json((tmp_path / "config.json").read_text(), trust=True))
    cfg.model.mixers = fdl.Partial(Custom, init=nnx.initializers.lecun_normal())
    with pytest.raises(ConfigError, match=r"model.mixers.init: .*cannot be imported again"):
        config.to_json(cfg)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a saved config"),
        (
            '{"format": "seqlab.config.1", "config": {"$call": "seqlab.models:Mambo"}}',
            "'seqlab.models:Mambo' cannot be imported",
        ),
        (
            '{"format": "seqlab.config.1", "config": {"$partial": "seqlab.models:Mamba", "x": 1}}',
            "Mamba has no field 'x' any more",
        ),
        ('{"format": "seqlab.config.1", "config": {"a": 1}}', "expected the name of a constructor"),
    ],
)
def test_json_that_cannot_be_read(text, message):
    with pytest.raises(ConfigError, match=message):
        config.from_json(text)


def commit(workdir):
    """Make it look as if there were a checkpoint."""
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    (workdir / "checkpoints" / "5" / "commit_success.txt").write_text("")


def test_a_run_folder_belongs_to_one_config(cfg, tmp_path):
    workdir = tmp_path / "runs" / "a"
    config.prepare(cfg, workdir)
    assert (workdir / "config.txt").read_text() == config.flat(cfg)
    commit(workdir)
    before = {path.name: path.read_bytes() for path in workdir.glob("config.*")}
    assert before.keys() == {"config.json", "config.txt"}
    # A default written out is the same config.
    config.prepare(config.override(cfg, f"steps={cfg.steps}"), workdir)
    with pytest.raises(ConfigError) as refusal:
        config.prepare(config.override(config.override(cfg, "model.dim=64"), "seed=7"), workdir)
    assert "\n  model.dim: 128 -> 64\n  seed: 0 -> 7\n" in str(refusal.value)
    assert {path.name: path.read_bytes() for path in workdir.glob("config.*")} == before
    # a field that came into being after the run is no difference while it has its default, and is one
    # otherwise
    saved = json.loads((workdir / "config.json").read_text())
    del saved["config"]["seed"], saved["sha256"]
    (workdir / "config.json").write_text(json.dumps(saved))
    config.prepare(cfg, workdir)
    with pytest.raises(ConfigError, match="seed: 0 -> 4"):
        config.prepare(config.override(cfg, "seed=4"), workdir)
    (workdir / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        config.prepare(cfg, workdir)


def test_what_touches_no_number_of_a_run_may_change(cfg, tmp_path):
    config.prepare(cfg, tmp_path)
    commit(tmp_path)
    changed = cfg
    for line in ("keep=9", "log_every=1", "checkpoint_every=2", "validate_every=3", "mesh.data=2"):
        changed = config.override(changed, line)
    assert {line.partition(":")[0] for line in config.prepare(changed, tmp_path)} == {
        "keep",
        "log_every",
        "checkpoint_every",
        "validate_every",
        "mesh.data",
    }
    assert config.from_json((tmp_path / "config.json").read_text()).keep == 9
    assert config.prepare(changed, tmp_path) == []

    longer = config.override(config.override(changed, "steps=2000"), "optimizer.peak=0.001")
    with pytest.raises(ConfigError, match="or go on from its last checkpoint with these: --extend"):
        config.prepare(longer, tmp_path)
    assert len(config.prepare(longer, tmp_path, extend=True)) == 2
    with pytest.raises(ConfigError, match=r"seed: 0 -> 4\nchoose another folder, or the same config$"):
        config.prepare(config.override(longer, "seed=4"), tmp_path, extend=True)

    moved = config.override(longer, "data.paths=elsewhere")
    (tmp_path / "data.txt").write_text("00ff\n")
    for fingerprint in (None, "00fe"):
        with pytest.raises(ConfigError, match=r"data\.paths: .* -> \('elsewhere',\)"):
            config.prepare(moved, tmp_path, fingerprint=fingerprint)
    config.prepare(moved, tmp_path, fingerprint="00ff")
    with pytest.raises(ConfigError, match=r"data\.length"):
        config.prepare(config.override(moved, "data.length=4"), tmp_path, fingerprint="00ff")


def test_a_folder_without_a_checkpoint_belongs_to_nobody(cfg, tmp_path):
    config.prepare(cfg, tmp_path)
    other = config.override(cfg, "model.dim=64")
    assert config.prepare(other, tmp_path) == []
    assert config.from_json((tmp_path / "config.json").read_text()).model.dim == 64
    (tmp_path / "config.json").write_bytes(b"\xff")
    config.prepare(other, tmp_path)
    assert config.from_json((tmp_path / "config.json").read_text()).model.dim == 64


def test_a_saved_config_that_has_changed_is_refused(cfg):
    text = config.to_json(config.override(cfg, "seed=7"))
    with pytest.raises(ConfigError, match="it has changed since it was written"):
        config.from_json(text.replace('"seed": 7', '"seed": 3'))
    content = json.loads(text)
    del content["sha256"]
    assert config.from_json(json.dumps(content)).seed == 7  # as older runs have it


def test_a_saved_config_is_json(cfg):
    cfg.optimizer.clip = float("inf")
    text = config.to_json(cfg)
    assert "Infinity" not in text
    assert config.from_json(text).optimizer.clip == float("inf")


def test_a_folder_with_strange_checkpoints_is_refused(cfg, tmp_path):
    commit(tmp_path)
    with pytest.raises(ConfigError, match=r"holds checkpoints and no config\.json"):
        config.prepare(cfg, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        config.prepare(cfg, tmp_path / "file")


OWN = """
import fiddle as fdl
from seqlab.configs import lm_mamba
from seqlab.models import Mamba

class Own(Mamba):
    pass

def base():
    cfg = lm_mamba.base()
    cfg.model.mixers = fdl.Partial(Own{arguments})
    return cfg
"""


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN.format(arguments=", expand=1"))
    cfg = config.load(file)
    assert cfg.model.mixers.expand == 1
    config.build(cfg)
    with pytest.raises(ConfigError, match=r"model\.mixers: Own is defined in the config file"):
        config.prepare(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            OWN.format(arguments=", expnad=1"),
            "own.py, line 11: TypeError: .*unexpected keyword argument 'expnad'",
        ),
        ("def base(:", "own.py: SyntaxError"),
        ("import nowhere_at_all", "own.py, line 1: ModuleNotFoundError"),
        ("def basis(): pass", r"own.py: expected a function base\(\)"),
        ("def base(): return 3", "own.py: base\\(\\) returned int"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, message):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(tmp_path / "own.py")


def test_names_that_do_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="no config 'lm_mambo'; did you mean 'lm_mamba'"):
        config.load("lm_mambo")
    with pytest.raises(ConfigError, match="no config 'parts'"):
        config.load("parts")
    with pytest.raises(ConfigError, match=r"nowhere\.py: no such file"):
        config.load(tmp_path / "nowhere.py")


def test_a_saved_config_builds_the_same_parameters(cfg):
    cfg = config.fiddle(cfg, "tiny")
    again = config.from_json(config.to_json(cfg), trust=True)
    first, second = (params_of(config.build(c).model(rngs=nnx.Rngs(3))) for c in (cfg, again))
    assert_identical(first, second)


def test_text_validates_and_is_a_value():
    assert Text(length=3) == Text(length=3)
    for arguments, message in (
        ({"paths": "a"}, "paths must be a tuple of strings"),
        ({"paths": ("",)}, "paths must be a tuple of strings that are not empty"),
        ({"include": (1,)}, "include must be a tuple"),
        ({"length": 0}, "length must be a positive number"),
        ({"length": True}, "length must be a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            Text(**arguments)


def test_text_packs_what_it_names(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 20)
    (tmp_path / "b.md").write_text("abcdefghij" * 20)
    text = Text(paths=(str(tmp_path),), length=7)
    sides = [
        bytes(np.concatenate([[0], windows.stream[1:]]).astype(np.uint8))
        for windows in (text.train(0), text.validation())
    ]
    assert sorted(side[1:11] for side in sides) == [b"0123456789", b"abcdefghij"]
    only = Text(paths=(str(tmp_path),), include=("*.txt",), length=7)
    assert b"a" not in bytes(only.train(0).stream) + bytes(only.validation().stream)
    assert text.train(0)[0]["inputs"].shape == (7,)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Text(paths=(str(tmp_path / "nowhere"),)).train(0)


def test_tfds_text_asks_for_what_it_names(monkeypatch):
    asked = []

    def source(*arguments):
        asked.append(arguments)
        return ArraySource([np.arange(1, 9, dtype=np.uint8)])

    monkeypatch.setattr("seqlab.train.text.TfdsSource", source)
    text = TfdsText(
        "wiki40b/en",
        data_dir="/data",
        key="body",
        train_split="train[:95%]",
        validation_split="train[95%:]",
        length=4,
    )
    assert text.train(0)[0]["inputs"].tolist() == [0, 1, 2, 3]
    assert text.validation()[0]["targets"].tolist() == [1, 2, 3, 4]
    assert asked == [
        ("wiki40b/en", "train[:95%]", "body", "/data"),
        ("wiki40b/en", "train[95%:]", "body", "/data"),
    ]
    assert text.tokenizer.vocab_size == 256
    for arguments, message in (
        ({"name": ""}, "name must be a string"),
        ({"name": "x", "data_dir": 3}, "data_dir must be a path or None"),
    ):
        with pytest.raises(ValueError, match=message):
            TfdsText(**arguments)


def test_an_experiment_from_the_defaults():
    assert isinstance(config.build(parts.language_run(parts.byte_model(32, 1, parts.mamba()))), Experiment)


def test_an_optimizer_of_optax_is_named_with_its_options():
    """Two steps of SGD with momentum 0.5 on a gradient of 1 at a constant rate of 0.1: 0.1, then 0.15."""
    options = {
        "name": "sgd",
        "options": {"momentum": 0.5},
        "peak": 0.1,
        "final": 1.0,
        "warmup": 0,
        "clip": None,
    }
    optimizer = named(10, **options)
    state, moves = optimizer.init(jnp.zeros(())), []
    for _ in range(2):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        moves.append(float(update))
    np.testing.assert_allclose(moves, [-0.1, -0.15], rtol=1e-6)
    with pytest.raises(ValueError, match=r"optimizer.name.*'lionn'.*did you mean 'lion'"):
        named(10, name="lionn")
    with pytest.raises(ValueError, match=r"optimizer.options of lion.*'b3'"):
        named(10, name="lion", options={"b3": 0.1})
