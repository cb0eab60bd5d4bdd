"""Any user error gives one line and exit code 2: `python tests/fuzz.py` draws a thousand."""

import gc

import fuzz
import fuzz_streams
import jax
import pytest


@pytest.fixture(scope="module")
def scene():
    """A folder with everything that command lines name, and nothing compiled kept outside it."""
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", *_CACHE)}
    with fuzz.scratch() as root:
        jax.config.update("jax_compilation_cache_dir", str(root / "cache" / "xla"))
        yield root
    for name, value in before.items():
        jax.config.update(name, value)
    gc.collect()


_CACHE = ("jax_persistent_cache_min_compile_time_secs",)
WATCH = fuzz.Watch()  # there is no way to take one away again


def found(report):
    return "\n".join(f"{fault}\n    {call}" for call, fault in report.found)


@pytest.mark.filterwarnings("default")
def test_command_lines_at_random_are_refused_in_a_line(scene):
    report = fuzz.commands(60, seed=7, root=scene, watch=WATCH, real=0)
    assert not report.found, found(report)
    assert report.outcomes["code 2"] > 30


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("seed", range(4))
def test_many_command_lines_at_random_are_refused_in_a_line(seed, scene):
    report = fuzz.commands(250, seed=100 + seed, root=scene, watch=WATCH, real=2)
    assert not report.found, found(report)


def test_options_of_streams_at_random_are_refused_or_obeyed():
    report = fuzz_streams.streams(40, seed=3, prompts=["abc", [1, 2, 3], b"xy"])  # one row: few programs
    assert not report.found, found(report)
    assert report.outcomes["streamed"] > 4 and report.outcomes["refused"] > 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_options_of_streams_at_random_are_refused_or_obeyed(seed):
    report = fuzz_streams.streams(250, seed=100 + seed)
    assert not report.found, found(report)


def test_the_watch_sees_what_is_written_outside(scene):
    here = scene / "here"
    here.mkdir()
    WATCH.allowed, WATCH.outside, WATCH.on = (str(here),), [], True
    try:
        (scene / "outside").write_text("x")
        (here / "inside").write_text("x")
        (scene / "outside").read_text()
        (scene / "folder").mkdir()
    finally:
        WATCH.on = False
    assert WATCH.outside == [str(scene / "outside"), str(scene / "folder")]
