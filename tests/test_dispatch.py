"""The dispatch: None never fails, a name never falls back, and the choice can be seen."""

import importlib
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqlab
from seqlab.checks import check_choice
from seqlab.kernels import dispatch
from seqlab.kernels.dispatch import Choice, Op

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def double(tmp_path, monkeypatch):
    """An op of a package made for the test: `fast` is preferred here and declines long inputs, `broken` is
    preferred to it and never loads a call without an error of its own, `xla` and `reference` answer with
    different numbers."""
    folder = tmp_path / "double_op"
    folder.mkdir()
    bodies = {
        "__init__": "",
        "reference": "def double(x):\n    return 2 * x + 1000",
        "xla": "def double(x):\n    return 2 * x",
        "fast": "def double(x):\n    if x.shape[0] > 2:\n        raise "
        "NotImplementedError('more than 2 rows')\n    return 2 * x + 10",
        "broken": "def double(x):\n    raise RuntimeError('a bug')",
    }
    for name, body in bodies.items():
        (folder / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(dispatch._PREFERENCE, "cpu", ("fast", "xla"))
    yield Op("double", "double_op", ("reference", "xla", "fast", "broken"))
    for name in [name for name in sys.modules if name.startswith("double_op")]:
        del sys.modules[name]


def test_none_takes_the_first_that_does_not_decline(double):
    assert double(jnp.ones(2)).tolist() == [12, 12]
    assert double(jnp.ones(3)).tolist() == [2, 2, 2]


def test_a_name_never_falls_back(double):
    assert double(jnp.ones(2), implementation="xla").tolist() == [2, 2]
    assert double(jnp.ones(1), implementation="reference").tolist() == [1002]
    with pytest.raises(NotImplementedError, match="more than 2 rows"):
        double(jnp.ones(3), implementation="fast")
    with seqlab.use_implementation("fast"), pytest.raises(NotImplementedError, match="more than 2 rows"):
        double(jnp.ones(3))


def test_several_names_are_an_order_of_preference(double):
    with seqlab.use_implementation(("triton_gpu", "fast", "xla")):
        assert double(jnp.ones(2)).tolist() == [12, 12] and double(jnp.ones(3)).tolist() == [2, 2, 2]
        [choice] = seqlab.explain(double, jnp.ones(3))
        assert str(choice) == "double: xla; fast declined: more than 2 rows"
    with pytest.raises(
        NotImplementedError,
        match=r"double: none of \('triton_gpu', 'fast'\) takes this call \(fast: more than 2 rows\)",
    ):
        double(jnp.ones(3), implementation=("triton_gpu", "fast"))
    with pytest.raises(ValueError, match=r"got 'fsat', .*; did you mean 'fast'\?"):
        double(jnp.ones(3), implementation=("fsat", "xla"))


def test_only_notimplementederror_declines(double, monkeypatch):
    monkeypatch.setitem(dispatch._PREFERENCE, "cpu", ("broken", "xla"))
    with pytest.raises(RuntimeError, match="a bug"):
        double(jnp.ones(3))


def test_a_preferred_implementation_that_the_op_lacks_is_passed_over(double, monkeypatch):
    monkeypatch.setitem(dispatch._PREFERENCE, "cpu", ("pallas_tpu", "xla"))
    assert double(jnp.ones(2)).tolist() == [2, 2]
    assert seqlab.explain(double, jnp.ones(2)) == [Choice("double", "xla")]


def test_an_unknown_platform_gets_xla(double, monkeypatch):
    monkeypatch.delitem(dispatch._PREFERENCE, "cpu")
    assert double(jnp.ones(2)).tolist() == [2, 2]


def test_an_unknown_name_is_refused_with_the_nearest(double):
    with pytest.raises(
        ValueError, match=r"implementation of double: got 'fats', expected one of .*; did you mean 'fast'\?"
    ):
        double(jnp.ones(2), implementation="fats")
    with (
        seqlab.use_implementation("referense"),
        pytest.raises(ValueError, match=r"did you mean 'reference'\?"),
    ):
        double(jnp.ones(2))
    with pytest.raises(ValueError, match=r"colour: got 'zzz', expected one of 'red', 'green'$"):
        check_choice("zzz", ("red", "green"), "colour")


def test_explain_names_the_choice_and_the_reasons_of_those_that_declined(double):
    [choice] = seqlab.explain(double, jnp.ones(3))
    assert choice == Choice("double", "xla", (("fast", "more than 2 rows"),))
    assert str(choice) == "double: xla; fast declined: more than 2 rows"
    assert seqlab.explain(double, jnp.ones(2)) == [Choice("double", "fast")]
    assert seqlab.explain(double, jnp.ones(3), implementation="xla") == [Choice("double", "xla")]
    with seqlab.use_implementation("reference"):
        assert seqlab.explain(double, jnp.ones(3)) == [Choice("double", "reference")]


def test_explain_lists_every_choice_once_in_order_and_runs_nothing(double):
    ran = []

    def function(x, y):
        jax.debug.callback(lambda: ran.append(1))
        return double(x) + double(double(x)), double(y)

    assert [c.implementation for c in seqlab.explain(function, jnp.ones(3), jnp.ones(2))] == ["xla", "fast"]
    jax.effects_barrier()
    assert not ran


def test_explain_sees_into_functions_that_were_jitted_and_called_before(double):
    function = jax.jit(lambda x: double(x))
    function(jnp.ones(3))
    for _ in range(2):
        assert seqlab.explain(function, jnp.ones(3)) == [
            Choice("double", "xla", (("fast", "more than 2 rows"),))
        ]


def test_use_implementation_holds_within_its_block_and_yields_to_a_name(double):
    with seqlab.use_implementation("reference"):
        assert double(jnp.ones(1)).tolist() == [1002]
        assert double(jnp.ones(1), implementation="xla").tolist() == [2]
        with seqlab.use_implementation(None):
            assert double(jnp.ones(1)).tolist() == [12]
        assert double(jnp.ones(1)).tolist() == [1002]
    assert double(jnp.ones(1)).tolist() == [12]
    with pytest.raises(KeyError), seqlab.use_implementation("reference"):
        raise KeyError
    assert double(jnp.ones(1)).tolist() == [12]


def test_use_implementation_reaches_functions_compiled_before(double):
    function = jax.jit(lambda x: double(x))
    assert function(jnp.ones(1)).tolist() == [12]
    with seqlab.use_implementation("reference"):
        assert function(jnp.ones(1)).tolist() == [1002]
    assert function(jnp.ones(1)).tolist() == [12]


# On a real op.


def arguments():
    return (jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 4)), jnp.float32),) * 3


