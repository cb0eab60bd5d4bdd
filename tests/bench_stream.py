"""Decoding speed: `stream_generate` beside a loop over `nnx.jit`, and beside Hugging Face `generate` on
torch, for models of equal size.

    python tests/bench_stream.py [--torch-python PATH_OF_A_PYTHON_WITH_TORCH_AND_TRANSFORMERS] [--sizes 2 50]
    [--rounds 3]

Ratios are taken within one run, the contestants in turn; compilation and warm-up are left out on every side.
"""

import argparse
import functools
import statistics
import subprocess
import time

SHAPES = {  # millions of parameters: (Mamba width, layers), (Llama width, layers), tokens to time
    2: ((192, 8), (192, 5), 256),
    50: ((768, 14), (768, 7), 32),
}

HUGGING_FACE = """
import sys, time, torch, transformers
kind, width, layers, tokens = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(2)
transformers.logging.set_verbosity_error()
if kind == "mamba":
    config = transformers.MambaConfig(vocab_size=256, hidden_size=width, num_hidden_layers=layers)
    model = transformers.MambaForCausalLM(config).eval()
else:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=-(-8 * width // 192) * 64, tie_word_embeddings=True, max_position_embeddings=4096)
    model = transformers.LlamaForCausalLM(config).eval()
prompt = torch.arange(16)[None]
fixed = dict(attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0)
run = lambda n: model.generate(prompt, max_new_tokens=n, min_new_tokens=n, **fixed)
with torch.inference_mode():
    run(8)
    begin = time.perf_counter()
    run(tokens)
print(sum(p.numel() for p in model.parameters()), tokens / (time.perf_counter() - begin))
"""


def build(kind, width, layers):
    from flax import nnx

    from seqlab.models import Attention, Full, LanguageModel, Mamba

    attention = functools.partial(Attention, heads=width // 64, cache=Full(1024))
    options = {"mixers": Mamba, "channel_mixer": None} if kind == "mamba" else {"mixers": attention}
    return LanguageModel(256, width, layers, rngs=nnx.Rngs(0), **options)


def ours(model, tokens):
    import seqlab

    stream = seqlab.stream_generate(model, list(range(16)), temperature=0, block=32)
    for _ in range(64):
        next(stream)
    begin = time.perf_counter()
    for _ in range(tokens):
        next(stream)
    return tokens / (time.perf_counter() - begin)


def nnx_loop(model, tokens):
    import jax.numpy as jnp
    from flax import nnx

    @nnx.jit
    def step(model, token, state):
        logits, state = model(token, state)
        return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), state

    token, state = jnp.zeros((1, 1), jnp.int32), model.init_state(1)
    for count in (8, tokens):
        begin = time.perf_counter()
        for _ in range(count):
            token, state = step(model, token, state)
            int(token[0, 0])
    return tokens / (time.perf_counter() - begin)


def theirs(python, *arguments):
    # Not from this folder: a folder named `kernels` would be taken for the package that transformers looks
    # for.
    command = [python, "-c", HUGGING_FACE, *map(str, arguments)]
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.split()[1]
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python")
    parser.add_argument("--sizes", type=int, nargs="+", default=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    import seqlab

    for size in args.sizes:
        *shapes, tokens = SHAPES[size]
        for kind, (width, layers) in zip(("mamba", "llama"), shapes, strict=True):
            model = build(kind, width, layers)
            contestants = {
                "seqlab": functools.partial(ours, model, tokens),
                "nnx.jit": functools.partial(nnx_loop, model, tokens),
            }
            if args.torch_python:
                contestants["hugging face"] = functools.partial(
                    theirs, args.torch_python, kind, width, layers, tokens
                )
            rounds = [{name: run() for name, run in contestants.items()} for _ in range(args.rounds)]
            line = [f"{name} {statistics.median(r[name] for r in rounds):,.0f} tok/s" for name in contestants]
            line += [
                f"{statistics.median(r['seqlab'] / r[name] for r in rounds):.1f}x {name}"
                for name in contestants
                if name != "seqlab"
            ]
            print(f"{kind} {seqlab.count_params(model) / 1e6:.1f} M: " + ", ".join(line), flush=True)


if __name__ == "__main__":
    main()
