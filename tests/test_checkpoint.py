"""Checkpoints: what comes back is what went in, bit for bit, or an error; whatever happens to the disk or the
process in between."""

import hashlib
import json
import logging
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_identical
from jax.sharding import NamedSharding, PartitionSpec

from seqlab.train.checkpoint import CheckpointError, Checkpoints

ROOT = pathlib.Path(__file__).parent.parent


def state_of(seed):
    generator = np.random.default_rng(seed)
    return {
        "step": np.int32(seed),
        "params": {
            "embed.weight": jnp.asarray(generator.normal(size=(40, 50)), jnp.float32),
            "head.weight": jnp.asarray(generator.normal(size=(50,)), jnp.bfloat16),
        },
        "optimizer": {"0/mu": generator.normal(size=(40, 50)).astype(np.float32), "0/count": np.uint32(7)},
    }


def assert_state(actual, expected):
    assert_identical(jax.tree.map(np.asarray, actual), jax.tree.map(np.asarray, expected))


@pytest.fixture
def saved(tmp_path):
    """A folder with good steps 1, 2, 3 that hold `state_of` their number."""
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step))
    return tmp_path / "run"


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder):
    return max(files_of(folder), key=lambda path: path.stat().st_size)


def flip(path):
    """Change a byte that is read: OCDBT files hold superseded nodes too, at the end or between two arrays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 0xFF
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# What goes in comes out


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    nans = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    state = {
        "arrays": {
            "float32": np.array([[1.5, -0.0, np.inf], [np.nan, 1e-45, 3.0]], np.float32),
            "nan payloads": nans,
            "float64": np.array([0.1, 1e300]),
            "float16": np.array([6e-8, 65504], np.float16),
            "bfloat16": jnp.array([1.0, 3.14159, -1e30], jnp.bfloat16),
            "float8": np.array([0.5, 448], ml_dtypes.float8_e4m3fn),
            "complex64": np.array([1 + 2j], np.complex64),
            "int64": np.array([2**62, -(2**62)]),
            "int8": np.array([-128, 127], np.int8),
            "uint32": np.array([0, 2**32 - 1], np.uint32),
            "bool": np.array([True, False]),
            "0-d": {
                "jax": jnp.float32(2.5),
                "numpy": np.array(7, np.int16),
                "scalar": np.float64(0.1),
                "bool": np.bool_(True),
            },
            "empty": np.zeros((0, 3), np.float32),
            "transposed": np.arange(6.0).reshape(2, 3).T,
            "strided": np.arange(10)[::-3],
            "big-endian": np.array([1, 2, 3], ">i4"),
        },
        "python": {
            "int": 2**70,
            "float": 0.1,
            "infinity": float("inf"),
            "bool": True,
            "text": "é\n",
            "nothing": {},
        },
        "dots.and/slashes": {"a": {"b": np.ones(2)}, "a.b": np.zeros(2), "c/d": np.full(2, 5.0)},
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, wait=True)
    step, restored = Checkpoints(tmp_path).restore()
    assert step == 0
    flat, tree = jax.tree_util.tree_flatten_with_path(restored)
    expected, expected_tree = jax.tree_util.tree_flatten_with_path(state)
    assert tree == expected_tree
    for (path, a), (_, e) in zip(flat, expected, strict=True):
        if "python" in str(path[0]):
            assert type(a) is type(e)
            assert a == e, path
        else:
            e = np.asarray(e)
            assert isinstance(a, np.ndarray), path
            assert (a.shape, a.dtype) == (e.shape, e.dtype.newbyteorder("=")), path
            assert a.tobytes() == e.astype(e.dtype.newbyteorder("=")).tobytes(), path


def test_a_state_may_have_no_arrays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"position": 12})
        checkpoints.save(2, {})
    assert Checkpoints(tmp_path).restore(1) == (1, {"position": 12})
    assert Checkpoints(tmp_path).restore() == (2, {})


def test_the_manifest_has_the_hash_of_every_leaf(saved):
    manifest = json.loads((saved / "2" / "manifest" / "manifest.json").read_text())
    state = state_of(2)
    leaves = {leaf["name"]: leaf for leaf in manifest["leaves"]}
    assert leaves.keys() == {
        "step",
        "params/embed.weight",
        "params/head.weight",
        "optimizer/0/mu",
        "optimizer/0/count",
    }
    embed = leaves["params/embed.weight"]
    assert (embed["shape"], embed["dtype"]) == ([40, 50], "float32")
    assert (
        embed["sha256"] == hashlib.sha256(np.asarray(state["params"]["embed.weight"]).tobytes()).hexdigest()
    )
    assert leaves["params/head.weight"]["dtype"] == "bfloat16"


def test_one_entry_can_be_restored_alone(saved):
    step, state = Checkpoints(saved).restore(only="params", like={"params": state_of(0)["params"]})
    assert step == 3
    assert_state(state, {"params": state_of(3)["params"]})
    with pytest.raises(ValueError, match=r"got 'parms'.*did you mean 'params'"):
        Checkpoints(saved).restore(only="parms")


def test_arrays_may_be_changed_and_donated_while_they_are_saved(tmp_path):
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    array, buffer = update(jnp.zeros(1_000_000)), np.zeros(1_000_000)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            buffer += 1
            checkpoints.save(step, {"jax": array, "numpy": buffer})
            for _ in range(3):
                array = update(array)
            buffer[:] += 2
        for step, expected in ((1, 1), (2, 4), (3, 7)):
            _, state = checkpoints.restore(step)
            assert np.unique(state["jax"]) == np.unique(state["numpy"]) == expected


# Which steps there are


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 10, 11):
            checkpoints.save(step, state_of(step))
    assert checkpoints.steps() == [10, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11"]
    step, state = Checkpoints(tmp_path).restore()
    assert step == 11
    assert_state(state, state_of(11))
    assert_state(Checkpoints(tmp_path).restore(10)[1], state_of(10))


def test_nothing_saved_is_none_and_an_unknown_step_an_error(saved, tmp_path):
    assert Checkpoints(tmp_path / "nothing").restore() is None
    assert Checkpoints(tmp_path / "nothing").steps() == []
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(CheckpointError, match=r"there is no step 7 in .*run; there are 1, 2, 3"):
        Checkpoints(saved).restore(7)


def test_a_relative_directory_will_do_and_a_bucket_will_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("runs/a") as checkpoints:
        checkpoints.save(1, {"x": np.ones(2)})
    monkeypatch.chdir("/")
    assert checkpoints.restore()[0] == 1
    assert (tmp_path / "runs" / "a" / "1").is_dir()
    with pytest.raises(ValueError, match="'gs://bucket/run', expected a local or mounted folder"):
        Checkpoints("gs://bucket/run")
    with pytest.raises(ValueError, match="keep: got 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_step_can_be_saved_again_only_if_it_is_the_same(saved):
    with Checkpoints(saved) as checkpoints:
        checkpoints.save(3, state_of(3))
        with pytest.raises(CheckpointError, match=r"step 3 exists in .* with another state"):
            checkpoints.save(3, state_of(4))
        assert_state(checkpoints.restore()[1], state_of(3))


@pytest.mark.parametrize(
    "name",
    ["run [2]", "a\\b", "a*b?c", "two\nlines", "%20 #~", "ünï😀", "\udcff", "x" * 200, "a/../b", "link/[c]"],
)
def test_every_path_that_the_file_system_takes_holds_checkpoints(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "axb0c").mkdir()  # what a pattern would match
    with Checkpoints(tmp_path / name, keep=1) as checkpoints:
        checkpoints.try_out()
        for step in (1, 2):
            checkpoints.save(step, {"w": np.arange(3.0) + step})
    assert Checkpoints(tmp_path / name).restore()[1]["w"].tolist() == [2.0, 3.0, 4.0]
    assert [path.name for path in (tmp_path / name).iterdir()] == ["2"]
    assert not list((tmp_path / "axb0c").iterdir())
    assert not (tmp_path / "a" / "b").exists()


# Damage


@pytest.mark.parametrize("damage", [flip, truncate, pathlib.Path.unlink])
def test_a_damaged_step_is_named_and_passed_over(saved, damage, caplog):
    damage(largest(saved / "3"))
    with caplog.at_level(logging.WARNING, "seqlab"):
        step, state = Checkpoints(saved).restore()
    assert step == 2
    assert_state(state, state_of(2))
    [record] = caplog.records
    assert record.name == "seqlab.train.checkpoint"
    assert f"step 3 in {saved} is passed over: leaf " in record.getMessage()
    assert any(leaf in record.getMessage() for leaf in ("params/embed.weight", "optimizer/0/mu"))
    assert len(record.getMessage()) < 700
    with pytest.raises(
        CheckpointError, match=rf"step 3 in {saved} is damaged: leaf (params/embed.weight|optimizer/0/mu): "
    ):
        Checkpoints(saved).restore(3)
    assert Checkpoints(saved).steps() == [1, 2, 3]  # nothing is deleted for being damaged


@pytest.mark.parametrize("damage", [flip, truncate, pathlib.Path.unlink])
def test_no_damage_to_any_file_gives_wrong_values(saved, damage, tmp_path, caplog):
    shutil.rmtree(saved / "1")
    outcomes = set()
    for name in [path.relative_to(saved) for path in files_of(saved / "3")]:
        shutil.copytree(saved, tmp_path / "copy")
        damage(tmp_path / "copy" / name)
        caplog.clear()
        step, state = Checkpoints(tmp_path / "copy").restore()
        assert_state(state, state_of(step))  # 3 if the file did not matter
        assert len(caplog.records) == 3 - step, name
        outcomes.add(step)
        shutil.rmtree(tmp_path / "copy")
    assert outcomes == {2, 3}


def test_a_manifest_cannot_lie(saved):
    path = saved / "3" / "manifest" / "manifest.json"
    path.write_text(path.read_text().replace('"shape": [40, 50]', '"shape": [50, 40]'))
    with pytest.raises(CheckpointError, match=r"step 3 .* is damaged: manifest/manifest.json: .*own hash"):
        Checkpoints(saved).restore(3)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match=r"step 3 .* is damaged: manifest/manifest.json: "):
        Checkpoints(saved).restore(3)


def test_a_step_that_was_copied_under_another_number_is_damage(saved, caplog):
    shutil.copytree(saved / "1", saved / "7")
    assert Checkpoints(saved).restore()[0] == 3
    assert f"step 7 in {saved} is passed over: it is a copy of step 1 under another number" in caplog.text


def test_leaves_that_changed_places_are_damage(saved):
    shutil.rmtree(saved / "3" / "state")
    shutil.copytree(saved / "2" / "state", saved / "3" / "state")
    with pytest.raises(CheckpointError, match=r"leaf optimizer/0/mu: its bytes have changed"):
        Checkpoints(saved).restore(3)


def test_without_its_commit_a_step_is_none(saved, caplog):
    for step in (3, 2):
        (saved / str(step) / "commit_success.txt").unlink()
        caplog.clear()
        assert Checkpoints(saved).restore()[0] == step - 1
        assert f"step {step} in {saved} is passed over: it was never committed" in caplog.text
        with pytest.raises(CheckpointError, match=f"step {step} .* is damaged: it was never committed"):
            Checkpoints(saved).restore(step)
    assert Checkpoints(saved).steps() == [1]
    (saved / "1" / "commit_success.txt").unlink()
    # An interrupted first save must not prevent the second start.
    assert Checkpoints(saved).restore() is None


def test_if_no_step_is_good_each_is_listed(saved):
    for step in (1, 2, 3):
        flip(largest(saved / str(step)))
    (saved / "2" / "manifest" / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as error:
        Checkpoints(saved).restore()
    assert str(error.value).startswith(f"no good checkpoint in {saved}: step 3: leaf ")
    assert "; step 2: manifest/manifest.json: " in str(error.value)
    assert "; step 1: leaf " in str(error.value)


@pytest.mark.parametrize("restore_first", [True, False])
def test_rotation_counts_good_steps_only(saved, restore_first, caplog):
    for step in (2, 3):
        flip(largest(saved / str(step)))
    with Checkpoints(saved, keep=2) as checkpoints:
        if restore_first:
            assert checkpoints.restore()[0] == 1
        checkpoints.save(4, state_of(4), wait=True)
        assert checkpoints.steps() == [1, 2, 3, 4]  # 1 is the second good one
        flip(largest(saved / "4"))  # after it was found good
        checkpoints.save(5, state_of(5), wait=True)
        assert checkpoints.steps() == [1, 2, 3, 4, 5]
        checkpoints.save(6, state_of(6), wait=True)
        assert checkpoints.steps() == [5, 6]


def test_a_damaged_step_is_moved_aside_when_its_number_is_saved_again(saved, caplog):
    flip(largest(saved / "3"))
    (saved / "2" / "commit_success.txt").unlink()
    with Checkpoints(saved, keep=2) as checkpoints:
        assert checkpoints.restore()[0] == 1
        checkpoints.save(2, state_of(12), wait=True)  # below the newest step on disk
        assert checkpoints.steps() == [1, 2, 3]
        flip(largest(saved / "2"))
        checkpoints.save(2, state_of(22))
        checkpoints.save(3, state_of(13), wait=True)
    assert_state(Checkpoints(saved).restore(2)[1], state_of(22))
    assert_state(Checkpoints(saved).restore()[1], state_of(13))
    names = sorted(path.name for path in saved.iterdir())
    # 1 is no longer among the newest two.
    assert names == ["2", "2.damaged-1", "2.damaged-2", "3", "3.damaged-1"]
    with Checkpoints(saved, keep=2) as checkpoints:
        checkpoints.save(4, state_of(4))
    assert sorted(path.name for path in saved.iterdir()) == ["3", "3.damaged-1", "4"]


# Failures while saving


@pytest.fixture
def full_disk():
    """A function after which no file can grow beyond so many bytes; undone at the end of the test, or with
    None."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


