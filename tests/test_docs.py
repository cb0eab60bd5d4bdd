"""The pages of docs/mixers and docs/reference are what the code says: `make docs` writes them. Links lead
somewhere."""

import ast
import inspect
import pathlib
import re

import pytest

from seqlab import models
from seqlab.models import cache, images
from seqlab.tooling import catalog
from seqlab.tooling import mixer_pages as pages
from seqlab.tooling import reference_pages as reference

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "mixers"


def counted(text):
    """Without XLA's count of operations, which is another one in another version."""
    return re.sub(r"about [\d,]+ floating-point operations", "", text)


@pytest.mark.parametrize("cls", catalog.mixers(), ids=lambda cls: cls.__name__)
def test_a_page_is_up_to_date_and_says_what_goes_wrong(cls):
    path = FOLDER / f"{cls.__name__}.md"
    assert path.is_file(), "run `make docs`"
    assert counted(path.read_text()) == counted(pages.page(cls)), "run `make docs`"
    for heading in ("## Pitfalls", "## Use", "## Source"):
        assert heading in path.read_text(), f"the docstring of {cls.__name__} lacks what makes {heading}"


def test_no_page_is_left_of_a_mixer_that_is_gone():
    assert {path.stem for path in FOLDER.glob("*.md")} == {cls.__name__ for cls in catalog.mixers()} | {
        "README"
    }


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_of_the_reference_is_up_to_date(name):
    assert (ROOT / "docs" / "reference" / f"{name}.md").read_text() == reference.page(name), "run `make docs`"


def anchors(path):
    """Of the headings of a page, as both the code host and the site make them."""
    headings = re.findall(
        r"^#+ (.*)$",
        re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE),
        re.MULTILINE,
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)]*))?\)", text):
        found = path.parent / target if target else path
        assert found.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}: there is no such heading"


def glossary():
    """The classes with a section of the glossary, and the arguments in the first column of its table."""
    sections = re.split(r"^### ", (ROOT / "docs" / "glossary.md").read_text(), flags=re.MULTILINE)[1:]
    for section in sections:
        own = section.partition("\n## ")[0]
        rows = re.findall(r"^\| (`[^|]*`) \|", own, re.MULTILINE)
        yield own.partition("\n")[0].strip(), re.findall(r"`(\w+)`", " ".join(rows))


def test_the_glossary_names_classes_and_arguments_that_exist():
    named = dict(glossary())
    assert {cls.__name__ for cls in catalog.mixers()} <= set(named), "a mixer has no section"
    assert {cls.__name__ for cls in cache.Policy.__subclasses__() if cls.__name__ in cache.__all__} <= set(
        named
    )
    for name, arguments in named.items():
        cls = getattr(models, name, None) or getattr(cache, name)
        assert set(arguments) <= set(inspect.signature(cls).parameters), name
    text = (ROOT / "docs" / "glossary.md").read_text()
    for heading, module in (("Whole models", models), ("Image mixers", images)):
        table = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        for cell in re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE):
            for name in re.findall(r"`(\w+)`", cell):
                assert inspect.isclass(getattr(module, name)), name


def names_in(path):
    """Functions, classes, methods and assigned names of a source file."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                yield target.id


def test_the_code_tour_names_what_is_there():
    text = (ROOT / "docs" / "code-tour.md").read_text()
    found = re.findall(r"`([\w./]+\.py)(?::([\w.]+))?`", text)
    assert len(found) > 50
    for file, name in found:
        path = ROOT / file
        assert path.is_file() or file == "configs/NAME.py", file
        assert not name or name in set(names_in(path)), f"{file}:{name}"
