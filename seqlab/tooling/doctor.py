"""Report on this machine: versions, devices, and which kernels run here, compared with the reference on small
inputs."""

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
import numpy as np

from seqlab import __version__
from seqlab.kernels.dispatch import Op, explain
from seqlab.kernels.facts import Sample

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
    """The report as text."""
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
    tried = [op for op in ops() if op.name in _samples(op)]  # an op without a sample is internal to another
    return {op.name: {name: _try(op, name) for name in op.implementations} for op in tried}


def _samples(op: Op) -> dict[str, Callable[[], Sample]]:
    return importlib.import_module(f"{op.package}.specs").SAMPLES


def _try(op: Op, implementation: str) -> dict[str, Any]:
    """Whether `implementation` runs here, its error against the reference, or why it does not run."""
    if op.name not in _samples(op):
        return {"runs": None, "reason": "no sample to try it on", "chosen": False}
    function = getattr(importlib.import_module(op.package), op.name)
    args, kwargs = _samples(op)[op.name]()
    try:
        actual = jax.jit(lambda *a: function(*a, implementation=implementation, **kwargs))(*args)
        expected = jax.jit(lambda *a: function(*a, implementation="reference", **kwargs))(*args)
        error = max(map(_error, jax.tree.leaves(actual), jax.tree.leaves(expected)))
    except Exception as reason:  # the reason is reported, whatever it is
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
