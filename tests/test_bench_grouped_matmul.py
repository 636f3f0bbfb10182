"""`mindjax bench grouped_matmul` on a small case: every form agrees, the bars are read off the times."""

from __future__ import annotations

import json

import pytest

from kernels_cuda import library
from mindjax import bench_grouped_matmul as bench

pytestmark = pytest.mark.skipif(library.load("cpu").handle is None, reason=library.load("cpu").problem)


def test_it_measures_every_form_and_both_layers_agree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SHAPES", ((64, 96),))
    monkeypatch.setattr(bench, "BARS", dict.fromkeys(bench.BARS, 0.0) | {"of_floor": float("inf")})
    bench.main("--groups 4 --rows 64 --layers tiny-moe --tokens 48 --repetitions 1 --json".split())
    result = json.loads(capsys.readouterr().out)
    (row,) = result["products"]
    assert set(row["seconds"]) == {
        *("ours", "torch dense", "torch grouped_mm", "jax loop", "jax batched", "jax ragged_dot")
    }
    assert row["of_torch_grouped"] == row["seconds"]["torch grouped_mm"] / row["seconds"]["ours"]
    assert row["floor"] >= row["seconds"]["torch dense"]
    assert [(each["layer"], each["dtype"]) for each in result["layers"]] == [
        ("tiny-moe", "float32"), ("tiny-moe", "bfloat16"),
    ]  # fmt: skip
    assert result["missed"] == []


def test_missed_bars_are_named() -> None:
    row = {"k": 1, "n": 2, "groups": 3, "rows": 4, "of_floor": 1.4, "of_jax": 2.5, "of_torch_grouped": 0.9}
    layer = {"layer": "tiny-moe", "dtype": "float32", "of_layer": 2.0}
    first, second, third = bench.missed({"products": [row], "layers": [layer]})
    assert "1.40 of the floor" in first and "of_torch_grouped 0.90" in second and "2.00, less than 3.0" in third
