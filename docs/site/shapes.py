"""A few shapes of SVG, in colours that follow the reader's light or dark scheme."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

STYLE = """
.ink{fill:#1f2933}.soft{fill:#5f6c7b}.line{stroke:#5f6c7b}.card{fill:#f4f6f8;stroke:#c3ccd5}.dot{fill:#9aa7b4}
.a{fill:#00796b}.b{fill:#c2410c}.c{fill:#5b4bb7}.sa{stroke:#00796b}.sb{stroke:#c2410c}.sc{stroke:#5b4bb7}
@media (prefers-color-scheme:dark){
.ink{fill:#e6eaee}.soft{fill:#a3afbb}.line{stroke:#a3afbb}.card{fill:#2a3038;stroke:#4b5663}.dot{fill:#6b7885}
.a{fill:#4db6ac}.b{fill:#fb923c}.c{fill:#a99cf5}.sa{stroke:#4db6ac}.sb{stroke:#fb923c}.sc{stroke:#a99cf5}}
text{font:14px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
.small{font-size:12px}.head{font-weight:600}.none{fill:none}
"""
"""Classes of colour: ink and soft for text, line, card, dot; a, b, c to fill with and sa, sb, sc to draw with."""


def picture(width: int, height: int, title: str, shapes: Iterable[str]) -> str:
    """A whole drawing; `title` is what a screen reader says."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">'
    )
    arrow = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" class="soft"/></marker></defs>'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", arrow, *shapes, "</svg>", ""])


def text(x: float, y: float, said: str, look: str = "ink", anchor: str = "start") -> str:
    """A line of text whose baseline is at y."""
    return f'<text x="{number(x)}" y="{number(y)}" class="{look}" text-anchor="{anchor}">{escape(said)}</text>'


def card(x: float, y: float, width: float, height: float) -> str:
    """A rounded box."""
    return f'<rect x="{number(x)}" y="{number(y)}" width="{width:g}" height="{height:g}" rx="8" class="card"/>'


def box(x: float, y: float, width: float, height: float, head: str, lines: Sequence[str] = ()) -> str:
    """A rounded box with a heading and lines under it, in its middle."""
    middle = x + width / 2
    top = y + height / 2 - 9 * len(lines) + 5
    said = [text(middle, top, head, "ink head", "middle")]
    said += [text(middle, top + 19 * (n + 1), line, "soft small", "middle") for n, line in enumerate(lines)]
    return "\n".join([card(x, y, width, height), *said])


def arrow(*points: tuple[float, float], look: str = "line") -> str:
    """An arrow along points."""
    return f'<path d="{_path(points)}" class="none {look}" stroke-width="1.6" marker-end="url(#tip)"/>'


def curve(points: Sequence[tuple[float, float]], look: str, width: float = 2.2, dashes: str = "") -> str:
    """A line through points."""
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="{_path(points)}" class="none {look}" stroke-width="{width:g}"{dashed}/>'


def dot(x: float, y: float, radius: float, look: str) -> str:
    """A filled circle."""
    return f'<circle cx="{number(x)}" cy="{number(y)}" r="{radius:g}" class="{look}"/>'


def ring(x: float, y: float, width: float, height: float, look: str) -> str:
    """A rounded frame around what is chosen, by its middle."""
    left, top = number(x - width / 2), number(y - height / 2)
    frame = f'width="{number(width)}" height="{number(height)}" rx="{number(min(width, height) / 2)}"'
    return f'<rect x="{left}" y="{top}" {frame} class="none {look}" stroke-width="2.2"/>'


def number(value: float) -> str:
    """A coordinate with one decimal, so that the last bits of a computation change no picture."""
    return f"{round(value, 1) + 0:g}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{number(x)} {number(y)}" for x, y in points)
