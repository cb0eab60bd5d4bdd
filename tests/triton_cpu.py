"""Triton kernels without a GPU: run by Triton's interpreter on NumPy arrays, and compiled for sm_90 with what
the assembler says of them.

Both stand in for `seqlab.kernels.triton.call_triton`, so that all else of an implementation is what runs on a
GPU.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import itertools
import re
import subprocess
import tempfile
import types
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from seqlab.kernels import triton as backend

_NAMES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "int32": "i32",
    "int8": "i8",
    "uint32": "u32",
    "uint8": "u8",
    "bool": "i1",
}
_GUARD = 64  # elements before and after every array that no kernel may write, and that are NaN
# See conftest.py; Triton's bindings complain at the end of what has never been freed.
atexit.register(gc.unfreeze)
_builder = interpreter.interpreter_builder


class Launch(NamedTuple):
    """Arguments of the compiler and of the grid."""

    kernel: Any
    types: tuple[str, ...]
    grid: tuple[int, ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int


@contextlib.contextmanager
def interpreted(monkeypatch):
    """Within, `implementation="triton_gpu"` runs on the CPU: its kernels interpreted, outside of JAX."""

    def call(kernel, arrays, shapes, grid, constants, warps, stages):
        run = functools.partial(interpret, kernel, shapes=shapes, grid=grid, constants=constants)
        return tuple(jax.pure_callback(lambda *arrays: run(arrays), shapes, *arrays))

    with monkeypatch.context() as patch:
        patch.setattr(backend, "available", lambda: None)
        patch.setattr(backend, "call_triton", call)
        yield


def launches(function, *args):
    """Every different launch of `function(*args)`; nothing is computed, and `args` may be shapes."""
    found = []

    def call(kernel, arrays, shapes, grid, constants, warps, stages):
        signature = tuple("*" + _NAMES[x.dtype.name] for x in (*arrays, *shapes))
        found.append(Launch(kernel, signature, grid, tuple(constants.items()), warps, stages))
        return tuple(jax.numpy.zeros(shape.shape, shape.dtype) for shape in shapes)

    kept = backend.available, backend.call_triton
    backend.available, backend.call_triton = lambda: None, call
    try:
        jax.eval_shape(function, *args)
    finally:
        backend.available, backend.call_triton = kept
    return list(dict.fromkeys(found))


def interpret_in_place(kernel, arrays, grid, constants, program):
    """One program of a grid, on arrays too large to be copied. An integer of 32 bits that overflows is an
    error."""
    names = [name for name in kernel.arg_names if name not in constants]
    pointers = {name: _pointer(x) for name, x in zip(names, arrays, strict=True)}
    with _language(overflow=True):
        _builder.set_grid_dim(*grid)
        _builder.set_grid_idx(*program)
        _rewritten(kernel)(**pointers, **constants)


def interpret(kernel, arrays, shapes, grid, constants):
    """The outputs of a kernel. What it does not write is NaN, as is what it reads outside of its arrays;
    there it must write nothing."""
    arrays = [np.asarray(x) for x in arrays]
    held = [_guarded(x.shape, x.dtype, x) for x in arrays] + [
        _guarded(x.shape, np.dtype(x.dtype), None) for x in shapes
    ]
    names = [name for name in kernel.arg_names if name not in constants]
    assert len(names) == len(held), (names, len(held))
    pointers = {name: _pointer(inner) for name, (_, inner) in zip(names, held, strict=True)}
    with _language():
        _builder.set_grid_dim(*grid, *(1,) * (3 - len(grid)))
        for index in itertools.product(*map(range, grid)):
            _builder.set_grid_idx(*index, *(0,) * (3 - len(index)))
            _rewritten(kernel)(**pointers, **constants)
    for name, (outer, inner) in zip(names, held, strict=True):
        assert _untouched(outer, inner), f"{name} was written outside of its bounds"
    for name, (_, inner), x in zip(names, held, arrays, strict=False):
        assert inner.tobytes() == x.tobytes(), f"{name} is an input and was written"
    return tuple(inner for _, inner in held[len(arrays) :])


def _guarded(shape, dtype, values):
    size = int(np.prod(shape, dtype=np.int64))
    blank = (
        np.nan
        if np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16
        else 0
        if np.dtype(dtype).kind == "b"
        else 85
    )
    outer = np.full(size + 2 * _GUARD, blank, dtype)
    inner = outer[_GUARD : _GUARD + size].reshape(shape)
    if values is not None:
        inner[...] = values
    return outer, inner


def _untouched(outer, inner):
    edges, fresh = (
        np.concatenate([outer[:_GUARD], outer[_GUARD + inner.size :]]),
        _guarded((0,), outer.dtype, None)[0],
    )
    return edges.tobytes() == fresh.tobytes()


def _pointer(x):
    kind = tl.pointer_type(
        tl.dtype(
            _NAMES[x.dtype.name].replace("i", "int").replace("u", "uint")
            if x.dtype.kind in "biu"
            else _NAMES[x.dtype.name]
        )
    )
    return tl.tensor(interpreter.TensorHandle(np.array([x.ctypes.data], np.uint64), kind), kind)


@contextlib.contextmanager
def _language(overflow=False):
    """Triton's language by its interpreter, also in functions that kernels call, and with what it lacks.
    `overflow` costs much time."""
    scope = interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    scope.set_attr(
        _builder, "options", dataclasses.replace(_builder.options, debug=overflow, sanitize_overflow=overflow)
    )
    scope.set_attr(JITFunction, "__call__", lambda self, *args, **kwargs: _rewritten(self)(*args, **kwargs))
    scope.set_attr(interpreter.InterpreterBuilder, "create_dot", _dot)
    scope.set_attr(interpreter.InterpreterBuilder, "create_fp_trunc", _fp_trunc)
    scope.set_attr(interpreter.ScanOps, "generic_scan", _generic_scan)
    try:
        yield
    finally:
        scope.restore()


def _rewritten(kernel):
    return interpreter.InterpretedFunction(kernel.fn).rewrite()


def _float32(handle):
    """The numbers of a handle, whose bfloat16 are held as integers."""
    return (
        handle.data.view(ml_dtypes.bfloat16).astype(np.float32)
        if handle.dtype.scalar == tl.bfloat16
        else handle.data
    )


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    assert a.data.shape[-2] >= 1 and min(a.data.shape[-1], b.data.shape[-1]) >= 16, (
        "products are of tiles of 16 at least"
    )
    return interpreter.TensorHandle(
        np.matmul(_float32(a), _float32(b), dtype=d.data.dtype) + d.data, d.dtype.scalar
    )


def _fp_trunc(self, src, dst_type):
    """To the nearest, as the hardware rounds; Triton's own cuts bits off."""
    if dst_type.scalar != tl.bfloat16:
        return self.cast_impl(src, dst_type)
    return interpreter.TensorHandle(src.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)


