"""The Markdown page as one HTML file: its own small subset of Markdown, pictures inlined, no script, nothing fetched."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h2 { border-bottom: 1px solid #ccc } h3 { margin-bottom: .3em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
td, th { border: 1px solid #ddd; padding: 2px 8px; text-align: right } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) { background: #f6f6f6 } img { max-width: 100% }
"""


def page(text: str, pictures: Mapping[str, bytes]) -> str:
    """HTML of a page written by `markdown.page`; `pictures` are its PNG files by name."""
    body = "\n".join(_block(block, pictures) for block in text.strip().split("\n\n"))
    head = f'<meta charset="utf-8"><title>fastsr benchmarks</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n{body}\n</html>\n'


def _block(block: str, pictures: Mapping[str, bytes]) -> str:
    if heading := re.match(r"(#{1,3}) (.*)", block):
        level = len(heading[1])
        return f"<h{level}>{_inline(heading[2])}</h{level}>"
    if image := re.fullmatch(r"!\[(.*?)\]\((.*?)\)", block):
        data = base64.b64encode(pictures[image[2].removesuffix(".png")]).decode()
        return f'<img alt="{html.escape(image[1])}" src="data:image/png;base64,{data}">'
    lines = block.split("\n")
    if lines[0].startswith("| "):
        head, body = _cells(lines[0]), [_cells(line) for line in lines[2:]]
        rows = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>\n" for row in body)
        return "<table><tr>" + "".join(f"<th>{_inline(cell)}</th>" for cell in head) + f"</tr>\n{rows}</table>"
    if lines[0].startswith("- "):
        return "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines if line.startswith("- ")) + "</ul>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _cells(line: str) -> list[str]:
    """The cells of a table's line; escaped bars belong to their cell."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
