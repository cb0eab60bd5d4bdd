"""A million tokens: memory flat, speed constant, one compiled step. Past the trained length: which caches
leave what the model knows, that their streams say so, and that every cache obeys the contract there.

python tests/test_endless.py [TOKENS]     prints the figures
"""

import functools
import os
import sys
import time
import warnings

import pytest

TRAINED = 8
STORAGE = ("", "+int8(group=4, residual=4)", "+int4(group=4, residual=4, values=8)")
STORAGE += ("+int2(group=4, residual=8)",)
BOUNDED = [f"{kept}{stored}" for kept in ("sinks(2)+window(5)", "window(6)") for stored in STORAGE]
BOUNDED += ["window(8)+moba(4, 2)", "heads(0 1 | window(6) | sinks(2)+window(5)+int4(group=4, residual=4))"]
LEAVING = [f"full(40){stored}" for stored in STORAGE] + [f"full(4){stored}+grows" for stored in STORAGE]
LEAVING += [f"sinks(2)+window(5){stored}+absolute" for stored in STORAGE]
LEAVING += ["full(40)+moba(4, 2)", "full(4)+moba(4, 2)+grows", "window(40)", "sinks(2)+window(20)"]
LEAVING += ["heads(0 1 | full(40) | sinks(2)+window(5))"]
QUICK = ("sinks(2)+window(5)", "sinks(2)+window(5)+absolute")


def slow_but(chosen, names):
    """All of `names`, those not chosen marked slow."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


def attention_model(cache, **options):
    """A small model of attention with rotary positions that was trained on `TRAINED` positions."""
    from flax import nnx

    from seqlab.models import Attention, LanguageModel

    attention = functools.partial(Attention, heads=2, head_dim=16, cache=cache, **options)
    return LanguageModel(11, 8, 1, attention, channel_mixer=None, trained_length=TRAINED, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("cache", [*BOUNDED, *LEAVING])
def test_it_is_known_which_caches_leave_the_trained_length(cache):
    from seqlab.models.attention import leaves_training

    assert leaves_training(attention_model(cache)) == (TRAINED if cache in LEAVING else None)
    assert leaves_training(attention_model(cache, rotary_base=None)) is None, "no positions, nothing to leave"


@pytest.mark.parametrize("cache", slow_but(QUICK, [*BOUNDED, *LEAVING]))
def test_a_stream_that_leaves_the_trained_length_says_so_once(cache):
    import seqlab
    from seqlab.streaming.generate import BeyondTraining

    model = attention_model(cache)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stream = seqlab.stream_generate(model, [1, 2, 3], max_tokens=TRAINED - 3)
        assert sum(1 for _ in stream) == TRAINED - 3
        assert not said and stream.stats["beyond_training"] == 0, (
            "up to the trained length nothing is to be said"
        )
        stream = seqlab.stream_generate(model, [1, 2, 3], max_tokens=3 * TRAINED, block=4)
        assert sum(1 for _ in stream) == 3 * TRAINED
    leaves = cache in LEAVING
    assert [(warning.category, warning.filename) for warning in said] == [(BeyondTraining, __file__)] * leaves
    assert stream.stats["beyond_training"] == (3 + 2 * TRAINED if leaves else 0)


def test_a_prompt_beyond_the_trained_length_is_told_of_too():
    import seqlab
    from seqlab.streaming.generate import BeyondTraining

    with pytest.warns(BeyondTraining, match=f"the {TRAINED} positions"):
        stream = seqlab.stream_generate(attention_model("full(40)"), [1] * 9, max_tokens=0)
    assert stream.stats["beyond_training"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("cache", [*BOUNDED, *LEAVING])
def test_every_cache_obeys_the_contract_past_twice_the_trained_length(cache):
    import seqlab

    mixer = attention_model(cache).backbone.blocks[0].mixer
    seqlab.verify_streaming(mixer, length=5 * TRAINED, gradients=cache in QUICK).raise_for_failure()


def resident():
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stream(total, report=lambda line: None):
    """Stream `total` tokens from a hybrid; (growth of memory after 10,000 tokens, seconds of every tenth of
    the stream, programs)."""
    from flax import nnx

    import seqlab
    from seqlab.models import Attention, GatedLinearAttention, LanguageModel, Mamba, Window

    attention = functools.partial(Attention, heads=4, cache=Window(64, sinks=4))
    model = LanguageModel(
        256,
        64,
        3,
        (Mamba, attention, functools.partial(GatedLinearAttention, conv_width=4)),
        rngs=nnx.Rngs(0),
    )
    tokens = seqlab.stream_generate(model, "def ", block=128)
    tenths, begin, settled = [], time.perf_counter(), 0
    warm = max(total // 100, 1)  # compilation is over by then
    for count, _ in enumerate(tokens, 1 - warm):
        if count == 0:
            begin = time.perf_counter()
        if count == min(10_000, total // 10):
            settled = resident()
        if count > 0 and count % (total // 10) == 0:
            tenths.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            report(
                f"{count:,} tokens, {total // 10 / tenths[-1]:,.0f} tok/s, "
                f"{(resident() - settled) / 2**20:+.1f} MB since 10,000"
            )
        if count == total:
            break
    return resident() - settled, tenths, tokens.stats["programs"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_long_stream_holds_constant_memory():
    growth, _, programs = stream(200_000)
    assert growth < 5 * 2**20
    assert programs == 2  # one chunk size of the prompt, one decode step


def main():
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    growth, tenths, programs = stream(total, report=lambda line: print(line, flush=True))
    print(
        f"memory {growth / 2**20:+.1f} MB, last tenth / first tenth of the time "
        f"{tenths[-1] / tenths[0]:.3f}, {programs} programs compiled"
    )


if __name__ == "__main__":
    main()
