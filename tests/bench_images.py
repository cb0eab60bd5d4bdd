"""Training speed on images: a training step here beside the originals' formulation in plain torch on the same
CPU.

    python tests/bench_images.py --torch-python PATH_OF_A_PYTHON_WITH_TORCH [--rounds 3] [--only poolformer
    wavemix]

PoolFormer-S12 and ConvFormer-S18 on 64 × 64 pictures, WaveMix-144/7 (one level, the CIFAR-10 model) on 32 ×
32, and a small ViM2 on 32 × 32 beside its recurrence written step by step. Ratios are taken within one run,
the contestants in turn; compilation and warm-up are left out on both sides. On a busy machine, where clocks
say little, `--busy` gives each side one core and counts its processor time.
"""

import argparse
import functools
import os
import statistics
import subprocess
import time

BATCH = {"poolformer": 8, "convformer": 8, "wavemix": 8, "vim2": 8}
SIDE = {"poolformer": 64, "convformer": 64, "wavemix": 32, "vim2": 32}

TORCH = '''
import sys, time, torch, torch.nn as nn, torch.nn.functional as F
kind, batch, side, steps, busy = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1 if busy else 2)
clock = time.process_time if busy else time.perf_counter

class MLP(nn.Module):  # of 1 x 1 convolutions, as PoolFormer has it
    def __init__(self, d):
        super().__init__(); self.fc1, self.fc2 = nn.Conv2d(d, 4 * d, 1), nn.Conv2d(4 * d, d, 1)
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

class PoolBlock(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.GroupNorm(1, d), nn.GroupNorm(1, d), MLP(d)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.s1, self.s2 = nn.Parameter(1e-5 * torch.ones(d)), nn.Parameter(1e-5 * torch.ones(d))
    def forward(self, x):
        y = self.norm1(x)
        x = x + self.s1[:, None, None] * (self.pool(y) - y)
        return x + self.s2[:, None, None] * self.mlp(self.norm2(x))

class StarReLU(nn.Module):
    def __init__(self):
        super().__init__(); self.s, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
    def forward(self, x):
        return self.s * F.relu(x) ** 2 + self.b

class Slim(nn.Module):  # the norm of ConvFormer: over channels, last axis, without bias
    def __init__(self, d):
        super().__init__(); self.w = nn.Parameter(torch.ones(d))
    def forward(self, x):
        c = x - x.mean(-1, keepdim=True)
        return c / torch.sqrt((c ** 2).mean(-1, keepdim=True) + 1e-6) * self.w

class ConvBlock(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm1, self.norm2 = Slim(d), Slim(d)
        self.up, self.act1 = nn.Linear(d, 2 * d, bias=False), StarReLU()
        self.down = nn.Linear(2 * d, d, bias=False)
        self.dw = nn.Conv2d(2 * d, 2 * d, 7, padding=3, groups=2 * d, bias=False)
        self.fc1, self.act2 = nn.Linear(d, 4 * d, bias=False), StarReLU()
        self.fc2 = nn.Linear(4 * d, d, bias=False)
    def forward(self, x):
        y = self.act1(self.up(self.norm1(x))).permute(0, 3, 1, 2)
        x = x + self.down(self.dw(y).permute(0, 2, 3, 1))
        return x + self.fc2(self.act2(self.fc1(self.norm2(x))))

class Last(nn.Module):  # a convolution on channels-last arrays
    def __init__(self, a, b, k, s, p):
        super().__init__(); self.conv = nn.Conv2d(a, b, k, s, p)
    def forward(self, x):
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

def pyramid(block, widths, depths, conv, first):
    parts, before = [], 3
    for i, (d, n) in enumerate(zip(widths, depths)):
        parts += [conv(before, d, *((7, 4, 2) if i == 0 else (3, 2, 1))), *(block(d) for _ in range(n))]
        before = d
    return nn.Sequential(*parts)

def haar(x):
    """As in the original library: a strided grouped convolution along the width, then along the height."""
    s, c = 0.5 ** 0.5, x.shape[1]
    lo, hi = torch.tensor([s, s]), torch.tensor([s, -s])
    filters = torch.stack([lo, hi]).repeat(c, 1)
    y = F.conv2d(x, filters[:, None, None], stride=(1, 2), groups=c)
    filters = torch.stack([lo, hi]).repeat(2 * c, 1)
    y = F.conv2d(y, filters[:, None, :, None], stride=(2, 1), groups=2 * c).unflatten(1, (c, 4))
    return torch.cat([y[:, :, 0], y[:, :, 1:].flatten(1, 2)], 1)

class WaveBlock(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.reduction = nn.Conv2d(d, d // 4, 1)
        self.feedforward = nn.Sequential(
            nn.Conv2d(d, 2 * d, 1), nn.GELU(), nn.Dropout(0.5), nn.Conv2d(2 * d, d, 1),
            nn.ConvTranspose2d(d, d, 4, 2, 1), nn.BatchNorm2d(d))
    def forward(self, x):
        return x + self.feedforward(haar(self.reduction(x)))

class FourScans(nn.Module):
    def __init__(self, d, n=16):
        super().__init__()
        e, self.r, self.n = 2 * d, -(-d // 16), n
        self.inp, self.dw = nn.Linear(d, 2 * e, bias=False), nn.Conv2d(e, e, 3, padding=1, groups=e)
        self.xp = nn.Parameter(torch.randn(4, self.r + 2 * n, e) * e ** -0.5)
        self.dtw = nn.Parameter(torch.randn(4, e, self.r) * self.r ** -0.5)
        self.dtb = nn.Parameter(torch.full((4, e), -4.0))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, n + 1)).repeat(4, e, 1))
        self.D = nn.Parameter(torch.ones(4, e))
        self.out = nn.Linear(e, d, bias=False)
    def forward(self, x):
        b, h, w, _ = x.shape
        a, z = self.inp(x).chunk(2, -1)
        c = F.silu(self.dw(a.permute(0, 3, 1, 2)))
        rows, columns = c.flatten(2), c.transpose(2, 3).flatten(2)
        xs = torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], 1)  # [b, 4, e, l]
        r, B, C = torch.einsum("bkel,kre->bkrl", xs, self.xp).split([self.r, self.n, self.n], 2)
        dt = F.softplus(torch.einsum("bkrl,ker->bkel", r, self.dtw) + self.dtb[..., None])
        A, state, ys = -self.A_log.exp(), torch.zeros(b, 4, xs.shape[2], self.n), []
        for t in range(h * w):
            d = dt[..., t]
            state = torch.exp(d[..., None] * A) * state + (d * xs[..., t])[..., None] * B[:, :, None, :, t]
            ys.append((state * C[:, :, None, :, t]).sum(-1))
        y = torch.stack(ys, -1) + self.D[..., None] * xs
        y = torch.cat([y[:, :2], y[:, 2:].flip(-1)], 1)
        y = (y[:, 0] + y[:, 2]).view(b, -1, h, w) + (y[:, 1] + y[:, 3]).view(b, -1, w, h).transpose(2, 3)
        return self.out(y.permute(0, 2, 3, 1) * F.silu(z))

class Residual(nn.Module):
    def __init__(self, d):
        super().__init__(); self.norm, self.mixer = nn.LayerNorm(d), FourScans(d)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
    def forward(self, x):
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(self.norm2(x))

class Mean(nn.Module):
    def __init__(self, axes):
        super().__init__(); self.axes = axes
    def forward(self, x):
        return x.mean(self.axes)

small = (64, 128, 320, 512)
model = {
    "poolformer": lambda: nn.Sequential(
        pyramid(PoolBlock, small, (2, 2, 6, 2), nn.Conv2d, None), nn.GroupNorm(1, 512), Mean((2, 3)),
        nn.Linear(512, 1000)),
    "convformer": lambda: nn.Sequential(
        pyramid(ConvBlock, small, (3, 3, 9, 3), Last, None), Mean((1, 2)), nn.LayerNorm(512),
        nn.Linear(512, 1000)),
    "wavemix": lambda: nn.Sequential(
        nn.Conv2d(3, 72, 3, padding=1), nn.Conv2d(72, 144, 3, padding=1),
        *(WaveBlock(144) for _ in range(7)), Mean((2, 3)), nn.Linear(144, 10)),
    "vim2": lambda: nn.Sequential(
        Last(3, 32, 4, 4, 0), *(Residual(32) for _ in range(2)), Mean((1, 2)), nn.Linear(32, 10)),
}[kind]()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
images = torch.randn(batch, 3, side, side)
images = images.permute(0, 2, 3, 1) if kind in ("convformer", "vim2") else images
labels = torch.randint(0, 10, (batch,))
def step():
    F.cross_entropy(model(images), labels).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(); optimizer.zero_grad()
step(); step()
times = []
for _ in range(steps):
    begin = clock(); step(); times.append(clock() - begin)
print(batch / sorted(times)[len(times) // 2], sum(p.numel() for p in model.parameters()))
'''


def model(kind):
    """The same model here."""
    from flax import nnx

    from seqlab.models import MLP, LayerNorm
    from seqlab.models.images import (
        Downsample,
        FourScans,
        ImageBackbone,
        ImageClassifier,
        SepConv,
        StridedStem,
        WaveMixing,
        baseline,
        poolformer,
        wavemix,
    )

    partial, rngs = functools.partial, nnx.Rngs(0)
    if kind == "poolformer":
        return poolformer("s12", drop_path=0.0, rngs=rngs)
    if kind == "convformer":  # the torch side has the linear head and no residual scales
        built = baseline(
            (64, 128, 320, 512), (3, 3, 9, 3), SepConv, per_place=True, residual_scale=None, rngs=rngs
        )
        return ImageClassifier(1000, lambda rngs: built.backbone, norm=LayerNorm, normalise="mean", rngs=rngs)
    if kind == "wavemix":
        mixer = partial(WaveMixing, levels=1, dropout=0.5)
        return wavemix(10, 144, 7, mixer=mixer, stem=partial(StridedStem, stride=1), rngs=rngs)
    stem = partial(Downsample, kernel=4, stride=4, padding=0)
    backbone = partial(ImageBackbone, (32,), (2,), FourScans, channel_mixer=MLP, norm=LayerNorm, stem=stem)
    return ImageClassifier(10, backbone, norm=None, rngs=rngs)


@functools.cache
def prepared(kind):
    """A compiled training step of ours, its state, a batch, and what compiling took."""
    import jax
    import numpy as np

    from seqlab.module import count_params, split
    from seqlab.train.optim import adamw
    from seqlab.train.step import init_state, train_step
    from seqlab.train.vision import class_loss

    static, params = split(built := model(kind))
    optimizer, rng, rows = adamw(1000, peak=1e-4), np.random.default_rng(0), BATCH[kind]
    images = rng.normal(size=(rows, SIDE[kind], SIDE[kind], 3)).astype(np.float32)
    batch = {
        "inputs": images,
        "targets": rng.integers(0, 10, rows).astype(np.int32),
        "valid": np.ones(rows, bool),
    }
    state = init_state(static, params, optimizer)
    begin = time.perf_counter()
    step = (
        jax.jit(functools.partial(train_step, static, optimizer, class_loss, 1)).lower(state, batch).compile()
    )
    return step, state, batch, time.perf_counter() - begin, count_params(built)


def ours(kind, steps, busy):
    import jax

    step, state, batch, *_ = prepared(kind)
    clock, times = time.process_time if busy else time.perf_counter, []
    for _ in range(steps + 2):
        begin = clock()
        jax.block_until_ready(step(state, batch))
        times.append(clock() - begin)
    return BATCH[kind] / statistics.median(times[2:])


def theirs(python, kind, steps, busy):
    command = [python, "-c", TORCH, kind, *map(str, (BATCH[kind], SIDE[kind], steps, int(busy)))]
    speed, count = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.split()
    return float(speed), int(count)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=tuple(BATCH))
    parser.add_argument("--busy", action="store_true")
    args = parser.parse_args()
    if args.busy:  # before JAX counts the cores that it may use
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    options = args.steps, args.busy
    for kind in args.only or BATCH:
        rounds = [
            (ours(kind, *options), *theirs(args.torch_python, kind, *options)) for _ in range(args.rounds)
        ]
        mine, other = (statistics.median(r[i] for r in rounds) for i in (0, 1))
        ratio = statistics.median(r[0] / r[1] for r in rounds)
        *_, compiling, count = prepared(kind)
        print(f"{kind}: seqlab {mine:.1f} images/s, torch {other:.1f} images/s, {ratio:.2f}x", flush=True)
        print(
            f"{kind}: {count:,} parameters here, {rounds[0][2]:,} there; the training step compiled in "
            f"{compiling:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
