"""A copy of a parameter that is no longer a copy is found, and named with its device."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.train.replicas import ReplicaCheck, _sum_of_bits
from tests.train.test_survival import finish, start


def test_a_changed_copy_is_found_and_honest_runs_pass(tmp_path) -> None:
    output, _ = finish(start("diverge", tmp_path, devices=8))
    split, whole = output.strip().splitlines()
    # A shard of a split parameter is compared with its own copies alone, and the device is named.
    assert "after step 6, part/m on cpu:5 is not what it is on cpu:1, cpu:3, cpu:7," in split
    assert "after step 8, w on cpu:2 is not" in whole and "last agreed after step 4" in whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_any_change_of_an_element_changes_the_sum_and_order_does_not(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=100) * 50, dtype)
    assert _sum_of_bits(x) == _sum_of_bits(x[::-1]) == _sum_of_bits(x.reshape(4, 25))
    for place in (0, 57, 99):
        assert _sum_of_bits(x) != _sum_of_bits(x.at[place].set(x[place] * -1 + 1))


def test_one_device_has_nothing_to_compare() -> None:
    check = ReplicaCheck({"w": jnp.zeros(3)})
    assert check.start({"w": jnp.zeros(3)}) is None
    check.finish(1, None)
