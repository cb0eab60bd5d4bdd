"""Training speed: a training step here beside the same model in plain torch on the same CPU.

    python tests/bench_train.py --torch-python PATH_OF_A_PYTHON_WITH_TORCH [--rounds 3] [--length 512]

Mamba and the gated delta rule against torch's recurrence written step by step and in chunks, as the reference
code of both has them; attention against torch's fused `scaled_dot_product_attention`. Ratios are taken within
one run, the contestants in turn; compilation and warm-up are left out on every side.
"""

import argparse
import functools
import statistics
import subprocess
import time

WIDTH, LAYERS, BATCH = 192, 4, 8

TORCH = '''
import sys, time, torch, torch.nn as nn, torch.nn.functional as F
kind, width, layers, batch, length, steps = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(2)

class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__(); self.weight = nn.Parameter(torch.ones(d))
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight

def scan_steps(u, dt, A, B, C):
    h, ys = torch.zeros(u.shape[0], u.shape[2], A.shape[1]), []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1)

def scan_chunks(u, dt, A, B, C, size=16):
    """Inside a chunk all pairs of steps at once (log-space differences), from chunk to chunk the state."""
    b, t, e = u.shape
    h, ys = torch.zeros(b, e, A.shape[1]), []
    mask = torch.tril(torch.ones(size, size, dtype=torch.bool))[None, :, :, None, None]
    for s in range(0, t, size):
        x, d = (dt[:, s:s+size] * u[:, s:s+size]), dt[:, s:s+size].cumsum(1)
        decay = torch.exp(torch.where(mask, (d[:, :, None] - d[:, None])[..., None] * A, -torch.inf))
        inside = torch.einsum("btsen,bse,bsn,btn->bte", decay, x, B[:, s:s+size], C[:, s:s+size])
        start = torch.exp(d[..., None] * A)
        ys.append(inside + torch.einsum("bten,ben,btn->bte", start, h, C[:, s:s+size]))
        h = start[:, -1] * h + torch.einsum("bsen,bse,bsn->ben", decay[:, -1], x, B[:, s:s+size])
    return torch.cat(ys, 1)

class Mamba(nn.Module):
    def __init__(self, d, scan):
        super().__init__()
        e, self.r, self.n, self.scan = 2 * d, -(-d // 16), 16, scan
        self.inp, self.xp = nn.Linear(d, 2 * e, bias=False), nn.Linear(e, self.r + 32, bias=False)
        self.dt = nn.Linear(self.r, e)
        self.conv, self.out = nn.Conv1d(e, e, 4, groups=e, padding=3), nn.Linear(e, d, bias=False)
        self.A_log = nn.Parameter(torch.log(torch.arange(1., 17)).repeat(e, 1))
        self.D = nn.Parameter(torch.ones(e))
    def forward(self, x):
        a, z = self.inp(x).chunk(2, -1)
        c = F.silu(self.conv(a.mT)[..., :x.shape[1]].mT)
        r, B, C = self.xp(c).split([self.r, self.n, self.n], -1)
        y = self.scan(c, F.softplus(self.dt(r)), -torch.exp(self.A_log), B, C)
        return self.out((y + self.D * c) * F.silu(z))

def delta_steps(q, k, v, g, beta):
    S, os = torch.zeros(*v.shape[:1], v.shape[2], k.shape[-1], v.shape[-1]), []
    for t in range(v.shape[1]):
        S = S * g[:, t].exp()[..., None, None]
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t][..., None] * u[..., None, :]
        os.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(os, 1)

def delta_chunks(q, k, v, g, beta, size=64):
    """The triangular system of each chunk inverted row by row, states from chunk to chunk."""
    several = (q, k, v, g[..., None], beta[..., None])
    q, k, v, g, beta = (y.transpose(1, 2).unflatten(2, (-1, size)) for y in several)
    b = g.cumsum(-2)
    G = torch.exp(torch.where(torch.tril(torch.ones(size, size, dtype=torch.bool)), b - b.mT, -torch.inf))
    A = -torch.tril(beta * (k @ k.mT) * G, -1)
    rows = [A[..., :1, :]]
    for r in range(1, size):
        rows.append(A[..., r:r+1, :] + A[..., r:r+1, :r] @ torch.cat(rows, -2))
    T = torch.cat(rows, -2) + torch.eye(size)
    U, W = T @ (beta * v), T @ (beta * b.exp() * k)
    P, S, os = (q @ k.mT) * G, torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
    for c in range(q.shape[2]):
        u = U[:, :, c] - W[:, :, c] @ S
        os.append((q[:, :, c] * b[:, :, c].exp()) @ S + P[:, :, c] @ u)
        last = b[:, :, c, -1:]
        S = S * last.exp() + (k[:, :, c] * (last - b[:, :, c]).exp()).mT @ u
    return torch.stack(os, 2).flatten(2, 3).transpose(1, 2)

class GatedDelta(nn.Module):
    def __init__(self, d, rule, heads=3):
        super().__init__()
        self.h, self.rule = heads, rule
        n = heads * 48
        self.split = [n, n, 2 * n]
        self.qkv = nn.Linear(d, 4 * n, bias=False)
        self.conv = nn.Conv1d(4 * n, 4 * n, 4, groups=4 * n, padding=3, bias=False)
        self.a, self.b, self.g = (nn.Linear(d, width, bias=False) for width in (heads, heads, 2 * n))
        self.A_log, self.dt = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(heads))
        self.norm, self.out = RMSNorm(96), nn.Linear(2 * n, d, bias=False)
    def forward(self, x):
        y = F.silu(self.conv(self.qkv(x).mT)[..., :x.shape[1]].mT)
        q, k, v = (z.unflatten(-1, (self.h, -1)) for z in y.split(self.split, -1))
        q, k = F.normalize(q, dim=-1) * 48 ** -0.5, F.normalize(k, dim=-1)
        g = -self.A_log.exp() * F.softplus(self.a(x) + self.dt)
        o = self.norm(self.rule(q, k, v, g, self.b(x).sigmoid())).flatten(2)
        return self.out(o * F.silu(self.g(x)))

class Attention(nn.Module):
    def __init__(self, d):
        super().__init__(); self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, d // 64, 64).permute(2, 0, 3, 1, 4)
        angle = torch.arange(t)[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
        cos, sin = angle.cos(), angle.sin()
        def turn(y):
            a, b = y[..., :32], y[..., 32:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))

class SwiGLU(nn.Module):
    def __init__(self, d):
        super().__init__(); h = -(-8 * d // 192) * 64
        self.up, self.down = nn.Linear(d, 2 * h, bias=False), nn.Linear(h, d, bias=False)
    def forward(self, x):
        g, u = self.up(x).chunk(2, -1)
        return self.down(F.silu(g) * u)

make = {
    "steps": lambda: Mamba(width, scan_steps),
    "chunks": lambda: Mamba(width, scan_chunks),
    "attention": lambda: Attention(width),
    "delta steps": lambda: GatedDelta(width, delta_steps),
    "delta chunks": lambda: GatedDelta(width, delta_chunks),
}[kind]
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(256, width), RMSNorm(width)
        bare = kind in ("steps", "chunks")
        block = lambda: [make()] if bare else [make(), SwiGLU(width)]
        self.blocks = nn.ModuleList(m for _ in range(layers) for m in block())
        self.norms = nn.ModuleList(RMSNorm(width) for _ in self.blocks)
    def forward(self, x):
        x = self.embed(x)
        for norm, block in zip(self.norms, self.blocks):
            x = x + block(norm(x))
        return self.norm(x) @ self.embed.weight.T
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
tokens = torch.randint(0, 256, (batch, length + 1))
def step():
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(); optimizer.zero_grad()
step()
times = []
for _ in range(steps):
    begin = time.perf_counter(); step(); times.append(time.perf_counter() - begin)
print(batch * length / sorted(times)[len(times) // 2])
'''


