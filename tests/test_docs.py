"""The pages of docs/mixers and docs/reference are what the code says: `make docs` writes them. Links lead
somewhere."""

import pathlib
import re

import pytest

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
