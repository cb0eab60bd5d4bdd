"""A real model, SmolLM2-135M: loading, reading, decoding and serving, beside Hugging Face on torch.

    SEQLAB_SMOLLM2=PATH_OF_THE_WHEEL_OR_GGUF python tests/bench_real.py
        [--torch-python PATH_OF_A_PYTHON_WITH_TORCH_AND_TRANSFORMERS] [--rounds 3] [--streams 1 4 16]

float32, as many threads as there are processors, greedy, compilation and warm-up left out on every side; the
contestants take turns, and ratios are of medians of one run. Peak memory is of a fresh process that reads a
prompt of 256 tokens and draws 32.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import real_model

PROMPT, DRAWN, LONG = 32, 48, 2000

HUGGING_FACE = """
import json, sys, time, torch, transformers
folder, prompt, drawn, long = sys.argv[1], *map(int, sys.argv[2:5])
transformers.logging.set_verbosity_error()
torch.set_num_threads(torch.get_num_threads())
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
def ids(rows, length):
    return (torch.arange(rows)[:, None] * 7 + torch.arange(length)[None]) % 4096 + 100
@torch.inference_mode()
def draw(rows, tokens):
    x = ids(rows, prompt)
    model.generate(x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=tokens,
                   min_new_tokens=tokens, pad_token_id=0)
@torch.inference_mode()
def read():
    model(ids(1, long), use_cache=True, logits_to_keep=1)
for line in sys.stdin:
    rows = int(line)
    act = (lambda: read()) if rows == 0 else (lambda: draw(rows, drawn))
    begin = time.perf_counter(); act(); took = time.perf_counter() - begin
    print(json.dumps(took), flush=True)
"""


def ids(rows, length):
    return [[(row * 7 + i) % 4096 + 100 for i in range(length)] for row in range(rows)]


class Peer:
    """Hugging Face in a process of its own, told what to do line by line."""

    def __init__(self, python, folder):
        # -P: not the current folder, whose `kernels` transformers would take for a package that it knows.
        words = [python, "-P", "-c", HUGGING_FACE, str(folder), str(PROMPT), str(DRAWN), str(LONG)]
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(words, **pipes, stderr=subprocess.DEVNULL, env=own, text=True)

    def seconds(self, rows):
        """To draw for so many rows; 0: to read the long prompt."""
        self._process.stdin.write(f"{rows}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def drawn_in(batcher, rows):
    """Seconds in which the batcher answers so many requests."""
    begin = time.perf_counter()
    options = {"max_tokens": DRAWN, "temperature": 0, "logit_bias": {2: -1e9, 0: -1e9}}
    requests = [batcher.submit(prompt, **options) for prompt in ids(rows, PROMPT)]
    for request in requests:
        request.result()
    return time.perf_counter() - begin


def read_in(model):
    """Seconds in which `stream_generate` reads the long prompt."""
    from seqlab import stream_generate

    begin = time.perf_counter()
    list(stream_generate(model, ids(1, LONG)[0], max_tokens=0))
    return time.perf_counter() - begin


PEAK = """
import resource, sys, time
begin = time.perf_counter()
import seqlab
run = seqlab.load(sys.argv[1])
weights = sum(leaf.nbytes for leaf in seqlab.params_of(run.model).values())
loaded = time.perf_counter() - begin
list(seqlab.stream_generate(run.model, [i + 100 for i in range(256)], max_tokens=32))
took = time.perf_counter() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"load {loaded:.1f} s, load to 32 tokens {took:.1f} s, peak {peak / 1e9:.2f} GB, "
      f"{peak / weights:.2f} times the weights")
"""


def peak(path):
    """What a fresh process takes, twice: the second finds the programs in the compile cache."""
    with tempfile.TemporaryDirectory() as cache:
        known = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        for title in ("first process", "second process"):
            done = subprocess.run(
                [sys.executable, "-c", PEAK, path], env=os.environ | known, capture_output=True, text=True
            )
            print(f"{title}: {done.stdout.strip() or done.stderr[-300:]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="a Python with torch and transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    args = parser.parse_args()

    import seqlab

    with tempfile.TemporaryDirectory() as folder:
        path = str(real_model.gguf_file(folder))
        peak(path)
        run = seqlab.load(path)
        peer = None
        if args.torch_python:
            saved = pathlib.Path(folder) / "saved"
            seqlab.save_pretrained(run.model, saved)
            peer = Peer(args.torch_python, saved)
        rows = max(args.streams)
        batcher = seqlab.Batcher(run.model, rows, steps=256, tokenizer=run.tokenizer)
        begin = time.perf_counter()
        batcher.warm_up()
        print(f"warm-up of {rows} rows: {time.perf_counter() - begin:.0f} s", flush=True)
        print("\n| work | seqlab | Hugging Face | ratio |\n|---|---:|---:|---:|")
        read_in(run.model)
        for count in [0, *args.streams]:
            ours, theirs = [], []
            for turn in range(args.rounds + 1):  # the first warms up
                took = read_in(run.model) if count == 0 else drawn_in(batcher, count)
                other = peer.seconds(count) if peer else float("nan")
                if turn:
                    ours.append(took)
                    theirs.append(other)
            tokens = LONG if count == 0 else count * DRAWN
            rates = [tokens / statistics.median(times) for times in (ours, theirs)]
            title = f"read a prompt of {LONG:,}" if count == 0 else f"{count} streams of {DRAWN} tokens"
            cells = f"{rates[0]:,.1f} tokens/s | {rates[1]:,.1f} tokens/s | {rates[0] / rates[1]:.2f}"
            print(f"| {title} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
