"""A strict session: eight virtual devices, and warnings are errors."""

import gc
import importlib.metadata
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: without LLVM's optimisations they take half the time, with the older
# emitters half of that.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib") < "0.11":  # where there are still two
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a bare checkout is enough
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))  # helpers.py

import jax
import pytest

# Several tests compile the same program; the second time it comes from here.
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).resolve().parent.parent / ".pytest_cache" / "xla")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def settled():
    """What a file leaves behind (compiled programs above all) is not looked through for garbage again and
    again by those after it."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    """float64 for the duration of one test."""
    with jax.enable_x64(True):
        yield