# In a save that fails, TensorStore calls back into an event loop that Orbax has closed already.
in_orbax = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@in_orbax
@pytest.mark.parametrize("size", [0, 3000])
@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk_is_an_error_and_no_loss(saved, full_disk, size, wait):
    with Checkpoints(saved) as checkpoints:
        full_disk(size)
        with pytest.raises(
            CheckpointError, match=rf"step 4 could not be saved to {saved}/4: .*steps 1, 2, 3 are untouched"
        ) as error:
            checkpoints.save(4, state_of(4), wait=wait)
            # The error of a background save is raised at the next one.
            checkpoints.save(5, state_of(5), wait=wait)
        assert len(str(error.value)) < 700
        full_disk(None)
        assert checkpoints.steps() == [1, 2, 3]
        assert not (saved / "4").exists()  # its space is needed
        assert_state(checkpoints.restore()[1], state_of(3))
        checkpoints.save(4, state_of(4), wait=True)
        assert_state(checkpoints.restore()[1], state_of(4))
    assert Checkpoints(saved).steps() == [2, 3, 4]


def test_a_save_counts_once_it_has_been_read_back(saved, monkeypatch):
    from seqlab.train import writing

    whole = writing.read

    def read_of_a_bad_disk(folder, *arguments):
        flip(largest(folder))
        return whole(folder, *arguments)

    with Checkpoints(saved) as checkpoints:
        monkeypatch.setattr(writing, "read", read_of_a_bad_disk)
        with pytest.raises(CheckpointError, match=r"step 4 could not be saved.*cannot be read back: leaf"):
            checkpoints.save(4, state_of(4), wait=True)
        assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]
        monkeypatch.undo()
        checkpoints.save(4, state_of(4), wait=True)
    assert_state(Checkpoints(saved).restore(4)[1], state_of(4))


