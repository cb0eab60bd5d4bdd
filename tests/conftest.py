"""A strict session: eight virtual devices, and warnings are errors. It ends with what it cost: processor
seconds per file, of the budget that CONTRIBUTING.md names."""

import collections
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


def processor_seconds():
    """Of this process and of the children that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.begun = processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    try:
        return (yield)
    finally:
        item.user_properties.append(("processor_seconds", processor_seconds() - item.begun))


def pytest_terminal_summary(terminalreporter):
    costs = collections.Counter()
    for reports in list(terminalreporter.stats.values()):
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                costs[report.nodeid.partition("::")[0]] += dict(report.user_properties)["processor_seconds"]
    dearest = ", ".join(f"{name.rpartition('/')[2]} {cost:.0f}" for name, cost in costs.most_common(8))
    if costs.total() > 30:
        terminalreporter.write_line(f"{costs.total():,.0f} processor seconds; the dearest: {dearest}")


@pytest.fixture(scope="module", autouse=True)
def settled():
    """The objects left by a test file (mostly compiled programs) are not scanned for garbage again and again
    by those after it."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    """float64 for the duration of one test."""
    with jax.enable_x64(True):
        yield
