"""Shapes and text of a picture, written as SVG. Every text is escaped; coordinates are pixels."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape, quoteattr

FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
INK, MUTED, FAINT, PAPER = "#1d2733", "#5b6875", "#e7ebf0", "#ffffff"
GROUND, FRAME, ALARM = "#f6f8fa", "#d3dae2", "#c92a2a"
TIMES = "\N{MULTIPLICATION SIGN}"
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def ranges(text: str) -> str:
    """Ranges with the dash that books use for them."""
    return text.replace("-", "\N{EN DASH}")


def shown(text: str) -> str:
    """Text as XML holds it; characters that XML does not know become question marks."""
    return escape(_UNPRINTABLE.sub("?", text))


def text_width(text: str, size: float, bold: bool = False) -> float:
    """An upper estimate of how wide text runs in a sans-serif font, pixels."""
    narrow = sum(text.count(letter) for letter in "iljtf.,:;|!' ()[]-")
    return ((len(text) - narrow) * (0.62 if bold else 0.58) + narrow * 0.34) * size


def wrapped(text: str, size: float, width: float) -> list[str]:
    """``text`` in lines that fit ``width``; a word that is wider stands alone and is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(fitted(word, size, width))
    return lines


def fitted(text: str, size: float, width: float, bold: bool = False) -> str:
    """``text``, cut with an ellipsis where it would run wider than ``width``."""
    if text_width(text, size, bold) <= width:
        return text
    while text and text_width(text + "…", size, bold) > width:
        text = text[:-1]
    return text + "…"


class Canvas:
    """Collects shapes in drawing order; :meth:`document` is the finished picture."""

    def __init__(self) -> None:
        self._shapes: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        stroke: str = "",
        radius: float = 0,
        dashed: bool = False,
    ) -> None:
        """A rectangle, with a border where ``stroke`` is a colour."""
        extra = f' rx="{radius:g}"' if radius else ""
        if stroke:
            extra += f' stroke="{stroke}"' + (' stroke-dasharray="4 3"' if dashed else "")
        self._shapes.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" fill="{fill}"{extra}/>'
        )

    def text(
        self, x: float, y: float, text: str, size: float, *, fill: str = INK, bold: bool = False, anchor: str = "start"
    ) -> None:
        """Text on the baseline ``y``. ``anchor``: start, middle or end."""
        extra = ' font-weight="600"' if bold else ""
        extra += f' text-anchor="{anchor}"' if anchor != "start" else ""
        self._shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"{extra}>{shown(text)}</text>'
        )

    def path(self, d: str, *, fill: str = "none", stroke: str = "", width: float = 1) -> None:
        """A path in SVG's own words."""
        extra = f' stroke="{stroke}" stroke-width="{width:g}"' if stroke else ""
        self._shapes.append(f'<path d="{d}" fill="{fill}"{extra}/>')

    def open_group(self, css_class: str, title: str) -> None:
        """What follows belongs together; a browser shows ``title`` where the pointer rests."""
        self._shapes.append(f"<g class={quoteattr(css_class)}><title>{shown(title)}</title>")

    def close_group(self) -> None:
        """The end of what :meth:`open_group` began."""
        self._shapes.append("</g>")

    def document(self, width: float, height: float, title: str) -> str:
        """The picture on a light ground."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" font-family="{FONT}" role="img">\n<title>{shown(title)}</title>\n'
        )
        ground = f'<rect width="{width:.0f}" height="{height:.0f}" fill="{PAPER}"/>\n'
        return head + ground + "\n".join(self._shapes) + "\n</svg>\n"