@in_orbax
def test_what_threads_of_a_failed_save_still_write_is_in_nobodys_way(saved, full_disk, monkeypatch):
    from seqlab.train import checkpoint

    drafts = []

    def noted(saver, draft, *arguments):
        drafts.append(draft)
        return checkpoint_save(saver, draft, *arguments)

    checkpoint_save = checkpoint.Save
    monkeypatch.setattr(checkpoint, "Save", noted)
    with Checkpoints(saved, keep=2) as checkpoints:
        full_disk(3000)
        with pytest.raises(CheckpointError, match="step 4 could not be saved"):
            checkpoints.save(4, state_of(4), wait=True)
        full_disk(None)
        (drafts[0] / "state" / "ocdbt.process_0").mkdir(parents=True)  # as a thread that is late would
        checkpoints.save(4, state_of(4), wait=True)
        assert_state(checkpoints.restore(4)[1], state_of(4))
        assert drafts[0].exists() and drafts[1] != drafts[0]
        for step in (5, 6, 7):
            checkpoints.save(step, state_of(step))
    assert sorted(path.name for path in saved.iterdir()) == ["6", "7"]


@in_orbax
def test_a_folder_that_cannot_hold_checkpoints_is_known_before_there_are_any(saved, full_disk):
    checkpoints = Checkpoints(saved)
    checkpoints.try_out()
    full_disk(20)
    with pytest.raises(CheckpointError, match=f"{saved} cannot hold checkpoints: "):
        checkpoints.try_out()
    full_disk(None)
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]
    (saved.parent / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file/run cannot hold checkpoints: NotADirectoryError"):
        Checkpoints(saved.parent / "file" / "run").try_out()


@in_orbax
def test_a_failed_save_surfaces_when_closing(saved, full_disk):
    checkpoints = Checkpoints(saved)
    full_disk(3000)
    checkpoints.save(4, state_of(4))
    with pytest.raises(CheckpointError, match="step 4 could not be saved"):
        checkpoints.close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        CheckpointError, match=rf"step 1 could not be saved to {tmp_path}/file/run/1: .*no earlier step"
    ):
        Checkpoints(tmp_path / "file" / "run").save(1, {"x": np.ones(2)})


