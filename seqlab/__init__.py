"""seqlab: efficient sequence models, built, trained and streamed in JAX.

The streaming contract: a mixer is a function of a chunk of any length and of a state of constant size,

    y, state = mixer(x, state, reset=None, valid=None)

and the whole sequence, any split of it into chunks, and single steps give the same result. `verify_streaming`
checks it on any mixer or model; `stream_generate` relies on it.

Importing seqlab imports neither JAX nor any of the heavier libraries: every public name is loaded when it is
first used.
"""

import importlib
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from seqlab._moved import Finder

if TYPE_CHECKING:  # what `__getattr__` answers, for those who read and do not run
    from seqlab.interop.convert import convert as convert
    from seqlab.interop.huggingface import save_pretrained as save_pretrained
    from seqlab.kernels.blocks import use_blocks as use_blocks
    from seqlab.kernels.dispatch import explain as explain
    from seqlab.kernels.dispatch import use_implementation as use_implementation
    from seqlab.mixer import Composite as Composite
    from seqlab.mixer import Mixer as Mixer
    from seqlab.mixer import MixerBase as MixerBase
    from seqlab.module import Module as Module
    from seqlab.module import count_params as count_params
    from seqlab.module import merge as merge
    from seqlab.module import params_of as params_of
    from seqlab.module import split as split
    from seqlab.serving.batcher import Batcher as Batcher
    from seqlab.serving.prefixes import PrefixStore as PrefixStore
    from seqlab.serving.request import Busy as Busy
    from seqlab.serving.request import Request as Request
    from seqlab.state import load_state as load_state
    from seqlab.state import put_rows as put_rows
    from seqlab.state import save_state as save_state
    from seqlab.state import state_bytes as state_bytes
    from seqlab.state import take_rows as take_rows
    from seqlab.streaming.drafts import Draft as Draft
    from seqlab.streaming.drafts import EarlyExit as EarlyExit
    from seqlab.streaming.drafts import NGram as NGram
    from seqlab.streaming.generate import rewind_stream as rewind_stream
    from seqlab.streaming.generate import stream_generate as stream_generate
    from seqlab.streaming.generate import warm_up as warm_up
    from seqlab.studies.runs import load as load
    from seqlab.tokenizers import ByteTokenizer as ByteTokenizer
    from seqlab.verify import Report as Report
    from seqlab.verify import verify_devices as verify_devices
    from seqlab.verify import verify_streaming as verify_streaming

__version__ = "0.1.0"

_PUBLIC = {
    "Module": "seqlab.module",
    "count_params": "seqlab.module",
    "merge": "seqlab.module",
    "params_of": "seqlab.module",
    "split": "seqlab.module",
    "Mixer": "seqlab.mixer",
    "MixerBase": "seqlab.mixer",
    "Composite": "seqlab.mixer",
    "state_bytes": "seqlab.state",
    "take_rows": "seqlab.state",
    "put_rows": "seqlab.state",
    "save_state": "seqlab.state",
    "load_state": "seqlab.state",
    "Report": "seqlab.verify",
    "verify_streaming": "seqlab.verify",
    "verify_devices": "seqlab.verify",
    "ByteTokenizer": "seqlab.tokenizers",
    "NGram": "seqlab.streaming.drafts",
    "Draft": "seqlab.streaming.drafts",
    "EarlyExit": "seqlab.streaming.drafts",
    "stream_generate": "seqlab.streaming.generate",
    "rewind_stream": "seqlab.streaming.generate",
    "warm_up": "seqlab.streaming.generate",
    "Batcher": "seqlab.serving.batcher",
    "PrefixStore": "seqlab.serving.prefixes",
    "Busy": "seqlab.serving.request",
    "Request": "seqlab.serving.request",
    "load": "seqlab.studies.runs",
    "convert": "seqlab.interop.convert",
    "save_pretrained": "seqlab.interop.huggingface",
    "explain": "seqlab.kernels.dispatch",
    "use_blocks": "seqlab.kernels.blocks",
    "use_implementation": "seqlab.kernels.dispatch",
}

__all__ = ["__version__", *_PUBLIC]

# seqlab's subpackages models, kernels, train and configs are links to the folders beside this one. A checkout
# whose links were lost (git on Windows writes files of text in their place) finds them by this line.
_HERE = pathlib.Path(__file__).resolve().parent
if not (_HERE / "models").is_dir() and (_HERE.parent / "pyproject.toml").is_file():
    __path__.append(str(_HERE.parent))
sys.meta_path.append(Finder)


if not TYPE_CHECKING:  # a checker would take every name for one that is there

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(
                f"module 'seqlab' has no attribute {name!r}; public names: {', '.join(__all__)}"
            )
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
