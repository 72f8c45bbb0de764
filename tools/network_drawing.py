"""The drawing of the kinds of network in docs/guides/networks.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from xml.sax.saxutils import escape

_WIDTH, _PANEL, _GAP = 300, 250, 24
"""Pixels: a panel's width and height, and the space around panels."""
_GUEST, _HOST, _LINK = ("#d4efd8", "#12531f"), ("#cdeaf4", "#0b4a61"), ("#e8dcf8", "#4b2284")

_KINDS: Final = (
    ("user", ("passt of web", "passt of db"), "connections of the host", "internet"),
    ("bridge", ("tap, VLAN", "tap, VLAN"), "br0, a bridge of the host", "your LAN and other hosts"),
    ("managed", ("tap, rules", "tap, rules"), "bridge with DHCP and DNS", "internet, by NAT"),
)
"""Of each kind: its name, what connects each guest, what these are joined by, and what is reached."""


def network_drawing() -> str:
    """Return the drawing as SVG."""
    width = len(_KINDS) * (_WIDTH + _GAP) + _GAP
    height = _PANEL + 2 * _GAP
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="12">'
        ),
        "<title>The kinds of network</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, kind in enumerate(_KINDS):
        parts += _panel(_GAP + number * (_WIDTH + _GAP), *kind)
    return "\n".join((*parts, "</svg>")) + "\n"


def _panel(left: int, name: str, links: tuple[str, str], joined: str, reached: str) -> Iterator[str]:
    top, half = _GAP, _WIDTH // 2
    yield f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_PANEL - 46}" rx="6" fill="none" stroke="#9aa3ad"/>'
    yield f'<text x="{left + 8}" y="{top + 18}" font-weight="bold">{escape(name)}</text>'
    yield f'<text x="{left + _WIDTH - 8}" y="{top + 18}" text-anchor="end" fill="#9aa3ad">host</text>'
    for place, guest in enumerate(("web", "db")):
        middle = left + half // 2 + place * half
        yield from _box(middle, top + 34, 104, guest, _GUEST)
        yield from _line(middle, top + 62, top + 84)
        yield from _box(middle, top + 84, 128, links[place], _LINK)
        yield from _line(middle, top + 112, top + 142)
    yield from _box(left + half, top + 142, _WIDTH - 32, joined, _HOST)
    yield from _line(left + half, top + 170, top + 216)
    yield from _box(left + half, top + 216, _WIDTH - 32, reached, ("#ffffff", "#654c02"))


def _box(middle: int, top: int, width: int, text: str, colours: tuple[str, str]) -> Iterator[str]:
    fill, ink = colours
    left = middle - width // 2
    yield f'<rect x="{left}" y="{top}" width="{width}" height="28" rx="4" fill="{fill}" stroke="{ink}"/>'
    yield f'<text x="{middle}" y="{top + 18}" text-anchor="middle" fill="{ink}">{escape(text)}</text>'


def _line(x: int, top: int, bottom: int) -> Iterator[str]:
    yield f'<line x1="{x}" y1="{top}" x2="{x}" y2="{bottom}" stroke="#654c02"/>'
