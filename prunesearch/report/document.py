"""The frame that all HTML pages share: one file each, which needs no network."""

from collections.abc import Sequence
from html import escape

# Text and hover boxes of a plotly figure take the page's colours, so that one figure serves light and dark screens.
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #5d5d5d; --paper: #ffffff; --line: #dddddd; --focus: #1a5fb4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #a6a6a6; --paper: #161618; --line: #3a3a3e;
  --focus: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
figure { margin: 0 0 1.5rem; }
.plot { height: min(32rem, 80vh); overflow: hidden; }
.plot text { fill: var(--ink) !important; }
.plot .hoverlayer path { fill: var(--paper) !important; stroke: var(--soft) !important; }
.plot .tracepinned path { stroke: var(--ink) !important; }
#pins { min-height: 3rem; margin: 0 0 1.5rem; }
#pins p { margin: 0; color: var(--soft); }
#pins .scroll { margin-top: 0; }
button { font: inherit; font-size: .8rem; color: var(--ink); background: none; border: 1px solid var(--soft);
  border-radius: .3rem; padding: .1rem .6rem; min-height: 1.5rem; cursor: pointer; }
td button { margin: -.1rem 0; }
button[aria-pressed="true"] { background: var(--ink); border-color: var(--ink); color: var(--paper); }
.scroll { overflow-x: auto; margin: 1.5rem 0 .3rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: 1rem; padding-bottom: .3rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; }
td.text { white-space: normal; min-width: 8rem; }
.text { text-align: left; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; }
caption small { font-weight: 400; }
#pins thead th, #pins td span { white-space: normal; overflow-wrap: anywhere; }
#pins td span { display: inline-block; text-align: left; }
#pins caption small { max-width: calc(100vw - 3rem); white-space: normal; }
@media (max-width: 30rem) { #pins table { font-size: .75rem; } #pins th, #pins td { padding: .3rem; }
  #pins th:first-child, #pins td:first-child { padding-left: 0; } }
small, figcaption { display: block; color: var(--soft); font-size: .8rem; max-width: 46rem; }
"""


def document(title: str, heading: str, parts: Sequence[str]) -> str:
    """A whole page. `parts` are HTML; title and heading are text, which is escaped here."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} – prunesearch</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(heading)}</h1>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )
