"""What this machine offers: versions, devices, and which kernels run here, tried on small inputs against the
reference."""

import importlib
import importlib.metadata
import pathlib
import pkgutil
import platform
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqlab import __version__
from seqlab.kernels.dispatch import Op, explain

PACKAGES = (
    *(
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "fiddle",
        "einops",
        "jaxtyping",
        "numpy",
        "safetensors",
    ),
    *("tensorflow-datasets", "array_record", "tensorboardX", "matplotlib"),
    *("jax-triton", "triton", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"),
)


def report(compile_cache: pathlib.Path) -> dict[str, Any]:
    """Everything as plain data. Devices are queried and every kernel is compiled once: this takes seconds."""
    devices = _devices()
    return {
        "seqlab": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": devices,
        "kernels": _kernels() if "error" not in devices else {},
        "compile_cache": {"path": str(compile_cache), "bytes": _size(compile_cache)},
        "free_disk": {"path": str(pathlib.Path.cwd()), "bytes": shutil.disk_usage(pathlib.Path.cwd()).free},
    }


def as_text(content: dict[str, Any]) -> str:
    """The report as one reads it."""
    devices, cache, disk = content["devices"], content["compile_cache"], content["free_disk"]
    lines = [
        f"seqlab {content['seqlab']}, Python {content['python']} ({content['executable']}), "
        f"{content['system']}",
        "",
        "Packages",
    ]
    lines += [f"  {name} {version or 'not installed'}" for name, version in content["versions"].items()]
    lines += ["", "Devices"]
    lines += (
        [f"  none: {devices['error']}"]
        if "error" in devices
        else [f"  {count} x {name}" for name, count in devices["kinds"].items()]
    )
    lines += ["", "Kernels (largest error against the reference, relative to scale)"]
    for op, implementations in content["kernels"].items():
        for name, found in implementations.items():
            chosen = "  <- chosen here" if found["chosen"] else ""
            lines.append(
                f"  {op} {name}: "
                + (f"runs, {found['error']:.1e}{chosen}" if found["runs"] else f"- {found['reason']}")
            )
    lines += ["", f"Compile cache  {cache['path']} ({cache['bytes'] / 1e6:.1f} MB)"]
    return "\n".join([*lines, f"Free disk      {disk['bytes'] / 1e9:.1f} GB at {disk['path']}"])


def ops() -> list[Op]:
    """Every op of `seqlab.kernels`, with its implementations."""
    kernels = importlib.import_module("seqlab.kernels")
    packages = [
        found.name for found in pkgutil.iter_modules(kernels.__path__, "seqlab.kernels.") if found.ispkg
    ]
    return [
        value
        for name in packages
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, Op)
    ]


def _devices() -> dict[str, Any]:
    try:
        devices = jax.devices()
    except RuntimeError as error:
        return {"error": _line(error)}
    kinds = [f"{device.platform} {device.device_kind}" for device in devices]
    return {
        "default": devices[0].platform,
        "kinds": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
    }


def _kernels() -> dict[str, dict[str, Any]]:
    tried = [op for op in ops() if op.name in SAMPLES]  # one without a sample is a part of another
    return {op.name: {name: _try(op, name) for name in op.implementations} for op in tried}


def _try(op: Op, implementation: str) -> dict[str, Any]:
    """Whether `implementation` runs here, how far from the reference it is, or why it does not run."""
    if op.name not in SAMPLES:
        return {"runs": None, "reason": "no sample to try it on", "chosen": False}
    function = getattr(importlib.import_module(op.package), op.name)
    args, kwargs = SAMPLES[op.name]()
    try:
        actual = jax.jit(lambda *a: function(*a, implementation=implementation, **kwargs))(*args)
        expected = jax.jit(lambda *a: function(*a, implementation="reference", **kwargs))(*args)
        error = max(map(_error, jax.tree.leaves(actual), jax.tree.leaves(expected)))
    except Exception as reason:  # whatever it is that keeps it from running is what one wants to know
        return {"runs": False, "reason": _line(reason), "chosen": False}
    chosen = explain(lambda *a: function(*a, **kwargs), *args)[0].implementation
    return {"runs": True, "error": error, "chosen": chosen == implementation}


def _error(actual: Any, expected: Any) -> float:
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(a - e).max() / max(np.abs(e).max(), 1e-6))


def _line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, NotImplementedError) and text else f"{type(error).__name__}: {text}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


# Sizes that the tiles of an accelerator take as they are: what is asked here is whether a kernel runs, not
# what else it supports.
_BATCH, _TIME, _HEADS, _WIDTH, _STATE = 1, 128, 2, 128, 16


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _heads(seed: int) -> jax.Array:
    return _normal(seed, _BATCH, _TIME, _HEADS, _WIDTH)


def _attention() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_heads(0), _heads(1), _heads(2)), {}


def _block_attention() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_heads(0), _heads(1), _heads(2), jnp.zeros((_BATCH, _TIME, _HEADS, 1), jnp.int32)), {
        "block": _TIME // 4
    }


def _conv() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_normal(0, _BATCH, _TIME, _WIDTH), _normal(1, 4, _WIDTH), None), {}


def _decode_attention() -> tuple[tuple[Any, ...], dict[str, Any]]:
    from seqlab.kernels.decode_attention import Coded

    random, lead = np.random.default_rng(0), (_BATCH, _HEADS)
    words = [
        jnp.asarray(random.integers(0, 2**32, size=(*lead, _WIDTH // 8, _TIME), dtype=np.uint32))
        for _ in range(2)
    ]
    groups = [
        [0.1 * _normal(seed, *lead, *shape) for seed in (1, 2)]
        for shape in ((_TIME // 32, _WIDTH), (_WIDTH // 32, _TIME))
    ]
    k, v = (Coded(codes, *found) for codes, found in zip(words, groups, strict=True))
    return (_normal(3, *lead, _WIDTH), k, v, jnp.ones((_BATCH, _TIME), bool)), {}


def _dwt() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_normal(0, _BATCH, 16, 16, _WIDTH),), {}


def _idwt() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_normal(0, _BATCH, 8, 8, _WIDTH), [_normal(1, _BATCH, 8, 8, _WIDTH, 3)]), {}


def _linear_attention() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_heads(0), _heads(1), _heads(2)), {"decay": jax.nn.log_sigmoid(_heads(3))}


def _lmu() -> tuple[tuple[Any, ...], dict[str, Any]]:
    from seqlab.kernels.lmu import legendre

    A, B = legendre(_WIDTH, 2.0 * _TIME)
    return (_normal(0, _BATCH, _TIME, _HEADS), jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32)), {}


def _scan() -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, maps = _normal(0, _BATCH, _TIME, _WIDTH), (_normal(seed, _BATCH, _TIME, _STATE) for seed in (1, 2))
    return (
        x,
        jax.nn.softplus(_normal(3, _BATCH, _TIME, _WIDTH)),
        -jnp.exp(_normal(4, _WIDTH, _STATE)),
        *maps,
    ), {}


SAMPLES: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "attention": _attention,
    "block_attention": _block_attention,
    "conv": _conv,
    "decode_attention": _decode_attention,
    "dwt": _dwt,
    "idwt": _idwt,
    "linear_attention": _linear_attention,
    "lmu": _lmu,
    "scan": _scan,
}
