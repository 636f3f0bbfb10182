"""The benchmark's batch, its arguments, our side of it, and its table; the comparison itself runs in `make prove`."""

from __future__ import annotations

import numpy as np
import pytest

from mindjax import bench


def test_rows_hold_one_image_and_targets_after_it() -> None:
    case = bench.Case("train", "tiny", "float32", rows=2, text=20, grid=4)
    rows = bench.conversations(case)
    config = bench.model_config("tiny")
    assert len(rows) == 2
    for row in rows:
        assert len(row.tokens) == 20 + 4 == len(row.positions)
        assert (row.tokens == config.image_token_id).sum() == row.modality.sum() == 4
        assert row.loss_mask[-1] == 1 and not row.loss_mask[row.modality > 0].any()
        # Text, then a 2 x 2 image at (7, 7..8, 7..8), then text from 9 on.
        assert row.positions[7:11].tolist() == [[7, 7, 7], [7, 7, 8], [7, 8, 7], [7, 8, 8]]
        assert row.positions[11].tolist() == [9, 9, 9] and row.next_position == row.positions[-1, 0] + 1


def test_the_base_model_has_about_100_million_parameters() -> None:
    import jax
    import jax.numpy as jnp

    from mindjax.models.qwen3_vl import abstract_params

    parameters = jax.tree.leaves(abstract_params(bench.model_config("100m"), jnp.float32))
    assert 90e6 < sum(int(np.prod(leaf.shape)) for leaf in parameters) < 110e6


def test_our_training_step_learns_and_compiles_once() -> None:
    runner, _ = bench.make_runner(bench.Case("train", "tiny", "bfloat16", rows=2, text=12, grid=4), "mindjax")
    counter = bench.CompileCounter()
    losses = [runner.step() for _ in range(2)]
    compiled = counter.count
    losses += [runner.step() for _ in range(3)]
    assert compiled > 0 and counter.count == compiled
    assert losses[-1] < losses[0]


def test_arguments() -> None:
    arguments = bench.parse(["train", "--models", "tiny", "--rows", "8"])
    assert arguments.commands == ["train"] and arguments.rows == 8
    with pytest.raises(SystemExit):
        bench.parse(["traim"])
    with pytest.raises(ValueError, match="unknown model 'tiney'"):
        bench.model_config("tiney")


def test_table_holds_both_sides() -> None:
    side = {"tokens_per_second": 100.0, "peak": 3 * bench.MIB, "settings": "attention=sdpa"}
    result = {"case": bench.Case("train", "tiny", "float32"), "mindjax": side, "transformers": side, "ratio": 1.0}
    text = bench._table([result])
    assert "train tiny float32" in text and "1.00" in text and "attention=sdpa" in text
