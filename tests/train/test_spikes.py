"""Bad steps: never applied, and then stopped at, left out, or gone back from; what is left out is written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.train.loop import NotFiniteError, SpikeError
from mindjax.train.metrics import read_metrics
from mindjax.train.optimizer import learning_rate
from mindjax.train.spikes import NO_LIMITS, SpikeConfig, SpikeWatch, read_spikes, save_batch
from tests.train import toy

# Samples of an epoch come in an order of their own; these are those of each step.
INDICES = [toy.loader().indices(step) for step in range(toy.STEPS)]


def with_bad(*steps: int, value: float = np.nan) -> np.ndarray:
    """Data in which a sample of each of these steps, from 1, is bad."""
    values = toy.VALUES.copy()
    for step in steps:
        values[INDICES[step - 1][1]] = value
    return values


def final(workdir: Path, values: np.ndarray, **options: Any) -> np.ndarray:
    return np.asarray(toy.run(workdir, values, **options).params["w"])


def without(left_out: set[int]) -> np.ndarray:
    """AdamW in float64 over a run that never sees some steps."""
    config, w, first, second = toy.CONFIG, np.zeros(3), np.zeros(3), np.zeros(3)
    for count, step in enumerate(sorted({*range(1, toy.STEPS + 1)} - left_out), 1):
        gradient = 2 * (w - toy.VALUES[INDICES[step - 1]].astype(np.float64)).mean(axis=0)
        gradient *= min(1.0, config.clip_norm / np.linalg.norm(gradient))
        first = config.b1 * first + (1 - config.b1) * gradient
        second = config.b2 * second + (1 - config.b2) * gradient**2
        update = first / (1 - config.b1**count) / (np.sqrt(second / (1 - config.b2**count)) + config.eps)
        w = w - learning_rate(config, step - 1, toy.STEPS) * (update + config.weight_decay * w)
    return w


def test_skip_leaves_the_update_out_and_nothing_else(tmp_path: Path) -> None:
    result = final(tmp_path / "a", with_bad(4, 7), spikes=SpikeConfig("skip"), checkpoint_every=3)
    np.testing.assert_allclose(result, without({4, 7}), rtol=1e-5)
    assert not np.allclose(result, without({4}), rtol=1e-3)
    records = {record["step"]: record["skipped"] for record in read_metrics(tmp_path / "a")}
    assert records == {step: float(step in (4, 7)) for step in range(1, 11)}
    left_out = [(r["step"], r["left_out"], r["groups"]) for r in read_spikes(tmp_path / "a")]
    assert left_out == [(4, [4, 4], [3, 3]), (7, [7, 7], [6, 6])]
    with np.load(tmp_path / "a" / "spikes" / "step_7.npz") as saved:
        np.testing.assert_array_equal(saved["x"][0], with_bad(4, 7)[INDICES[6]])


def test_a_crash_after_a_skip_changes_no_bit(tmp_path: Path) -> None:
    options = {"values": with_bad(4, 7), "spikes": SpikeConfig("skip"), "checkpoint_every": 3}
    whole = final(tmp_path / "whole", **options)

    def crash(number: int) -> None:
        if number == 9:
            raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        final(tmp_path / "cut", before=crash, **options)
    assert [r["step"] for r in read_spikes(tmp_path / "cut")] == [4, 7]
    np.testing.assert_array_equal(final(tmp_path / "cut", **options), whole)
    # Step 7 came twice, for the checkpoint is of step 6; its record is there once.
    assert [r["step"] for r in read_spikes(tmp_path / "cut")] == [4, 7]
    assert toy.losses(tmp_path / "cut")[7:] == toy.losses(tmp_path / "whole")[7:]


@pytest.mark.parametrize("crash_at", [0, 9])
def test_rewind_goes_back_to_the_checkpoint_and_past_the_data(tmp_path: Path, crash_at: int) -> None:
    """Also where the run crashes in between, and does the same again."""

    def crash(number: int) -> None:
        if number == crash_at:
            raise OSError("power cut")

    options = {"values": with_bad(2, 8), "spikes": SpikeConfig("rewind"), "checkpoint_every": 5}
    if crash_at:
        with pytest.raises(OSError, match="power cut"):
            final(tmp_path, before=crash, **options)
    result = final(tmp_path, **options)
    # From the start past 1 and 2; from the checkpoint after 5 past 6, 7 and 8.
    assert [r["left_out"] for r in read_spikes(tmp_path)] == [[1, 2], [6, 8]]
    assert [r["groups"] for r in read_spikes(tmp_path)] == [[0, 1], [5, 7]]  # a group a step
    np.testing.assert_allclose(result, without({1, 2, 6, 7, 8}), rtol=1e-5)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 11))
    left_out = {i for r in read_spikes(tmp_path) for s in range(r["left_out"][0], r["left_out"][1] + 1)
                for i in INDICES[s - 1]}  # fmt: skip
    trained = {i for step in (3, 4, 5, 9, 10) for i in INDICES[step - 1]}
    assert left_out | trained == set(range(40)) and not left_out & trained


def test_a_finite_spike_is_bad_where_a_limit_says_so(tmp_path: Path) -> None:
    values = with_bad(9, value=300.0)
    for name in ("loss", "grad_norm"):
        config = SpikeConfig("skip", window=4, **{name: 5.0})
        np.testing.assert_allclose(final(tmp_path / name, values, spikes=config), without({9}), rtol=1e-5)
    # Without a limit it is applied; with one, the default policy stops.
    applied = final(tmp_path / "none", values)
    assert not np.allclose(applied, without({9}), rtol=1e-3)
    with pytest.raises(SpikeError, match=r"step 9 is a spike .*limits: loss 1.*spike_batch\.npz.*spikes\.policy") as e:
        final(tmp_path / "stop", values, spikes=SpikeConfig(loss=5.0, window=4))
    assert not isinstance(e.value, NotFiniteError) and (tmp_path / "stop" / "spike_batch.npz").exists()


def test_limits_are_multiples_of_the_median_of_good_steps_known_by_then(tmp_path: Path) -> None:
    watch = SpikeWatch(SpikeConfig("skip", loss=3.0, window=4), tmp_path)
    for step, loss in enumerate([1.0, 2.0, 3.0, 4.0, 50.0, 6.0], 1):
        known = {3: NO_LIMITS, 4: (4.5, np.inf), 5: (6.0, np.inf), 6: (7.5, np.inf)}.get(step, NO_LIMITS)
        assert watch.limits(step) == known, step
        assert watch.add(step, {"loss": loss, "grad_norm": 1.0, "skipped": float(loss == 50)}) == (loss != 50)
    assert watch.limits(7) == (9.0, np.inf)  # of 2, 3 and 4: not the bad one, not the one under way
    again = SpikeWatch(SpikeConfig("skip", loss=3.0, window=4), tmp_path, 6, watch.recent)
    assert again.limits(7) == watch.limits(7) and again.limits(8) == watch.limits(8)


def test_more_bad_steps_than_allowed_stop_the_run(tmp_path: Path) -> None:
    config = SpikeConfig("skip", allowed=2, window=5, keep_batches=2)
    with pytest.raises(NotFiniteError, match=r"step 6 .*bad step number 3 of the last 5, more than spikes\.allowed"):
        toy.run(tmp_path, with_bad(2, 4, 6), spikes=config)
    assert [r["step"] for r in read_spikes(tmp_path)] == [2, 4, 6]
    assert sorted(p.name for p in (tmp_path / "spikes").iterdir()) == ["step_4.npz", "step_6.npz"]
    toy.run(tmp_path / "apart", with_bad(2, 4, 7), spikes=config)  # never three of five


def test_a_batch_is_saved_by_name_with_its_bits(tmp_path: Path) -> None:
    path = save_batch(tmp_path / "new" / "b.npz", {0: {"x": jnp.arange(3)}, 1: {"x": np.float32(2)}})
    with np.load(path) as saved:
        assert sorted(saved) == ["0/x", "1/x"] and saved["1/x"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "ignore"}, "'stop', 'skip' or 'rewind'"),
        ({"loss": 0.5}, "more than 1"),
        ({"allowed": 0}, "at least"),
    ],
)
def test_settings_without_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpikeConfig(**change)
