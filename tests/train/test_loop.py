"""The loop: every step reported once, a stop or a crash loses nothing, a bad step is kept for study."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from mindjax.train.loop import Interrupted, NotFiniteError
from mindjax.train.metrics import read_metrics
from tests.train.toy import STEPS, VALUES, loader, losses, run


def test_every_step_is_reported_once_and_a_finished_run_is_only_restored(tmp_path, capsys):
    result = run(tmp_path)
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, STEPS + 1))
    assert result.steps == STEPS and result.tokens == 4 * STEPS
    assert result.metrics["loss"] == losses(tmp_path)[-1][1] < losses(tmp_path)[0][1]
    assert f"test {STEPS}/{STEPS}" in capsys.readouterr().err
    again = run(tmp_path, before=lambda number: pytest.fail("a finished run took a step"))
    assert again.steps == STEPS and again.tokens == 0
    np.testing.assert_array_equal(again.params["w"], result.params["w"])
    assert len(losses(tmp_path)) == STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_goes_on_to_the_bit(tmp_path, number):
    run(tmp_path / "whole")
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def stop(step):
        if step == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=r"stopped after step 4 of 10, saved in .*run the same command"):
        run(tmp_path / "stopped", before=stop)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(losses(tmp_path / "stopped")) == 4
    run(tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_crash_between_checkpoints_repeats_no_record(tmp_path):
    run(tmp_path / "whole")

    def crash(step):
        if step == 9:
            raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        run(tmp_path / "crashed", before=crash, checkpoint_every=3)
    assert len(losses(tmp_path / "crashed")) >= 7  # past the checkpoint of step 6
    run(tmp_path / "crashed", checkpoint_every=3)
    assert losses(tmp_path / "crashed") == losses(tmp_path / "whole")


def test_a_bad_step_stops_the_run_and_leaves_its_batch(tmp_path):
    values = VALUES.copy()
    target = loader().indices(5)
    values[target[1]] = np.nan
    with pytest.raises(NotFiniteError, match=r"step 6 is not finite .*loss nan.*nan_batch\.npz"):
        run(tmp_path, values, checkpoint_every=2)
    with np.load(tmp_path / "nan_batch.npz") as saved:
        np.testing.assert_array_equal(saved["x"][0], values[target])
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3, 4, 5]
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 4]


def test_evaluation_comes_with_the_parameters_of_its_step(tmp_path):
    seen = []

    def evaluate(params):
        seen.append(np.asarray(params["w"]).copy())
        return {"held_out": float(params["w"][0])}

    result = run(tmp_path, evaluate=evaluate, evaluate_every=4)
    records = {r["step"]: r["held_out"] for r in read_metrics(tmp_path) if "held_out" in r}
    assert list(records) == [4, 8, 10]
    np.testing.assert_array_equal(seen[-1], result.params["w"])
    assert len({*map(bytes, seen)}) == 3
