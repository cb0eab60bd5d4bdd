"""Nothing that comes from elsewhere runs code: configs of strangers, models of the hub, files beside the
weights."""

import json
import pathlib
import subprocess
import sys

import pytest

import seqlab
from seqlab import names
from seqlab.train import config
from seqlab.train.config import ConfigError

FOREIGN = [
    "os:system",
    "subprocess:run",
    "builtins:eval",
    "seqlab.cli:main",
    "seqlab.cli:os.system",
    "seqlab.studies.runs:load",
    "seqlab.train.config:load",
    "seqlab.train.config:_import_file",
    "seqlab.train.override:named",
    "seqlab.models.attention:jax",
    "seqlab.models.attention:with_cache.__globals__",
    "seqlab.train.data:os.system",
    "seqlab.train.text:dataclasses.make_dataclass",
    "nowhere_to_be_found:Name",
]


@pytest.fixture
def stranger(tmp_path):
    """Writes a run folder whose config calls what it is told to; `ran` appears if the call was made."""

    def write(name, where="$call", **arguments):
        folder = tmp_path / "stranger"
        folder.mkdir(exist_ok=True)
        call = {where: name, **arguments}
        (folder / "config.json").write_text(json.dumps({"format": config.FORMAT, "config": call}))
        return folder

    return write


@pytest.mark.parametrize("where", ["$call", "$partial", "$name"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_run_folder_may_only_name_parts_of_seqlab(name, where, stranger):
    before = set(sys.modules)
    with pytest.raises(ConfigError, match="is no part of seqlab's configs") as refusal:
        seqlab.load(stranger(name, where))
    assert repr(name) in str(refusal.value) and "trust=True" in str(refusal.value)
    assert "nowhere_to_be_found" not in set(sys.modules) - before


def test_a_call_in_a_run_folder_runs_where_the_user_trusts_it_and_nowhere_else(stranger, tmp_path):
    mark = tmp_path / "ran"
    folder = stranger("os:system", command=f"touch {mark}")
    with pytest.raises(ConfigError, match="names 'os:system'"):
        seqlab.load(folder)
    assert not mark.exists()
    with pytest.raises(ConfigError, match="the config builds int, expected Experiment"):
        seqlab.load(folder, trust=True)
    assert mark.exists()


@pytest.mark.parametrize("name", config.names())
def test_every_config_of_seqlab_can_be_read_again_without_trust(name):
    text = config.to_json(config.load(name))
    assert config.to_json(config.from_json(text)) == text


def test_the_names_of_the_users_own_config_are_no_strangers(stranger):
    text = json.dumps({"format": config.FORMAT, "config": {"$partial": "json:dumps"}})
    assert config.names_in(config.from_json(text, trust=True)) == {"json:dumps"}
    assert config.from_json(text, trust={"json:dumps"}).__fn_or_cls__ is json.dumps
    with names.restricted(), pytest.raises(names.UntrustedNameError):
        names.imported("json:dumps")
    assert names.imported("json:dumps") is json.dumps


def test_a_hub_id_never_leads_to_a_run(stranger, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    mark = tmp_path / "ran"
    folder = stranger("os:system", command=f"touch {mark}")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: str(folder))
    for trust in (False, True):
        with pytest.raises(ValueError, match="stranger/nice-mamba is no published model"):
            seqlab.load("stranger/nice-mamba", trust=trust)
    assert not mark.exists()


def test_a_misspelt_run_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("runs/demo").mkdir(parents=True)
    pathlib.Path("runs/demo/config.json").touch()
    with pytest.raises(ValueError, match=r"does not exist; did you mean 'runs/demo'\? Runs there: runs/demo"):
        seqlab.load("runs/dmeo")


@pytest.mark.parametrize("command", [["-m", "seqlab"], ["-c", "from seqlab.cli import main; main()"]])
def test_files_of_the_current_folder_are_not_imported(command, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name in ("jax", "safetensors", "tokenizers", "random", "queue"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the folder was imported')")
    options = ["-P"] if command[0] == "-c" else []  # a script's folder is its own, not the current one
    done = subprocess.run(
        [sys.executable, *options, *command, "stream", "."], cwd=tmp_path, capture_output=True, text=True,
        env={**__import__("os").environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)},
    )  # fmt: skip
    assert "was imported" not in done.stderr
    assert done.returncode != 0 or done.stdout == ""
