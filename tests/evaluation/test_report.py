import numpy as np
import pytest

from mindjax.data import tasks
from mindjax.evaluation import charts, report


def test_ticks_are_round_and_cover_the_range():
    for low, high in ((0, 1), (0.013, 0.0172), (3, 3), (0, 0), (-2.5, 731), (1e-7, 3e-7), (6.2e-14, 6.6e-14)):
        ticks = charts.ticks(low, high)
        assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
        assert 2 <= len(ticks) <= 8
        steps = np.diff(ticks)
        np.testing.assert_allclose(steps, steps[0])


def test_the_running_mean_of_a_line_is_the_line():
    np.testing.assert_allclose(charts.running_mean(np.arange(20.0), 7), np.arange(20.0))
    assert charts.running_mean([1.0, 5.0, 3.0], 0) == [1.0, 5.0, 3.0]


def test_a_curve_stays_inside_its_picture_and_names_are_escaped():
    picture = charts.lines("a < b", [charts.Series("x & y", [1, 2, 3], [0.5, float("nan"), 2.0], "red"),
                                     charts.Series("z", [1, 2], [-3, 1], "blue")], smooth=3)  # fmt: skip
    assert "a &lt; b" in picture and "x &amp; y" in picture and "nan" not in picture
    for line in picture.split('points="')[1:]:
        for point in line.split('"')[0].split():
            x, y = map(float, point.split(","))
            assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
            assert charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM
    assert charts.lines("nothing", [charts.Series("", [], [], "red")]) == ""


def test_examples_are_the_first_of_each_family(tmp_path):
    samples = [s for family in ("colour", "text_only") for s in tasks.build(family, "test", 4, 0)]
    report.save_examples(tmp_path, samples)
    import json

    index = json.loads((tmp_path / "index.json").read_text())
    assert [entry["id"] for entry in index] == [samples[i].id for i in (0, 1, 4, 5)]
    assert [("image" in entry) for entry in index] == [True, True, False, False]
    assert all((tmp_path / entry["image"]).exists() for entry in index if "image" in entry)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ({"kind": "exact", "value": "red"}, "red"),
        ({"kind": "one_of", "value": ["1", "2"]}, "1 or 2"),
        ({"kind": "within", "value": 40, "tolerance": 5}, "40 ± 5"),
    ],
)
def test_the_truth_is_told_for_every_kind_of_answer(answer, shown):
    assert report._truth(answer) == shown
