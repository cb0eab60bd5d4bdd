"""A million tokens: memory flat, speed constant, one compiled step.

python tests/test_endless.py [TOKENS]     prints the figures
"""

import functools
import os
import sys
import time

import pytest


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