def test_kill_during_a_save_leaves_the_one_before(tmp_path):
    code = """
import os, signal, sys
import numpy as np
from seqlab.train.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"x": np.arange(5)}, wait=True)
checkpoints.save(2, {"x": np.random.default_rng(0).random(8_000_000)})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("2.saving-*"))  # it had begun
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    step, state = checkpoints.restore()
    assert (step, state["x"].tolist()) == (1, [0, 1, 2, 3, 4])
    with checkpoints:
        checkpoints.save(2, {"x": np.arange(6)})
    assert checkpoints.restore(2)[1]["x"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_save_that_the_end_of_the_program_finds_in_progress_is_finished_or_reported(tmp_path):
    code = """
import sys
import numpy as np
from seqlab.train.checkpoint import Checkpoints
Checkpoints(sys.argv[1]).save(1, {"x": np.random.default_rng(0).random(8_000_000)})
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    if Checkpoints(tmp_path).steps():
        np.testing.assert_array_equal(
            Checkpoints(tmp_path).restore()[1]["x"], np.random.default_rng(0).random(8_000_000)
        )
    else:  # since Python 3.12 a program that ends cannot start the threads that Orbax needs
        assert "the program ended before a checkpoint was saved; close() the checkpoints" in done.stderr
        assert Checkpoints(tmp_path).restore() is None


