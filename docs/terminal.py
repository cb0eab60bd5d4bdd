"""Runs commands and draws what a terminal shows, as an SVG that needs nobody: docs/terminal.svg is the
demo's.

python docs/terminal.py docs/terminal.svg "seqlab stream runs/demo --prompt 'class ' --max-tokens 400
--temperature 0.7"
"""

import html
import pathlib
import subprocess
import sys
import unicodedata

COLUMNS, ROWS, WIDTH, HEIGHT = 92, 32, 8.4, 18


def lines(text: str) -> list[str]:
    """`text` as a terminal of so many columns breaks it; characters that show nothing become dots."""
    shown = []
    for line in text.expandtabs(4).splitlines():
        line = "".join(letter if unicodedata.category(letter)[0] != "C" else "·" for letter in line)
        shown += [line[i : i + COLUMNS] for i in range(0, max(len(line), 1), COLUMNS)]
    return shown


def picture(shown: list[str]) -> str:
    """The lines as an SVG."""
    width, height = round(COLUMNS * WIDTH + 32), round(len(shown) * HEIGHT + 52)
    rows = (
        f'<text x="16" y="{48 + i * HEIGHT:g}" fill="{_colour(line)}">{html.escape(line)}</text>'
        for i, line in enumerate(shown)
    )
    dots = "".join(
        f'<circle cx="{20 + 18 * i}" cy="16" r="5" fill="{fill}"/>'
        for i, fill in enumerate(("#f47067", "#daaa3f", "#57ab5a"))
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}">',
            f'<rect width="{width}" height="{height}" rx="8" fill="#22272e"/>{dots}',
            '<g font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="14" '
            'xml:space="preserve">',
            *rows,
            "</g>\n</svg>\n",
        ]
    )


def _colour(line: str) -> str:
    return "#7ee787" if line.startswith("$ ") else "#d1d7e0"


def record(commands: list[str]) -> list[str]:
    """What the commands print, each behind its prompt; of long output the beginning and the end."""
    shown: list[str] = []
    for command in commands:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        text, last = lines(done.stdout.rstrip("\n")), lines(done.stderr.strip("\n"))
        room = ROWS // len(commands) - len(last) - 2
        shown += [f"$ {command}", *(text if len(text) <= room else [*text[: room - 1], "..."]), *last]
    return shown


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(picture(record(sys.argv[2:])), encoding="utf-8")
