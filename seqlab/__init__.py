"""seqlab: efficient sequence models, built, trained and streamed in JAX.

The streaming contract: a mixer is a function of a chunk of any length and of a state of constant size,

    y, state = mixer(x, state, reset=None, valid=None)

and the whole sequence, any split of it into chunks, and one step at a time are the same function.
`verify_streaming` checks it on any mixer or model; `stream_generate` relies on it.

Importing seqlab imports neither JAX nor any of the heavier libraries: every public name is loaded when it is
first used.
"""

import importlib
import pathlib
import sys

from seqlab._moved import Finder

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
    "stream_generate": "seqlab.streaming.generate",
    "rewind_stream": "seqlab.streaming.generate",
    "warm_up": "seqlab.streaming.generate",
    "load": "seqlab.studies.runs",
    "convert": "seqlab.interop.convert",
    "save_pretrained": "seqlab.interop.huggingface",
    "explain": "seqlab.kernels.dispatch",
    "use_blocks": "seqlab.kernels.blocks",
    "use_implementation": "seqlab.kernels.dispatch",
}

__all__ = ["__version__", *_PUBLIC]

# The four folders beside this one are seqlab's subpackages. An installed seqlab maps them by name
# (pyproject.toml); this line lets a bare checkout find them too, and only a checkout: the neighbours of an
# installed package are other people's.
_ROOT = pathlib.Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and str(_ROOT) not in __path__:
    __path__.append(str(_ROOT))
sys.meta_path.append(Finder)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'seqlab' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
