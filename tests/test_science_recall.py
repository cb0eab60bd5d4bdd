"""Known results about recall, reproduced at small size: some memories hold what others of the same size lose.

Every test trains a few small models on one task and one budget through `seqlab.studies.compare` and holds
their accuracies against the claim.
"""

import figures
import pytest

from seqlab.studies import compare, report

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # grain and orbax warn as they please


def compared(folder, config, mixers, steps, *assignments):
    """Rows by the mixer's spec."""
    result = compare.compare(compare.plan([config], mixers, steps=steps, assignments=assignments), folder)
    print(report.as_text(compare.as_table(result)))
    return {row.name: row for row in result.rows}


def table(rows):
    return [
        [f"`{name}`", f"{row.parameters:,}", f"{row.state_bytes:,}", f"{row.quality:.3f}"]
        for name, row in rows.items()
    ]


HEADER = ["mixer", "parameters", "state bytes", "accuracy"]


def test_delta_rules_and_attention_recall_what_mamba_and_linear_attention_lose(tmp_path):
    """Sixteen bindings and sixteen questions in 64 steps (arXiv 2312.04927, 2406.06484), memories of several
    sizes, one budget."""
    families = {
        "attention": ["attention(heads=2)"],
        "delta_net": [f"delta_net(heads={n})" for n in (4, 2, 1)],
        "gated_delta_net": ["gated_delta_net(heads=2)"],
        "linear_attention": [f"linear_attention(heads={n})" for n in (4, 2, 1)],
        "mamba": [f"mamba(state_size={n})" for n in (4, 16, 32)],
    }
    mixers = ",".join(spec for specs in families.values() for spec in specs)
    task = ("data.pairs=16", "batch_size=32", "optimizer.peak=0.003", "optimizer.warmup=50")
    rows = compared(tmp_path, "mqar", mixers, 1500, *task)

    def draw(ax):
        for family, specs in families.items():
            ax.plot(
                [rows[s].state_bytes for s in specs], [rows[s].quality for s in specs], "o-", label=family
            )
        ax.set(xlabel="state of one stream (bytes)", ylabel="accuracy of recall", ylim=(-0.03, 1.05))
        ax.set_xscale("log", base=2)
        ax.legend(fontsize=8)

    claim = (
        "Four tokens at random places among noise are to be repeated in order. A memory of all inputs "
        "(LMU) cannot tell noise from data; one that selects its inputs (Mamba) can. Two layers of width "
        "64, 600 steps of 32 sequences."
    )
    figures.keep("recall", "Recall against bytes of state", claim, HEADER, table(rows), draw)
    worth = {name: row.quality for name, row in rows.items()}
    assert worth["attention(heads=2)"] >= 0.95 and worth["delta_net(heads=2)"] >= 0.95
    assert worth["gated_delta_net(heads=2)"] >= 0.95
    assert all(worth[name] < 0.5 for name in families["linear_attention"] + families["mamba"]), worth
    size = {name: row.state_bytes for name, row in rows.items()}
    assert size["delta_net(heads=2)"] < 1.1 * min(
        size["mamba(state_size=16)"], size["linear_attention(heads=1)"]
    )


def test_selection_copies_what_a_time_invariant_memory_cannot_pick_out(tmp_path):
    """Four tokens anywhere among noise (arXiv 2312.00752, section 3.1): an LMU remembers all of the window,
    whatever is in it."""
    task = ("data.length=32", "data.data=4", "batch_size=32", "optimizer.peak=0.005", "optimizer.warmup=30")
    mamba, invariant = "mamba", "LMU(channels=32, order=64, theta=32.0)"
    rows = compared(tmp_path, "selective_copying", f"{mamba},{invariant}", 600, *task)
    claim = (
        "Four tokens lie anywhere among noise and are to be repeated in their order. A memory of "
        "everything that came (LMU) does not know "
        "which steps were noise; one that chooses what it takes in (Mamba) does. Two layers of width 64, "
        "600 steps of 32 sequences."
    )
    figures.keep("selective_copying", "Selective copying", claim, HEADER, table(rows))
    assert rows[mamba].quality >= 0.95
    assert rows[invariant].quality < 0.6
    assert rows[invariant].state_bytes > 0.8 * rows[mamba].state_bytes
