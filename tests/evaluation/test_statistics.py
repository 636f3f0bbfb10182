import numpy as np
import pytest

from mindjax.data import tasks
from mindjax.evaluation.statistics import blind_baseline, bootstrap, paired_bootstrap, wilson


def test_wilson_against_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for right, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                    (1, 29, 0.0061, 0.1718)):  # fmt: skip
        interval = wilson(right, total)
        assert interval.mean == right / total
        np.testing.assert_allclose((interval.low, interval.high), (low, high), atol=6e-5)


def test_wilson_refuses_what_is_no_share():
    for right, total in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="no share"):
            wilson(right, total)


def test_bootstrap_agrees_with_the_standard_error():
    scores = np.random.default_rng(0).random(400)
    interval = bootstrap(scores)
    assert interval.mean == pytest.approx(scores.mean())
    half = 1.96 * scores.std() / 20
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.1)


def test_pairing_sees_a_small_gain_that_the_arms_alone_would_hide():
    rng = np.random.default_rng(1)
    b = (rng.random((3, 300)) < 0.5).astype(float)
    a = b.copy()
    a[:, :15] = 1.0  # 15 items at most get better, none worse
    paired = paired_bootstrap(a, b)
    assert paired.excludes_zero and paired.low > 0
    shuffled = paired_bootstrap(a, [rng.permutation(row) for row in b])
    assert not shuffled.excludes_zero


def test_one_lucky_seed_is_not_enough():
    b = np.zeros((3, 200))
    a = np.zeros((3, 200))
    a[0, :60] = 1.0
    interval = paired_bootstrap(a, b)
    assert interval.mean == pytest.approx(0.1)
    assert not interval.excludes_zero


def test_paired_arms_need_the_same_items():
    with pytest.raises(ValueError, match="same items"):
        paired_bootstrap([[1, 0]], [[1, 0, 1]])


def test_blind_baseline_is_the_best_constant_per_question():
    train = tasks.build("quadrant", "train", 300, 0)
    held_out = tasks.build("quadrant", "test", 200, 0)
    assert blind_baseline(train, held_out) == pytest.approx(0.25, abs=0.08)
    # Several replies are right here, so the best constant is the one that most items accept.
    train, held_out = tasks.build("locate", "train", 400, 0), tasks.build("locate", "test", 200, 0)
    assert 0.06 < blind_baseline(train, held_out) < 0.25
