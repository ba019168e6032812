from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from tempo_em.report.charts import Axis, line_chart, reliability_chart, share_bar, spark, spread, stacked_bars, ticks
from tempo_em.report.series import Curve

FINITE = st.floats(-1e12, 1e12, allow_subnormal=False)


def texts(svg: Markup) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def drawn(curves: list[Curve], axis: Axis) -> Markup:
    svg = line_chart("c", "title", curves, axis)
    assert svg is not None
    return svg


def test_ticks_are_round_and_lie_within() -> None:
    assert ticks(0, 1, 4) == [0, 0.5, 1.0]
    assert ticks(0, 0.8, 4) == [0, 0.2, 0.4, 0.6, 0.8]
    assert ticks(3, 40, 4) == [10, 20, 30, 40]


def test_a_share_is_written_in_percent_and_a_line_is_named_at_its_end() -> None:
    svg = drawn([Curve("unlabelled", [(0, 0.2), (40, 0.6)], [])], Axis(is_share=True))
    assert texts(svg) == ["20%", "30%", "40%", "50%", "60%", "0", "10", "20", "30", "40", "EM iteration", "unlabelled"]


def test_a_chart_says_in_words_what_it_shows() -> None:
    svg = ElementTree.fromstring(drawn([Curve("a", [(0, 0.2), (40, 0.6)], [])], Axis(is_share=True)))
    assert svg.get("role") == "img"
    assert [svg.findtext("title"), svg.findtext("desc")] == ["title", "a from 20% at iteration 0 to 60% at 40"]
    assert svg.get("aria-labelledby") == "c-title c-desc"


def test_without_points_there_is_no_chart() -> None:
    assert line_chart("c", "title", [Curve("a", [], [])], Axis()) is None
    assert line_chart("c", "title", [Curve("a", [(1, 0.0)], [])], Axis(is_log=True)) is None


def test_powers_of_ten_and_thousands_are_short() -> None:
    assert texts(drawn([Curve("a", [(1, 1e-9), (2, 1e-7)], [])], Axis(is_log=True)))[:3] == ["1e-9", "1e-8", "1e-7"]
    assert texts(drawn([Curve("a", [(1, 0), (2, 20000)], [])], Axis()))[:3] == ["0", "5k", "10k"]


@given(st.lists(st.tuples(st.integers(0, 10**6), FINITE), min_size=1, max_size=20), st.booleans(), st.booleans())
def test_any_numbers_make_a_chart_inside_its_frame(points: list[tuple[int, float]], share: bool, log: bool) -> None:
    curve = Curve("a", sorted((float(x), y) for x, y in points), [(float(x), y, y) for x, y in points])
    svg = line_chart("c", "title", [curve], Axis(is_share=share, is_log=log))
    if svg is None:
        assert log
        return
    for line in ElementTree.fromstring(svg).iter("polyline"):
        for pair in (line.get("points") or "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 340
            assert 0 <= y <= 200


@given(st.lists(st.floats(0, 200), max_size=8))
def test_labels_are_moved_apart_and_keep_their_order(heights: list[float]) -> None:
    placed = spread(sorted(heights), 13, 10, 170)
    assert len(placed) == len(heights)
    assert all(10 <= y <= 170 for y in placed)
    assert all(below - above >= 13 - 0.11 for above, below in pairwise(placed))


def test_names_cannot_become_markup() -> None:
    hostile = '<script>alert(1)</script>"'
    for svg in (
        drawn([Curve(hostile, [(0, 1), (1, 2)], [])], Axis()),
        reliability_chart("c", hostile, [(hostile, [(4, 0.1, 0.0)], "s0")]),
        share_bar("c", hostile, [(hostile, 0, 1.0)]),
        stacked_bars("c", hostile, [(hostile, 0)], [(1, [1.0])]),
        spark("c", hostile, [0.5]),
    ):
        assert "<script" not in svg
        assert {element.tag for element in ElementTree.fromstring(svg).iter()} <= {
            "svg", "title", "desc", "g", "line", "text", "polyline", "polygon", "circle", "rect",
        }  # fmt: skip


def test_bars_are_stacked_to_the_sum_of_their_seconds() -> None:
    svg = ElementTree.fromstring(stacked_bars("c", "t", [("a", 0), ("b", 3)], [(1, [1.0, 3.0])]))
    low, high = svg.iter("rect")
    assert [low.get("class"), high.get("class")] == ["p0", "p3"]
    assert float(high.get("height") or 0) == pytest.approx(3 * float(low.get("height") or 0), abs=0.2)
    assert float(high.get("y") or 0) + float(high.get("height") or 0) == pytest.approx(float(low.get("y") or 0))