@functools.cache
def prepared(kind, length):
    """A compiled training step of ours, its state and a batch."""
    import jax
    import numpy as np
    from flax import nnx

    from seqlab.models import Attention, GatedDeltaNet, LanguageModel, Mamba
    from seqlab.module import split
    from seqlab.train.optim import adamw
    from seqlab.train.step import init_state, next_token_loss, train_step

    options = {
        "attention": {"mixers": functools.partial(Attention, heads=WIDTH // 64)},
        "gated delta": {"mixers": functools.partial(GatedDeltaNet, heads=3, head_dim=48)},
        "mamba": {"mixers": Mamba, "channel_mixer": None},
    }[kind]
    static, params = split(LanguageModel(256, WIDTH, LAYERS, rngs=nnx.Rngs(0), **options))
    optimizer = adamw(1000, peak=1e-4)
    tokens = np.random.default_rng(0).integers(0, 256, (BATCH, length + 1)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "valid": np.ones((BATCH, length), bool)}
    state = init_state(static, params, optimizer)
    begin = time.perf_counter()
    step = (
        jax.jit(functools.partial(train_step, static, optimizer, next_token_loss, 1))
        .lower(state, batch)
        .compile()
    )
    return step, state, batch, time.perf_counter() - begin


def ours(kind, length, steps):
    import jax

    step, state, batch, _ = prepared(kind, length)
    times = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - begin)
    return BATCH * length / statistics.median(times[1:])


def theirs(python, kind, length, steps):
    command = [python, "-c", TORCH, kind, *map(str, (WIDTH, LAYERS, BATCH, length, steps))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", nargs="*", help="mamba, gated delta, attention")
    args = parser.parse_args()
    contests = {
        "mamba": {"steps": 1, "chunks": 3},
        "gated delta": {"delta steps": 1, "delta chunks": 3},
        "attention": {"attention": 5},
    }
    for kind in args.only or contests:
        rivals = contests[kind]
        rounds = []
        for _ in range(args.rounds):
            speed = ours(kind, args.length, 5)
            rounds.append(
                (
                    speed,
                    {rival: theirs(args.torch_python, rival, args.length, n) for rival, n in rivals.items()},
                )
            )
        for rival in rivals:
            mine, other = (
                statistics.median(values)
                for values in ([r[0] for r in rounds], [r[1][rival] for r in rounds])
            )
            ratio = statistics.median(r[0] / r[1][rival] for r in rounds)
            print(f"{kind}: seqlab {mine:,.0f} tok/s, torch {rival} {other:,.0f} tok/s, {ratio:.1f}x")
        print(f"{kind}: the training step compiled in {prepared(kind, args.length)[3]:.1f} s")


if __name__ == "__main__":
    main()
