"""Ticks and lines of charts."""

import pytest

from fasttrain.report.charts import Series, line_chart, thin, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1.4, 2.5, [1.4, 1.6, 1.8, 2, 2.2, 2.4]),
        (10, 60, [10, 20, 30, 40, 50, 60]),
        (-3e-7, 3e-7, [-3e-7, -2e-7, -1e-7, 0, 1e-7, 2e-7, 3e-7]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    found = ticks(low, high)
    assert found == pytest.approx(expected)


def test_a_spike_survives_thinning():
    points = [(float(x), 1.0) for x in range(50_000)]
    points[31_337] = (31_337.0, 99.0)
    few = thin(points)
    assert len(few) <= 700 and (31_337.0, 99.0) in few and few == sorted(few)


def test_charts_of_one_point_equal_values_and_large_numbers_are_finite():
    for points in ([(5, 1.0)], [(0, 2.0), (1, 2.0)], [(0, -9e29), (2**52, 9e29)]):
        svg = line_chart("loss", [Series("run", points)])
        assert "nan" not in svg and "inf" not in svg
    assert line_chart("loss", [Series("run", [])]) == ""
