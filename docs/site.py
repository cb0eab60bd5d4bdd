"""What mkdocs is told beyond mkdocs.yml: the order of the pages, and that the house's own papers belong to
the site.

Pages are found, not listed: a page that is added appears by itself, under its first heading.
"""

import pathlib

from mkdocs.structure.files import File

ORDER = ("README.md", "tutorial.md", "how-to", "reference", "mixers", "explanation")  # others follow by name
PAPERS = ("CONTRIBUTING.md", "CHANGELOG.md")  # of the repository's root
ROOT = pathlib.Path(__file__).resolve().parent.parent


def on_files(files, config):
    """The papers of the root become pages; what they link to in docs/ lies beside them."""
    for name in PAPERS:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to them leave docs/ in the repository, and stay in the site."""
    up = "../" * page.file.src_uri.count("/")
    for name in PAPERS:
        markdown = markdown.replace(f"]({up}../{name}", f"]({up}{name}")
    return markdown


def on_nav(nav, config, files):
    """The reader's order."""
    nav.items.sort(key=_place)
    return nav


def _place(item):
    name = item.file.src_uri if item.is_page else item.children[0].file.src_uri.partition("/")[0]
    return (ORDER.index(name), "") if name in ORDER else (len(ORDER), name)
