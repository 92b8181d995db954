"""Plots are well-formed SVG that shows every value, whatever the names and numbers."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fptq_runtime.analysis import plots

SVG = "{http://www.w3.org/2000/svg}"
characters = st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="\ufffe\uffff")
names = st.text(characters, max_size=20)
values = st.floats(0, 1e9)


def titles(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}title")]


@given(st.lists(st.tuples(names, st.none() | values, names), max_size=6))
def test_bars(rows: list[tuple[str, float | None, str]]) -> None:
    svg = plots.bars(rows, marked=[name for name, _, _ in rows[:1]])
    assert titles(svg) == [f"{name}: {text}" for name, _, text in rows]
    widths = [float(node.get("width", "nan")) for node in ElementTree.fromstring(svg).iter(f"{SVG}rect")]
    assert all(math.isfinite(width) and width >= 0 for width in widths)


@given(st.lists(st.lists(st.none() | values, min_size=3, max_size=3), min_size=1, max_size=4))
def test_heatmap(cells: list[list[float | None]]) -> None:
    svg = plots.heatmap([f"<{i}>" for i in range(len(cells))], ["a", "b", "&"], cells, "nats")
    assert len(titles(svg)) == sum(value is not None for row in cells for value in row)


def test_a_heatmap_of_many_columns_stays_within_its_width() -> None:
    svg = plots.heatmap(["qkv"], [str(i) for i in range(80)], [[1.0] * 80], "")
    rects = ElementTree.fromstring(svg).iter(f"{SVG}rect")
    assert max(float(r.get("x", 0)) + float(r.get("width", 0)) for r in rects) <= plots.WIDTH


def test_lines_and_histograms() -> None:
    svg = plots.lines(["0", "1", "2"], [("one", [0.0, 1.0, 2.0]), ("two", [2.0, 0.0, 1.0])], "nats")
    assert titles(svg)[:2] == ["one, 0: 0 nats", "one, 1: 1 nats"] and len(titles(svg)) == 6
    ElementTree.fromstring(plots.lines(["0"], [("", [0.0])], ""))
    assert titles(plots.histograms([-1, 0, 1], [("now", [0.5, 0.5]), ("before", [1.0, 0.0])])) == ["now", "before"]


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.0001234, "1e-4"), (0.01234, "0.0123"), (3.14159, "3.14"),
                                             (123.4, "123"), (98765.0, "98765")])
def test_numbers(value: float, text: str) -> None:
    assert plots.number(value) == text


@given(st.integers(-40, 20), st.integers(1, 60), st.floats(100, 400))  # 1/2^40 takes 99
def test_the_ticks_of_a_histogram_are_within_it_and_apart(first: int, bins: int, width: float) -> None:
    edges = range(first, first + bins + 1)
    svg = plots.histograms(edges, [("", [1.0] * bins)], width=width)
    end = 0.0
    for tick in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        x, half = float(tick.get("x", "nan")), len(tick.text or "") * plots.CHARACTER / 2
        assert x - half >= end - 0.1
        end = x + half
    assert end <= width + 0.1
