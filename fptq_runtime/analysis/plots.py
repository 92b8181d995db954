"""Plots as SVG text: colours are CSS variables, so that they follow the page's light or dark scheme, and every mark
carries its value as a title. No library, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

LIGHT = {"bg": "#f5f6f8", "card": "#ffffff", "ink": "#1b2333", "soft": "#667085", "line": "#e3e6ec",
         "one": "#2f6bd8", "two": "#d9772b", "good": "#23855a", "bad": "#c2413a"}
DARK = {"bg": "#0f131a", "card": "#181e28", "ink": "#e8ebf1", "soft": "#97a1b3", "line": "#2c3443",
        "one": "#71a5ff", "two": "#f0a35e", "good": "#5cc795", "bad": "#f08a83"}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"

WIDTH = 720
ROW = 22
CHARACTER = 6.6  # of a 12-pixel label, roughly


def variables(scheme: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in scheme.items())


STYLE = f"""
:root {{ {variables(LIGHT)} color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}
.plot text {{ font: 12px {FONT}; fill: var(--ink); }}
.plot .soft {{ fill: var(--soft); font-size: 11px; }}
.plot .strong {{ font-weight: 600; }}
.plot .end {{ text-anchor: end; }}
.plot .middle {{ text-anchor: middle; }}
.plot .grid {{ stroke: var(--line); stroke-width: 1; }}
.plot .one {{ fill: var(--one); }}
.plot .two {{ fill: var(--two); }}
.plot .line {{ fill: none; stroke: var(--one); stroke-width: 2; stroke-linejoin: round; }}
.plot .line.two {{ fill: none; stroke: var(--two); }}
.plot .track {{ fill: var(--line); opacity: .55; }}
.plot .faint {{ opacity: .16; }}
"""


def bars(rows: Sequence[tuple[str, float | None, str]], marked: Sequence[str] = (), width: int = WIDTH) -> str:
    """One bar a row of (label, value, what is written beside it); None draws no bar. Labels in `marked` stand out."""
    left = _label_width([label for label, _, _ in rows])
    right = _label_width([text for _, _, text in rows]) + 6
    room = width - left - right
    most = max((value for _, value, _ in rows if value is not None), default=0.0) or 1.0
    parts = []
    for index, (label, value, text) in enumerate(rows):
        y = index * ROW
        size = 0.0 if value is None else max(0.0, value) / most * room
        kind = "two" if label in marked else "one"
        parts.append(
            f'<g><title>{escape(f"{label}: {text}")}</title>'
            f'<text class="end" x="{left - 8}" y="{y + 15}">{escape(label)}</text>'
            f'<rect class="track" x="{left}" y="{y + 4}" width="{room:.1f}" height="{ROW - 8}" rx="3"/>'
            f'<rect class="{kind}" x="{left}" y="{y + 4}" width="{size:.1f}" height="{ROW - 8}" rx="3"/>'
            f'<text class="soft" x="{left + room + 8:.1f}" y="{y + 15}">{escape(text)}</text></g>'
        )
    return svg("".join(parts), width, len(rows) * ROW + 2)


def heatmap(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], unit: str,
            width: int = WIDTH) -> str:
    """A cell a value, the darker the larger; None leaves it empty."""
    left = _label_width(rows)
    cell = (width - left) / max(1, len(columns))
    height = 26
    most = max((value for row in values for value in row if value is not None), default=0.0) or 1.0
    parts = [f'<text class="soft middle" x="{left + (i + 0.5) * cell:.1f}" y="12">{escape(column)}</text>'
             for i, column in enumerate(columns)]
    for r, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = 18 + r * height
        parts.append(f'<text class="end" x="{left - 8}" y="{y + 17}">{escape(name)}</text>')
        for c, value in enumerate(row):
            if value is None:
                continue
            share = max(0.0, value) / most
            label = f"{name}, {columns[c]}: {number(value)} {unit}"
            ink = "var(--card)" if share > 0.55 else "var(--ink)"
            written = number(value) if cell >= 46 else ""
            parts.append(
                f'<g><title>{escape(label)}</title><rect class="track" x="{left + c * cell + 1:.1f}" y="{y + 1}" '
                f'width="{cell - 2:.1f}" height="{height - 2}" rx="4"/><rect class="one" '
                f'x="{left + c * cell + 1:.1f}" y="{y + 1}" width="{cell - 2:.1f}" height="{height - 2}" rx="4" '
                f'style="opacity: {0.04 + 0.96 * share:.3f}"/>'
                f'<text class="middle" style="fill: {ink}; font-size: 11px" '
                f'x="{left + (c + 0.5) * cell:.1f}" y="{y + 17}">{written}</text></g>'
            )
    return svg("".join(parts), width, 18 + len(rows) * height + 2)


def lines(xs: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], unit: str, width: int = WIDTH,
          height: int = 190) -> str:
    """Two series at most, over the same named places, from zero."""
    most = max((value for _, values in series for value in values), default=0.0) or 1.0
    left, bottom, top = 62, height - 22, 22
    step = (width - left - 14) / max(1, len(xs) - 1)

    def place(index: int, value: float) -> tuple[float, float]:
        return left + index * step, bottom - max(0.0, value) / most * (bottom - top)

    parts = [_axis(left, width, bottom, top, most)]
    every = max(1, math.ceil(len(xs) * 30 / (width - left)))
    parts += [f'<text class="soft middle" x="{left + i * step:.1f}" y="{height - 6}">{escape(x)}</text>'
              for i, x in enumerate(xs) if i % every == 0]
    for (name, values), kind in zip(series, ("one", "two"), strict=False):
        points = [place(i, value) for i, value in enumerate(values)]
        parts.append(f'<polyline class="line {kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>'
                  f'{escape(f"{name}, {xs[i]}: {number(values[i])} {unit}")}</title></circle>'
                  for i, (x, y) in enumerate(points)]
    parts.append(_legend([name for name, _ in series], left))
    return svg("".join(parts), width, height)


def histograms(edges: Sequence[float], series: Sequence[tuple[str, Sequence[float]]], width: int = 340,
               height: int = 120) -> str:
    """Shares by bin of powers of two (edges are exponents), two series at most, drawn over each other as areas."""
    most = max((value for _, values in series for value in values), default=0.0) or 1.0
    bottom, top = height - 20, 8
    step = width / max(1, len(edges) - 1)
    parts = [f'<line class="grid" x1="0" x2="{width}" y1="{bottom}" y2="{bottom}"/>']
    end = -math.inf  # of the last tick's text
    for i, edge in enumerate(edges):
        text = _power(edge)
        half = len(text) * CHARACTER / 2
        x = min(width - half, max(half, i * step))
        if edge % 4 == 0 and x - half > end:
            parts.append(f'<text class="soft middle" x="{x:.1f}" y="{height - 6}">{text}</text>')
            end = x + half + CHARACTER
    for (name, values), kind in zip(series, ("one", "two"), strict=False):
        corners = [(0.0, float(bottom))]
        for i, value in enumerate(values):
            y = bottom - math.sqrt(value / most) * (bottom - top)  # so that what is rare is seen
            corners += [(i * step, y), ((i + 1) * step, y)]
        corners.append((width, bottom))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        parts.append(f'<g><title>{escape(name)}</title><polygon class="{kind} faint" points="{path}"/>'
                     f'<polyline class="line {kind}" style="stroke-width: 1.5" points="{path}"/></g>')
    return svg("".join(parts), width, height)


def panels(names: Sequence[str], columns: Sequence[tuple[str, Sequence[float | None], Sequence[str]]]) -> str:
    """A standalone SVG file: a row of bars a name, a column a quantity (its title, values and what is written)."""
    left, column, head = _label_width(names) + 10, 190, 34
    width, height = left + column * len(columns) + 10, head + ROW * len(names) + 12
    parts = [f'<rect width="{width}" height="{height}" style="fill: var(--card)"/>']
    parts += [f'<text class="end" x="{left - 10}" y="{head + i * ROW + 15}">{escape(name)}</text>'
              for i, name in enumerate(names)]
    for c, (title, values, texts) in enumerate(columns):
        x = left + c * column
        room = column - _label_width(texts) - 14
        most = max((value for value in values if value is not None), default=0.0) or 1.0
        parts.append(f'<text class="strong" x="{x}" y="20">{escape(title)}</text>')
        for i, (value, text) in enumerate(zip(values, texts, strict=True)):
            size = 0.0 if value is None else max(0.0, value) / most * room
            y = head + i * ROW
            parts.append(f'<g><title>{escape(f"{names[i]}, {title}: {text}")}</title><rect class="one" x="{x}" '
                         f'y="{y + 4}" width="{size:.1f}" height="{ROW - 8}" rx="3"/><text class="soft" '
                         f'x="{x + size + 6:.1f}" y="{y + 15}">{escape(text)}</text></g>')
    return svg(f"<style>{STYLE}</style>" + "".join(parts), width, height)


def svg(content: str, width: float, height: float) -> str:
    return (f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}" role="img">{content}</svg>')


def number(value: float) -> str:
    """Three digits that matter."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _label_width(labels: Sequence[str]) -> int:
    return round(max(map(len, labels), default=0) * CHARACTER) + 20


def _power(exponent: float) -> str:
    value = 2.0**exponent
    return f"{value:.0f}" if value >= 1 else f"1/{1 / value:.0f}"


def _axis(left: float, width: float, bottom: float, top: float, most: float) -> str:
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/><text class="soft end" '
                     f'x="{left - 8}" y="{y + 4:.1f}">{number(share * most)}</text>')
    return "".join(parts)


def _legend(names: Sequence[str], left: float) -> str:
    parts, x = [], left
    for name, kind in zip(filter(None, names), ("one", "two"), strict=False):
        parts.append(f'<rect class="{kind}" x="{x:.0f}" y="2" width="10" height="10" rx="2"/>'
                     f'<text class="soft" x="{x + 15:.0f}" y="11">{escape(name)}</text>')
        x += 15 + len(name) * CHARACTER + 22
    return "".join(parts)