def test_attention_declined_by_a_better_implementation_is_still_answered(monkeypatch):
    def decline(*args, **kwargs):
        raise NotImplementedError("not today")

    attention = seqlab.kernels.attention
    folder = importlib.import_module("seqlab.kernels.attention")
    fake = type(sys)("seqlab.kernels.attention.triton_gpu")
    fake.attention = decline
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setitem(dispatch._PREFERENCE, "cpu", ("triton_gpu", "xla"))
    monkeypatch.setattr(folder, "_op", Op("attention", folder.__name__, ("reference", "xla", "triton_gpu")))
    np.testing.assert_array_equal(
        attention(*arguments())[0], attention(*arguments(), implementation="xla")[0]
    )
    [choice] = seqlab.explain(attention, *arguments())
    assert str(choice) == "attention: xla; triton_gpu declined: not today"
    with pytest.raises(NotImplementedError, match="not today"):
        attention(*arguments(), implementation="triton_gpu")


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "first", ["import seqlab.kernels.attention", "from seqlab.kernels.attention import merge", "pass"]
)
def test_an_op_is_a_function_however_its_folder_was_imported(first):
    done = python(f"""
{first}
from seqlab.kernels import attention
import seqlab.kernels, seqlab.kernels.attention, types
from seqlab.kernels.attention import attention as same, xla
assert isinstance(attention, types.FunctionType) and attention is same is seqlab.kernels.attention, attention
assert isinstance(xla, types.ModuleType)
assert {{'attention', 'conv', 'linear_attention', 'scan'}} <= set(dir(seqlab.kernels))
try:
    seqlab.kernels.atention
except AttributeError as error:
    assert 'linear_attention, lmu, scan' in str(error), error
else:
    raise AssertionError""")
    assert done.returncode == 0, done.stderr


def test_importing_kernels_is_cheap_and_touches_no_device():
    heavy = ("triton", "jax_triton", "jax.experimental.pallas", "flax", "optax", "torch", "numpy", "jax")
    done = python(f"import sys, seqlab.kernels; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    done = python(f"""
import sys
from seqlab.kernels import attention
from jax._src import xla_bridge
assert not xla_bridge._backends, 'a device was touched'
names = ('seqlab.kernels.attention.xla', 'seqlab.kernels.attention.reference')
print([name for name in {heavy[:6]} + names if name in sys.modules])""")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