# Several processes

PROCESS = """
import logging, pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
folder, port, index = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from seqlab.train.checkpoint import CheckpointError, Checkpoints

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

def state(seed):
    whole = np.arange(6, dtype=np.float32).reshape(2, 3) + seed
    spec = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.make_array_from_callback((2, 3), spec, lambda index: whole[index])
    return {"spread": spread, "same": np.float32(seed), "step": seed}

def assert_state(actual, seed):
    assert actual["spread"].sharding == state(0)["spread"].sharding
    [shard] = actual["spread"].addressable_shards
    assert np.array_equal(shard.data, np.arange(6).reshape(2, 3)[index : index + 1] + seed), shard.data
    assert (actual["same"], actual["step"]) == (seed, seed)

with Checkpoints(folder, keep=2) as checkpoints:
    for seed in (1, 2, 3):
        checkpoints.save(seed, state(seed))
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    step, restored = checkpoints.restore(like=state(0))
    assert step == 3
    assert_state(restored, 3)
    jax.experimental.multihost_utils.sync_global_devices("restored")
    if index == 0:
        for path in (folder / "3" / "state").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:-20])
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    step, restored = checkpoints.restore(like=state(0))
    assert step == 2
    assert_state(restored, 2)
    checkpoints.save(3, state(30))
    checkpoints.wait()
    assert_state(checkpoints.restore(like=state(0))[1], 30)
"""


def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    commands = [[sys.executable, "-c", PROCESS, tmp_path, port, str(index)] for index in range(2)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "3.damaged-1"]
    _, state = Checkpoints(tmp_path).restore()  # one process can go on with what two have saved
    assert state["spread"].tolist() == [[30, 31, 32], [33, 34, 35]]


# Templates


