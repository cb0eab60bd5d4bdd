"""Old names of moved modules, importable for one minor version with a DeprecationWarning."""

import importlib
import importlib.machinery
import sys
import warnings

_INTO = {
    "seqlab": {
        "streaming": "generate sampling",
        "parallel": "sharding sequence_parallel",
        "studies": "runs compare report cache_bench gates show",
        "tooling": "catalog doctor",
    },
    "seqlab.models": {
        "linear_memory": "matrix_memory linear_attention delta",
        "legendre": "lmu lmuformer spiking in_turn",
        "state_space": "mamba mamba2 mambamixer tsm2 tsm2_streaming",
    },
}
MOVED = {
    f"{parent}.{name}": f"{parent}.{package}.{name}"
    for parent, packages in _INTO.items()
    for package, names in packages.items()
    for name in names.split()
} | {
    "seqlab.tokens": "seqlab.tokenizers",
    "seqlab.weights": "seqlab.interop.convert",
    "seqlab.pretrained": "seqlab.interop.huggingface",
    "seqlab.families": "seqlab.interop.families",
    "seqlab.export": "seqlab.interop.export",
    "seqlab.pages": "seqlab.tooling.mixer_pages",
    "seqlab.reference": "seqlab.tooling.reference_pages",
}


class Finder:
    """A finder and loader (`sys.meta_path`) that maps an old name to the new module."""

    @staticmethod
    def find_spec(
        name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a moved module; None for other names."""
        known = name in MOVED or name == "seqlab.verify_devices"
        return importlib.machinery.ModuleSpec(name, Finder) if known else None

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> None:
        """Python's own empty module, which `exec_module` replaces."""

    @staticmethod
    def exec_module(module: object) -> None:
        """Replace the imported module by the new one."""
        name = module.__name__
        if name == "seqlab.verify_devices":  # the public function has this name
            sys.modules[name] = importlib.import_module("seqlab.verify").verify_devices
            return
        warnings.warn(f"{name} is now {MOVED[name]}", DeprecationWarning, stacklevel=2)
        sys.modules[name] = importlib.import_module(MOVED[name])
