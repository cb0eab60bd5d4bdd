"""Alternative implementations, where they can be imported: JAX's own operations, and kernels of PyTorch and
its packages.

A peer returns the function to time for a case, or raises NotImplementedError for an unsupported one.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from seqlab.bench.cases import Case, with_gradients
from seqlab.bench.timing import Program, calls_of, repeated

# (case, cotangents) -> program; the first array of its result is the output, in our layout.
Peer = Callable[[Case, Any], Program]


def of(case: Case) -> dict[str, Peer]:
    """The peers of an op on this platform, by name."""
    return _EVERYWHERE.get(case.op.name, {}) | (
        _ON_GPUS.get(case.op.name, {}) if jax.default_backend() == "gpu" else {}
    )


# --- in JAX


def _in_jax(function: Callable[[dict[str, Any]], Any]) -> Peer:
    def make(case: Case, cotangents: Any) -> Program:
        inputs = (case.arguments, jax.tree.leaves(cotangents)[0])
        return repeated(
            with_gradients(function) if case.gradients else lambda both: function(both[0]), inputs
        )

    return make


def _plain(case: Case) -> bool:
    """Check that attention is dense, or over a whole cache, which all peers support. Returns the effective
    `causal`."""
    spec = case.spec
    special = (
        (spec.window, spec.softcap, spec.scale) != (None,) * 3 or spec.sink_logits or spec.places != "default"
    )
    if special or (spec.causal and spec.t not in (1, spec.s)):
        raise NotImplementedError("takes dense attention, or one query over all keys")
    return spec.causal and spec.t > 1


def _jax_attention(implementation: str) -> Peer:
    def make(case: Case, cotangents: Any) -> Program:
        options = {"is_causal": _plain(case), "implementation": implementation}
        return _in_jax(lambda a: jax.nn.dot_product_attention(a["q"], a["k"], a["v"], **options))(
            case, cotangents
        )

    return make


def _jax_conv(case: Case, cotangents: Any) -> Program:
    if case.spec.reset or case.spec.valid or case.spec.t == 1:
        raise NotImplementedError("takes whole sequences without resets and padding")

    def function(a: dict[str, Any]) -> Any:
        w, d = a["weight"].shape
        y = jax.lax.conv_general_dilated(
            a["x"],
            a["weight"][:, None],
            (1,),
            [(w - 1, 0)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=d,
        )
        return y + a["bias"] if "bias" in a else y

    return _in_jax(function)(case, cotangents)


def _numbers(case: Case, cotangents: Any) -> Program:
    """The same op over an unquantized cache in the dtype of the query, by the best available
    implementation."""
    from seqlab.kernels import decode_attention
    from seqlab.kernels.decode_attention.reference import of_numbers

    if case.spec.bits is None:
        raise NotImplementedError("the cache holds numbers already")
    arguments, options = dict(case.arguments), dict(case.options)
    bits = case.spec.bits, options.pop("v_bits", case.spec.bits)
    arguments["k"], arguments["v"] = of_numbers(arguments["k"], arguments["v"], bits, arguments["q"].dtype)
    return repeated(
        lambda a: decode_attention(**a, **options, implementation=("pallas_tpu", "triton_gpu", "xla")),
        arguments,
    )


# --- in PyTorch


def _in_torch(
    prepare: Callable[[Case, list[Any]], tuple[Callable[..., Any], list[Any]]],
    names: tuple[str, ...],
    package: str,
) -> Peer:
    """`prepare` maps a case and its named arguments as tensors to a function and its tensors; the function
    returns the output in our layout. `package` is imported first."""

    def make(case: Case, cotangents: Any) -> Program:
        importlib.import_module(package)
        import torch

        absent = [name for name in case.arguments if name not in names]
        if absent:
            raise NotImplementedError(f"knows no {', '.join(absent)}")
        function, tensors = prepare(case, [_tensor(case.arguments[name]) for name in names])
        tensors = [x.detach().requires_grad_(case.gradients) for x in tensors]
        slope = _tensor(jax.tree.leaves(cotangents)[0]) if case.gradients else None

        def step():
            out = function(*tensors)
            gradients = torch.autograd.grad(out, tensors, slope) if case.gradients else ()
            return out, gradients

        begin = time.perf_counter()
        out, _ = step()
        _settle(torch)
        seconds = time.perf_counter() - begin
        calls = calls_of(_torch_seconds(torch, step, 1))
        return Program(
            step,
            out.detach().float().cpu().numpy(),
            seconds,
            lambda: _torch_seconds(torch, step, calls) / calls,
        )

    return make


def _tensor(x: Any) -> Any:
    import torch

    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    place = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return torch.from_numpy(np.array(x, np.float32)).to(place, kinds[x.dtype.name])


def _settle(torch: Any) -> None:
    if jax.default_backend() == "gpu":
        torch.cuda.synchronize()


def _torch_seconds(torch: Any, step: Callable[[], Any], calls: int) -> float:
    """Seconds of a number of calls: between two events on a GPU, or of the host."""
    if jax.default_backend() != "gpu":
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _turned(x: Any) -> Any:
    return x.transpose(1, 2).contiguous()


def _sdpa(case: Case, tensors: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
    import torch

    options = {"is_causal": _plain(case), "enable_gqa": True}

    def function(*qkv):
        return torch.nn.functional.scaled_dot_product_attention(*qkv, **options).transpose(1, 2)

    return function, [_turned(x) for x in tensors]


def _mamba_ssm(case: Case, tensors: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A, B, C = tensors
    return lambda *a: selective_scan_fn(*a).transpose(1, 2), [
        _turned(u),
        _turned(delta),
        A.float(),
        _turned(B),
        _turned(C),
    ]


def _causal_conv1d(case: Case, tensors: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias = tensors
    return lambda *a: causal_conv1d_fn(*a).transpose(1, 2), [_turned(x), weight.T.contiguous(), bias]


def _fla(case: Case, cotangents: Any) -> Program:
    """The kernel of flash-linear-attention for this kind of memory, whose arguments are ours in its order."""
    kind = (case.spec.decay, case.spec.beta)
    if kind not in _FLA:
        raise NotImplementedError(f"no kernel of it is known here for decay={kind[0]} and beta={kind[1]}")
    if case.spec.g not in (0, case.spec.h):
        raise NotImplementedError("takes a query and a key for every head")
    module, name, names = _FLA[kind]

    def prepare(case, tensors):
        function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
        return lambda *a: function(**dict(zip(names.values(), a, strict=True)))[0], tensors

    return _in_torch(prepare, tuple(names), "fla")(case, cotangents)


_QKV = {name: name for name in ("q", "k", "v")}
_FLA = {
    (None, None): ("linear_attn", "chunk_linear_attn", _QKV),
    ("head", None): ("simple_gla", "chunk_simple_gla", _QKV | {"decay": "g"}),
    ("channel", None): ("gla", "chunk_gla", _QKV | {"decay": "g"}),
    (None, "head"): ("delta_rule", "chunk_delta_rule", _QKV | {"beta": "beta"}),
    ("head", "head"): ("gated_delta_rule", "chunk_gated_delta_rule", _QKV | {"decay": "g", "beta": "beta"}),
    ("channel", "head"): ("kda", "chunk_kda", _QKV | {"decay": "g", "beta": "beta"}),
}
OTHER_BYTES = ("a cache of numbers",)  # peers that move more bytes than the case and get no share
_EVERYWHERE = {
    "attention": {
        "jax.nn.dot_product_attention": _jax_attention("xla"),
        "PyTorch SDPA": _in_torch(_sdpa, ("q", "k", "v"), "torch"),
    },
    "conv": {"lax.conv_general_dilated": _jax_conv},
    "decode_attention": {"a cache of numbers": _numbers},
}
_ON_GPUS = {
    "attention": {"cuDNN": _jax_attention("cudnn")},
    "conv": {"causal-conv1d": _in_torch(_causal_conv1d, ("x", "weight", "bias"), "causal_conv1d")},
    "linear_attention": {"flash-linear-attention": _fla},
    "scan": {"mamba-ssm": _in_torch(_mamba_ssm, ("u", "delta", "A", "B", "C"), "mamba_ssm")},
}
