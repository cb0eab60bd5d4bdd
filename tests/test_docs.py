"""The pages of docs/mixers are what the code says: `make docs` writes them."""

import pathlib
import re

import pytest

from seqlab import catalog, pages

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "docs" / "mixers"


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
    assert {path.stem for path in FOLDER.glob("*.md")} == {cls.__name__ for cls in catalog.mixers()} | {"README"}
