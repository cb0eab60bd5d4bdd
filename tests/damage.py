"""Every file of a run folder, flipped, cut and deleted in turn: it is detected, or harmless, never a wrong
number.

    python tests/damage.py                 print the table of docs/explanation/damage.md
    python tests/damage.py --write         write it there

After each damage the run is loaded and resumed. What is loaded must be the parameters of a step that was
saved, and what is resumed must end with the state of the undamaged run, bit for bit; or either must be
refused with an error for users.
"""

import argparse
import logging
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np

import seqlab
from seqlab.checks import UserError
from seqlab.train import config
from seqlab.train.checkpoint import CheckpointError, Checkpoints
from seqlab.train.loop import run

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "explanation" / "damage.md"
MARK = "<!-- the table: python tests/damage.py --write -->\n"
KINDS = (  # by the first pattern that matches the path in the folder; what is in the newest step
    (r"checkpoints/4/commit_success.txt", "`checkpoints/<step>/commit_success.txt`"),
    (r"checkpoints/4/manifest/.*", "`checkpoints/<step>/manifest/manifest.json`"),
    (
        r"checkpoints/4/state/(.*/)?d/.*|checkpoints/4/state/manifest.ocdbt",
        "`checkpoints/<step>/state/`, arrays",
    ),
    (r"checkpoints/4/state/.*", "`checkpoints/<step>/state/`, notes of Orbax"),
    (r"events.out.*", "`events.out.tfevents.*`"),
    (r"(config\.json|config\.txt|data\.txt|env\.jsonl|metrics\.jsonl|curves\.png|lock)", r"`\1`"),
)
DAMAGES = ("flipped", "cut", "deleted")


def small() -> config.fdl.Config:
    """A run of four steps, two of them saved."""
    cfg = config.fiddle(config.load("demo"), "tiny")
    for line in ("steps=4", "checkpoint_every=2", "keep=2", "batch_size=2", "data.length=16", "log_every=1"):
        cfg = config.override(cfg, line)
    return config.override(cfg, "validation_windows=2")


def longer(cfg: config.fdl.Config) -> config.fdl.Config:
    """Two steps more, so that there is something to resume."""
    return config.override(cfg, "steps=6")


def damages(path: pathlib.Path) -> Iterator[tuple[str, Callable[[pathlib.Path], None]]]:
    """Damage to a file: bits flipped at four places, truncation to half and by a byte, deletion."""
    size = path.stat().st_size

    def flip(at: int, bits: int) -> Callable[[pathlib.Path], None]:
        def change(file: pathlib.Path) -> None:
            data = bytearray(file.read_bytes())
            data[at] ^= bits
            file.write_bytes(data)

        return change

    if size:
        for n in range(4):
            yield "flipped", flip(min(size - 1, n * size // 3), 0xFF if n % 2 else 0x01)
        for length in sorted({size // 2, size - 1}):
            yield "cut", lambda file, length=length: file.write_bytes(file.read_bytes()[:length])
    yield "deleted", pathlib.Path.unlink


def same(left: object, right: object) -> bool:
    """Whether two trees are equal bit for bit."""
    a, b = jax.tree.leaves(left), jax.tree.leaves(right)
    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b, strict=True)
    )


class Warnings(logging.Handler):
    """The number of skipped steps."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        logging.getLogger("seqlab").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def outcome(
    folder: pathlib.Path, known: dict[int, object], ends: dict[int, object], warnings: Warnings
) -> str:
    """The outcome of loading and resuming a damaged run. Raises AssertionError for a wrong number."""
    warnings.count = 0
    try:
        loaded = seqlab.load(folder)
        params = seqlab.params_of(loaded.model)
        assert same({name: np.asarray(leaf) for name, leaf in params.items()}, known[loaded.step])
        loading = "harmless" if loaded.step == 4 else "the step before is used"
        assert loaded.step == 4 or warnings.count
    except (UserError, CheckpointError):
        loading = "refused"
    cfg = longer(small())
    warnings.count = 0
    try:
        result = run(config.build(cfg), folder, cfg, extend=True)
        resuming = "the step before is used" if warnings.count else "harmless"
        assert same(result.state, ends[2 if warnings.count else 4]), folder
    except (UserError, CheckpointError):
        resuming = "refused"
    return loading if loading == resuming else f"load: {loading}; resume: {resuming}"


def survey(root: pathlib.Path, only: str = "") -> dict[str, dict[str, set[str]]]:
    """By kind of file and damage, what came of it; `only` is a pattern of paths."""
    cfg, warnings = small(), Warnings()
    run(config.build(cfg), root / "run", cfg)
    with Checkpoints(root / "run" / "checkpoints") as checkpoints:
        known = {step: checkpoints.restore(step, only="params")[1]["params"] for step in checkpoints.steps()}
    assert sorted(known) == [2, 4]
    ends = {}
    for step in known:  # resumed from there; a longer schedule makes them differ
        shutil.copytree(root / "run", root / f"from{step}")
        if step == 2:
            shutil.rmtree(root / "from2" / "checkpoints" / "4")
        ends[step] = run(config.build(longer(cfg)), root / f"from{step}", longer(cfg), extend=True).state
    found: dict[str, dict[str, set[str]]] = {}
    for path in sorted(path for path in (root / "run").rglob("*") if path.is_file()):
        name = path.relative_to(root / "run").as_posix()
        kind = next(
            (re.sub(pattern, said, name) for pattern, said in KINDS if re.fullmatch(pattern, name)), None
        )
        if kind is None or not re.search(only, name):
            assert kind or name.startswith("checkpoints/2/"), name
            continue
        for damage, apply in damages(path):
            copy = root / "copy"
            shutil.copytree(root / "run", copy)
            apply(copy / name)
            came = outcome(copy, known, ends, warnings)
            found.setdefault(kind, {}).setdefault(damage, set()).add(came)
            shutil.rmtree(copy)
    return found


def table(found: dict[str, dict[str, set[str]]]) -> str:
    """The survey as Markdown."""
    lines = [f"| file | {' | '.join(DAMAGES)} |", "|" + "---|" * 4]
    for kind in sorted(found):
        cells = [", or ".join(sorted(found[kind].get(damage, {"-"}))) for damage in DAMAGES]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or write it into its page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="", metavar="PATTERN", help="of the paths in the run folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(root, "xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        text = (
            table(survey(pathlib.Path(root), args.only))
            if not args.only
            else survey(pathlib.Path(root), args.only)
        )
    if args.write:
        head, _, _ = PAGE.read_text().partition(MARK)
        PAGE.write_text(head + MARK + "\n" + text)
    else:
        print(text)


if __name__ == "__main__":
    main()