def _generic_scan(self, inputs):
    """As Triton's own, a slice at a time where it takes an element at a time."""
    total, slices = None, []
    for i in range(inputs[0].handle.data.shape[self.axis]):
        now = tuple(self.to_tensor(np.take(x.handle.data, [i], self.axis), x.dtype) for x in inputs)
        total = now if total is None else self.combine_fn.fn(*total, *now)
        slices.append(total)
    columns = [[x.handle.data for x in column] for column in zip(*slices, strict=True)]
    return [
        self.to_tensor(np.concatenate(c, self.axis), x.dtype) for c, x in zip(columns, inputs, strict=True)
    ]


class Usage(NamedTuple):
    """Resources of a kernel: registers per thread, spilled bytes, bytes of shared memory."""

    registers: int
    spills: int
    shared: int
    assembly: str


def compiled(launch, capability=90):
    """The launch compiled, with arrays aligned as XLA aligns them."""
    names, constants = launch.kernel.arg_names, dict(launch.constants)
    signature = dict(zip((name for name in names if name not in constants), launch.types, strict=True))
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = ASTSource(
        fn=launch.kernel,
        signature={name: signature[name] for name in names},
        constexprs=constants,
        attrs=aligned,
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        arch = re.search(r"\.target (sm_\w+)", made.asm["ptx"]).group(1)
        done = subprocess.run(
            [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    registers = int(re.search(r"Used (\d+) registers", done.stderr).group(1))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))
    return Usage(registers, spills, made.metadata.shared, made.asm["ptx"])