def test_a_state_that_does_not_fit_is_described_in_a_line(saved):
    like = state_of(0)
    like["params"] |= {f"extra.{n}": np.zeros(2) for n in range(50)}
    like["params"]["embed.weight"] = np.zeros((40, 51), np.float32)
    like["params"]["head.weight"] = np.zeros(50, np.float32)
    del like["optimizer"]["0/mu"]
    like["optimizer"]["0/count"] = 7
    with pytest.raises(CheckpointError) as error:
        Checkpoints(saved).restore(like=like)
    assert str(error.value) == (
        f"{saved}/3 does not fit the state that is asked for: "
        "50 not in the checkpoint: params/extra.0, params/extra.1, params/extra.10 and 47 more; "
        "1 only in the checkpoint: optimizer/0/mu; "
        "3 of another kind: optimizer/0/count is uint32[], expected a Python int, "
        "params/embed.weight is float32[40, 50], expected float32[40, 51], params/head.weight is "
        "bfloat16[50], expected float32[50]"
    )


def test_a_template_with_arrays_gives_arrays_like_them(saved):
    like = state_of(0) | {"step": np.int32(0)}
    step, state = Checkpoints(saved).restore(like=like)
    assert step == 3
    assert_state(state, state_of(3))
    embed = state["params"]["embed.weight"]
    assert isinstance(embed, jax.Array)
    assert not embed.committed  # as the template: it may join arrays that are spread over devices
    assert isinstance(state["optimizer"]["0/mu"], np.ndarray)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
    _, state = Checkpoints(saved).restore(like=abstract)
    assert_state(state, state_of(3))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state))


def test_from_one_device_to_eight_and_back(tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = {
        "a": NamedSharding(mesh, PartitionSpec("data", "tensor")),
        "b": NamedSharding(mesh, PartitionSpec(None)),
        "c": NamedSharding(mesh, PartitionSpec(("data", "tensor"))),
    }
    generator = np.random.default_rng(0)
    state = {
        "a": jnp.asarray(generator.normal(size=(8, 6)), jnp.float32),
        "b": jnp.asarray(generator.normal(size=(5,)), jnp.bfloat16),
        "c": jnp.arange(16),
    }
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread[name])
        for name, leaf in state.items()
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, wait=True)
        _, eight = checkpoints.restore(like=wanted)
        assert_identical(eight, state)
        assert all(eight[name].sharding == spread[name] for name in state)
        assert [shard.data.shape for shard in eight["a"].addressable_shards] == [(2, 3)] * 8
        checkpoints.save(2, eight, wait=True)
        _, one = checkpoints.restore(2, like=state)
        assert_identical(one, state)
        assert all(len(leaf.sharding.device_set) == 1 for leaf in one.values())
        assert_identical(checkpoints.restore(2, like=eight)[1], state)


def test_a_dtype_that_jax_would_change_is_an_error(tmp_path):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"n": np.array([2**40])}, wait=True)
        with pytest.raises(CheckpointError, match="n is int64 and JAX makes it int32: enable jax_enable_x64"):
            checkpoints.restore(like={"n": jax.ShapeDtypeStruct((1,), np.int64, sharding=device)})
        assert checkpoints.restore(like={"n": np.zeros(1, np.int64)})[1]["n"].tolist() == [2**40]


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"key": jax.random.key(0)}, TypeError, r"key: a typed PRNG key; save jax.random.key_data"),
        ({"a": {"b": None}}, TypeError, "a/b: a NoneType; a checkpoint holds"),
        ({"a": [np.ones(2)]}, TypeError, "a: a list"),
        ({"a": np.array(["x"])}, TypeError, "a: an array of <U1"),
        ({"a": {0: np.ones(2)}}, TypeError, "a: key 0; the keys of a checkpoint are non-empty strings"),
        ({"a/b": np.ones(2), "a": {"b": np.ones(2)}}, ValueError, "two leaves are named 'a/b'"),
        (
            {"a": np.ones(2), "a/b": np.ones(2)},
            ValueError,
            r"leaf \('a/b',\) cannot be stored inside leaf \('a',\)",
        ),
    ],
)
def test_what_cannot_be_stored_is_named_before_anything_is_written(tmp_path, state, error, message):
    with pytest.raises(error, match=message):
        Checkpoints(tmp_path / "run").save(1, state)
    assert not (tmp_path / "run").exists()
