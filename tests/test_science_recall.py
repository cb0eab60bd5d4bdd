"""What the field says about recall, shown at the size of a laptop: some memories hold what others of the same size lose.

Every test trains a few small models on one task and one budget through `seqlab.compare` and holds their accuracies against the claim.
"""

import pytest

from seqlab import compare

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # grain and orbax warn as they please

COMMON = ["optimizer.peak=0.005", "optimizer.warmup=30"]


def accuracies(folder, config, mixers, steps, *assignments):
    """Mixer by mixer (without its options): accuracy on held-out examples, and bytes of state."""
    result = compare.compare(compare.plan([config], mixers, steps=steps, assignments=[*COMMON, *assignments]), folder)
    print(compare.as_text(result))
    names = [row.name.partition("(")[0] for row in result.rows]
    return {name: row.quality for name, row in zip(names, result.rows, strict=True)}, {
        name: row.state_bytes for name, row in zip(names, result.rows, strict=True)
    }


def test_a_delta_rule_recalls_what_mamba_and_linear_attention_of_the_same_size_lose(tmp_path):
    """Sixteen bindings and sixteen questions in 64 steps (arXiv 2312.04927, 2406.06484)."""
    mixers = "delta_net(heads=2),linear_attention(heads=2),mamba"
    accuracy, size = accuracies(tmp_path, "mqar", mixers, 450, "data.pairs=16", "batch_size=32")
    assert accuracy["delta_net"] >= 0.95
    assert accuracy["linear_attention"] < 0.5 and accuracy["mamba"] < 0.5
    assert max(size.values()) < 1.3 * min(size.values())


def test_attention_recalls_what_linear_attention_loses(tmp_path):
    """Eight bindings and eight questions in 32 steps: all that was seen against one matrix a head (arXiv 2312.04927)."""
    task = ("data.vocab_size=32", "data.length=32", "data.pairs=8", "batch_size=64")
    accuracy, _ = accuracies(tmp_path, "mqar", "attention(heads=2),linear_attention(heads=2)", 1500, *task)
    assert accuracy["attention"] >= 0.95
    assert accuracy["linear_attention"] < 0.5


def test_selection_copies_what_a_time_invariant_memory_cannot_pick_out(tmp_path):
    """Four tokens anywhere among noise (arXiv 2312.00752, section 3.1): an LMU remembers all of the window, whatever is in it."""
    task = ("data.length=32", "data.data=4", "batch_size=32")
    accuracy, size = accuracies(tmp_path, "selective_copying", "mamba,LMU(channels=32, order=64, theta=32.0)", 600, *task)
    assert accuracy["mamba"] >= 0.95
    assert accuracy["LMU"] < 0.6
    assert size["LMU"] > 0.8 * size["mamba"]
