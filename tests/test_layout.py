"""The house stays in order: folders, import direction, budgets, the package list, cheap imports."""

import ast
import importlib
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("seqlab", "models", "kernels", "train", "configs")
# Of seqlab/: imported by everything, importing nothing above it.
CORE = ("_moved", "shapes", "module", "state", "resets", "mixer", "checks", "names", "parallel", "tokenizers")
ORDER = ("core", "kernels", "models", "train", "configs", "top")  # each may import what stands before it


def layer(module):
    """The layer of a dotted module name: the rest of seqlab/ (generation, command line, ...) sits on top."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] in CORE:
        return "core"
    return parts[1] if parts[1] in ORDER else "top"


def sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "seqlab" else ("seqlab", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unrun(tree):
    """The block of a package whose names are loaded when they are used: its imports, for type checkers
    alone."""
    tests = (node for node in tree.body if isinstance(node, ast.If))
    return next((node for node in tests if ast.unparse(node.test) == "TYPE_CHECKING"), None)


def imports(tree):
    if lazy := unrun(tree):
        tree.body.remove(lazy)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where things come from"
            yield from (
                f"{node.module}.{alias.name}" if node.module == "seqlab" else node.module
                for alias in node.names
            )


@pytest.mark.parametrize("path", sources(*FOLDERS), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way_and_files_keep_their_budget(path):
    text = path.read_text()
    here = layer(module_name(path))
    for name in imports(ast.parse(text)):
        if name.split(".")[0] in FOLDERS:
            assert name.split(".")[0] == "seqlab", f"{name} must be imported as seqlab.{name}"
            assert ORDER.index(layer(name)) <= ORDER.index(here), (
                f"{module_name(path)} ({here}) imports {name} ({layer(name)})"
            )
    budget = 150 if path.parent.name == "configs" else 600 if "kernels" in path.parts else 500
    assert len(text.splitlines()) <= budget, (
        f"{path.name} has {len(text.splitlines())} lines; split it by idea (budget {budget})"
    )


def lines_of_code(function):
    """The length of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_functions_keep_their_budget():
    functions = [
        (path.name, node)
        for path in sources(*FOLDERS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    long = {
        f"{name}:{node.name}": lines_of_code(node) for name, node in functions if lines_of_code(node) > 90
    }
    assert not long, long


def test_every_folder_of_sources_is_a_package_that_a_wheel_takes():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert packaged["packages"] == {"find": {"include": ["seqlab*"]}}
    assert [path for path in sources(*FOLDERS) if not (path.parent / "__init__.py").is_file()] == []


def test_top_level_folders_are_those_of_the_house():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert folders <= {*FOLDERS, "tests", "docs", "notebooks", ".ci"}, folders


@pytest.mark.parametrize("package", ["seqlab", "seqlab.kernels"])
def test_type_checkers_see_what_is_loaded_lazily(package):
    """The imports that are read and never run are those that `__getattr__` makes, from the same modules."""
    module = importlib.import_module(package)
    tree = ast.parse(pathlib.Path(module.__file__).read_text())
    read = {
        alias.name: (node.module, alias.asname or alias.name)
        for node in unrun(tree).body
        for alias in node.names
    }
    lazy = getattr(module, "_PUBLIC", None) or {name: f"{package}.{name}" for name in module.__all__}
    assert read == {name: (source, name) for name, source in lazy.items()}


def test_types_are_published_and_the_subpackages_are_where_tools_look():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in packaged["package-data"]["seqlab"]
    assert all((ROOT / "seqlab" / name).is_file() for name in packaged["package-data"]["seqlab"])
    assert packaged["package-dir"] == {"": "."}, "an editable install would be code, which no editor runs"
    for name in FOLDERS[1:]:
        assert (ROOT / "seqlab" / name).samefile(ROOT / name) and (ROOT / "seqlab" / name).is_symlink()


def python(code, *options):
    return subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_importing_seqlab_is_cheap():
    heavy = ("jax", "flax", "grain", "tensorflow_datasets", "orbax", "triton", "tokamax", "torch", "numpy")
    done = python(f"import sys, seqlab; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_importing_models_touches_no_device_and_nothing_heavy():
    heavy = ("grain", "tensorflow_datasets", "orbax", "triton", "torch", "matplotlib", "fiddle")
    code = f"""
import sys, seqlab.models, seqlab, jax
seqlab.stream_generate, seqlab.verify_streaming
from jax._src import xla_bridge
assert not xla_bridge._backends, 'a device was touched'
print([name for name in {heavy} if name in sys.modules])"""
    done = python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["models", "kernels", "train", "configs"])
def test_a_folder_cannot_be_imported_under_a_second_name(folder):
    done = python(f"import {folder}")
    assert f"import seqlab.{folder}, not {folder}" in done.stderr
