"""Operations on sequences and maps as pure functions: arrays in, arrays out, no parameters.

One folder per op, found by discovery; its docstring says what it computes. In each:

    __init__       the public function: shapes, semantics, errors
    reference      the reference implementation: the definition, slow and short
    xla            the default everywhere; runs on every platform and never declines
    pallas_tpu, triton_gpu    for some ops and calls; they decline the others
    specs          what the op says about itself: named shapes for tests and benchmarks, operations and
    bounds,
                   block sizes, a sample for `seqlab doctor`

`dispatch` selects one. `implementation=None` takes the first in the platform's order of preference that does
not decline, and always succeeds. `implementation="xla"` takes that one or raises, `("triton_gpu", "xla")` the
first that exists and does not decline: accelerator kernels are opt-in until they have run on hardware.
`seqlab.use_implementation(name)` sets the name for a block of code, and `seqlab.explain(function, *args)`
reports which implementations a call would use and why preferred ones declined.

A folder and its op share a name. `seqlab.kernels.attention` is always the function, loaded on first use;
import the other contents of a folder from it: `from seqlab.kernels.attention import merge`.
"""

import importlib
import pathlib
import sys
import types
from typing import TYPE_CHECKING, Any

if not __name__.startswith("seqlab."):
    raise ImportError(
        "import seqlab.kernels, not kernels: two copies of one module would hold two sets of classes"
    )

if TYPE_CHECKING:  # what `__getattr__` answers, for those who read and do not run
    from seqlab.kernels.attention import attention as attention
    from seqlab.kernels.block_attention import block_attention as block_attention
    from seqlab.kernels.conv import conv as conv
    from seqlab.kernels.decode_attention import decode_attention as decode_attention
    from seqlab.kernels.dwt import dwt as dwt
    from seqlab.kernels.linear_attention import linear_attention as linear_attention
    from seqlab.kernels.lmu import lmu as lmu
    from seqlab.kernels.scan import scan as scan

__all__ = sorted(path.parent.name for path in pathlib.Path(__file__).parent.glob("*/__init__.py"))


class _Kernels(types.ModuleType):
    """The import system binds a loaded folder to its name here, at a time that depends on who imports what:
    bind its op instead."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in __all__ and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Kernels


if not TYPE_CHECKING:  # a checker would take every name for one that is there

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}; its ops: {', '.join(__all__)}"
            )
        return getattr(importlib.import_module(f"{__name__}.{name}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
