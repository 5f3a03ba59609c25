"""The look of a report: one self-contained HTML page from paragraphs, tables and figures. No numbers are made here."""

import base64
import html
from collections.abc import Sequence

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CSS = """
:root { --ink: #22262b; --muted: #666e79; --line: #e3e6ea; --accent: #b3421f; --wash: #faf9f7; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; -webkit-font-smoothing: antialiased;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 56px 28px 96px; }
.eyebrow { color: var(--muted); font-size: 13px; letter-spacing: .04em; margin: 0 0 6px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.015em; margin: 0 0 8px; font-weight: 650; }
h2 { font-size: 20px; letter-spacing: -.005em; margin: 56px 0 6px; font-weight: 650; }
p { margin: 8px 0; max-width: 78ch; }
.lede { color: var(--muted); margin: 0 0 32px; }
.answer { background: var(--wash); border-left: 3px solid var(--accent); padding: 22px 26px 20px; margin: 28px 0 8px; }
.answer .headline { font-size: 21px; line-height: 1.42; margin: 0; max-width: 66ch; }
.answer .headline b { font-weight: 650; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 20px 28px;
  margin: 20px 0 4px; padding: 16px 0 0; border-top: 1px solid #e9e4dd; }
.figures dt { color: var(--muted); font-size: 13px; }
.figures dd { margin: 0; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures dd span { display: block; color: var(--muted); font-size: 13px; font-weight: 400; letter-spacing: 0; }
.answer ul { margin: 14px 0 0; padding-left: 18px; font-size: 15px; } .answer li { margin: 4px 0; max-width: 80ch; }
figure { margin: 14px 0 0; } figure img { width: 100%; height: auto; display: block; }
figcaption, .note { color: var(--muted); font-size: 14px; max-width: 84ch; margin: 8px 0 0; }
.scroll { overflow-x: auto; margin: 14px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--muted); font-weight: 500; font-size: 13px; vertical-align: bottom;
  border-bottom: 1px solid #c9ced6; }
th, td { padding: 6px 14px 6px 0; white-space: nowrap; }
td { border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
td.num, th.num { text-align: right; } td.wrap { white-space: normal; overflow-wrap: anywhere; }
td.wrap { font-size: 13px; }
td small { color: var(--muted); font-size: 12.5px; display: block; }
.flag { color: var(--accent); }
sup { line-height: 0; font-size: 72%; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--wash); border: 1px solid var(--line); padding: 12px 14px; margin: 12px 0; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 14px 0 0; } summary { cursor: pointer; color: var(--muted); font-size: 14px; }
@media print { main { padding: 0; max-width: none; } h2 { break-after: avoid; }
  figure, tr, .answer { break-inside: avoid; } }
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole document; the policy line makes a browser refuse any request that the page might make."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def escape(value: object) -> str:
    return html.escape(str(value))


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = (), wrap: Sequence[int] = ()
) -> str:
    """Cells are HTML already. Columns in `numeric` are set to the right, those in `wrap` may break lines."""

    def kind(i):
        return ' class="num"' if i in numeric else ' class="wrap"' if i in wrap else ""

    head = "".join(f"<th{kind(i)}>{name}</th>" for i, name in enumerate(header))
    lines = ["<tr>" + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows]
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def picture(svg: str, alternative: str, caption: str) -> str:
    """A figure as a data URI: an embedded document of its own, so that ids in two figures cannot clash."""
    data = base64.b64encode(svg.encode()).decode()
    image = f'<img alt="{escape(alternative)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def key_figures(items: Sequence[tuple[str, str, str]]) -> str:
    """(name, value, small print) side by side."""
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}<span>{small}</span></dd></div>" for name, value, small in items)
    return f'<dl class="figures">{cells}</dl>'


def bullets(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"
