"""README and docs run as they stand.

Blocks of Python are executed, page by page and in order, in an empty folder that holds one trained run,
runs/demo. A block that begins with `# name.py` is the file of that name. Of shell commands the programs,
files, targets and arguments are looked up, and configs are built; the slow tests run them.
"""

import argparse
import importlib
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import seqlab
from seqlab import cli
from seqlab.models.cache import parse_cache
from seqlab.train import config, loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MIXERS = sorted(set((DOCS / "mixers").glob("*.md")) - {DOCS / "mixers" / "README.md"})
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(set(DOCS.rglob("*.md")) - set(MIXERS))]
OTHERS = (".", "cd", "git", "pip", "tensorboard", "srun", "curl")  # programs that are not ours to check
FOLLOWED = (
    "tutorial.md",
    "how-to/own-mixer.md",
    "how-to/config.md",
    "how-to/data.md",
    "how-to/devices.md",
    "how-to/export.md",
)
# Among the slow tests.
LONG = (
    "tutorial.md",
    "how-to/batch.md",
    "how-to/cache.md",
    "how-to/devices.md",
    "how-to/speculate.md",
    "explanation/contract.md",
    "explanation/algebras.md",
)
WITH_FLAGS = re.compile(r"^\w+=\S+$")


def blocks(page):
    """(language, text) of the fenced blocks of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    """The shell commands of a page: of blocks, of indented lines, and in `backticks`."""
    for language, text in blocks(page):
        if language in ("sh", "bash"):
            yield from text.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"^ {4}((?:seqlab|make|pytest|python) .*)$", prose, re.MULTILINE)
    yield from re.findall(r"`((?:seqlab|pytest|python|make) [a-z-][^`]*)`", prose)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The run of the tutorial, for a moment only, but with heads wide enough for every cache."""
    folder, cfg = tmp_path_factory.mktemp("trained") / "demo", config.fiddle(config.load("demo"), "tiny")
    for assignment in ("model.dim=64", "steps=2", "checkpoint_every=1", "model.mixers[1].cache.window=64"):
        cfg = config.override(cfg, assignment)
    cfg = config.override(cfg, "data.length=128")  # pages stream as far
    config.prepare(cfg, folder)
    loop.run(config.build(cfg), folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, whose modules can be imported and are forgotten afterwards; streams without
    end have one there."""
    monkeypatch.chdir(tmp_path)
    endless = seqlab.stream_generate
    monkeypatch.setattr(
        seqlab, "stream_generate", lambda *args, **options: endless(*args, **({"max_tokens": 40} | options))
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if pathlib.Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def file_of(text):
    found = re.match(r"# (\w+)\.py\b", text)
    return found and found.group(1)


def write_files(page, folder):
    for language, text in blocks(page):
        if language == "python" and file_of(text):
            (folder / f"{file_of(text)}.py").write_text(text)


def named(page):
    return str(page.relative_to(ROOT))


WITH_PYTHON = [
    pytest.param(page, id=named(page), marks=[pytest.mark.slow] * (page in [DOCS / name for name in LONG]))
    for page in PAGES
    if "```python" in page.read_text()
]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page, workplace, request):
    if "runs/demo" in page.read_text():
        shutil.copytree(request.getfixturevalue("trained"), workplace / "runs" / "demo")
    follow(page, workplace)


def follow(page, folder, shell=lambda text: None):
    """Every block of the page, in order, as its reader would run them."""
    names = {"__name__": "__main__"}
    for language, text in blocks(page):
        if language == "sh":
            shell(text)
        elif language == "python" and (name := file_of(text)):
            (folder / f"{name}.py").write_text(text)
            importlib.invalidate_caches()
            names |= vars(importlib.import_module(name))
        elif language == "python":
            exec(compile(text, page.name, "exec"), names)


@pytest.mark.parametrize("page", MIXERS, ids=lambda page: page.stem)
def test_the_use_of_a_mixer_is_as_its_page_says(page):
    (code,) = (text for language, text in blocks(page) if language == "python")
    names = {"x": jnp.zeros((2, 8, 64)), "batch": 2}
    jax.eval_shape(lambda: exec(compile(code, page.name, "exec"), names))  # traced, not computed
    assert names["y"].shape[:1] == (2,)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_commands_of_a_page_are_there(page, workplace):
    write_files(page, workplace)
    found = [list(line) for line in map(simple_commands, commands(page)) for line in line]
    for words in found:
        check(words)


def simple_commands(line):
    """The commands of a line without assignments in front of them and remarks behind; what stands between
    quotes is one word."""
    words = []
    for word in [*shlex.split(re.split(" {2,}", line)[0].removeprefix("$ ")), "&&"]:
        if word not in ("&&", "|", ";", "||"):
            if words or not WITH_FLAGS.match(word):
                words.append(word)
        elif words:
            yield words
            words = []


def check(words):
    program, *rest = words
    if program == "seqlab":
        check_arguments(rest)
    elif program == "make":
        targets = (
            re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
        )
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif program in ("python", "python3") and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), words
    elif program in ("python", "python3"):
        assert (
            rest[0].startswith("-")
            or rest[0].endswith("/run.py")
            or (ROOT / rest[0]).is_file()
            or pathlib.Path(rest[0]).is_file()
        ), words
    elif program == "pytest":
        for path in (word.partition("::")[0] for word in rest if "/" in word and "<" not in word):
            assert (ROOT / path).exists(), words
    else:
        assert program in OTHERS, f"nobody checks {program!r}: {words}"


def check_arguments(rest):
    """Those of seqlab: read by its parser; a config is built unless it is called NAME or the like, words for
    a cache are read."""
    (commands,) = (
        action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    # A command is named, not given.
    if rest == ["--help"] or (len(rest) == 1 and rest[0] in commands.choices):
        return
    arguments = cli.parser().parse_args(rest)
    for name in getattr(arguments, "configs", [getattr(arguments, "config", "NAME")]):
        if name.isupper():
            continue
        cfg = config.load(name)
        for call in arguments.fiddler:
            cfg = config.fiddle(cfg, call)
        for assignment in arguments.set:
            cfg = config.override(cfg, assignment)
        config.build(cfg)
    if getattr(arguments, "cache", None) not in (None, "SPEC"):
        parse_cache(arguments.cache)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_newcomer_can_follow_a_page(name, workplace, request):
    """The shell commands too, all but those of the installation; the run of the tutorial is trained by its
    own command."""
    page = DOCS / name
    if name != "tutorial.md" and "runs/demo" in page.read_text():
        shutil.copytree(request.getfixturevalue("trained"), workplace / "runs" / "demo")
    python = shlex.quote(sys.executable)
    start = f'set -e; srun() {{ true; }}; python() {{ {python} "$@"; }}; '
    start += f'seqlab() {{ {python} -m seqlab "$@"; }}\n'
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{workplace}",
        "XLA_FLAGS": "",
        "XDG_CACHE_HOME": str(workplace / "cache"),
    }

    def shell(text):
        if "make setup" not in text and ".venv" not in text:
            done = subprocess.run(
                ["bash", "-c", start + text],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
            )
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    follow(page, workplace, shell)
