"""Parity reports: sound models are within every bound, a broken one is named by the operation that was broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from mindjax import cli
from mindjax.interop import layerwise, parity, parity_report, parity_rows, torch_trace
from mindjax.interop.parity import Case
from mindjax.interop.parity_rows import Bound, Report, Row
from mindjax.ops.quantize import FORMATS, dequantize, quantize

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


@pytest.fixture(scope="module")
def random_cases() -> Iterator[dict[str, Case]]:
    with parity_report.cases("random", ("dense", "moe")) as opened:
        yield {case.name: case for case in opened}


def scaled(params: dict[str, Any], path: str, factor: float, layer: int | None = None) -> dict[str, Any]:
    """A copy with one leaf, or one layer of it, multiplied."""
    name, _, rest = path.partition(".")
    if rest:
        return {**params, name: scaled(params[name], rest, factor, layer)}
    leaf = params[name]
    return {**params, name: leaf * factor if layer is None else leaf.at[layer].multiply(factor)}


@pytest.mark.parametrize(
    ("model", "dtype"), [("dense", "float32"), ("dense", "int8"), ("moe", "bfloat16"), ("moe", "fp8")]
)
def test_sound_model_is_within_every_bound(random_cases: dict[str, Case], model: str, dtype: str) -> None:
    report = parity.against_torch(random_cases[model], dtype)
    assert report.passed and report.first_departure is None, parity_report.table(report)
    config = random_cases[model].config
    operations = [row for row in report.layers if not row.where.startswith("product.")]
    assert len(operations) == 3 * (config.vision.depth + config.text.num_hidden_layers) + 6
    assert all(row.bounds for row in report.layers)
    products = [row.where for row in report.layers if row.where.startswith("product.")]
    assert bool(products) == (dtype in parity.EIGHT_BITS)
    assert ("product.0.moe.gate_up kernel" in products) == (model == "moe" and dtype in parity.EIGHT_BITS)


# What is multiplied by 1.01, and the operation that must be named.
BROKEN = {
    "text.2.attention": ("dense", "text.layers.attn.v", 2),
    "text.1.mlp": ("dense", "text.layers.mlp.down", 1),
    "vision.3.attention": ("dense", "vision.blocks.attn.proj.kernel", 3),
    "vision.0.mlp": ("dense", "vision.blocks.mlp.fc2.kernel", 0),
    "vision.deepstack.1": ("dense", "vision.deepstack_mergers.fc2.kernel", 1),
    "vision.merger": ("dense", "vision.merger.fc2.kernel", None),
    "vision.embed": ("dense", "vision.position_embed", None),
    "head": ("dense", "text.norm", None),
    "text.embed": ("moe", "text.embed", None),
    "text.3.mlp": ("moe", "text.layers.moe.down", 3),
}


@pytest.mark.parametrize("where", BROKEN)
def test_broken_operation_is_named(random_cases: dict[str, Case], where: str) -> None:
    model, path, layer = BROKEN[where]
    case = random_cases[model]
    report = parity.against_torch(case, "float32", params=scaled(case.params, path, 1.01, layer))
    assert not report.passed and report.first_departure == where
    failed = [row.where for row in report.layers if not row.passed]
    assert failed == [where]  # the others got torch's input, so they are right by themselves


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_broken_operation_is_named_where_rounding_is_coarse(random_cases: dict[str, Case], dtype: str) -> None:
    case = random_cases["dense"]
    report = parity.against_torch(case, dtype, params=scaled(case.params, "text.layers.attn.v", 1.01, 2))
    assert report.first_departure == "text.2.attention"


def test_walk_is_the_model(random_cases: dict[str, Case]) -> None:
    for case in random_cases.values():
        walked = layerwise.trace(case.params, case.config, case.batch).outputs["head"]
        np.testing.assert_allclose(walked, layerwise.logits(case.params, case.config, case.batch), rtol=0, atol=1e-5)


def test_torch_trace_leaves_the_model_alone(random_cases: dict[str, Case]) -> None:
    case = random_cases["moe"]
    first = torch_trace.trace(case.reference, case.inputs)
    forced = torch_trace.trace(case.reference, case.inputs, given=first)
    again = torch_trace.trace(case.reference, case.inputs)
    for name, values in first.outputs.items():
        np.testing.assert_array_equal(again.outputs[name], values)
        np.testing.assert_allclose(forced.outputs[name], values, rtol=0, atol=1e-5)
    assert list(first.outputs) == list(layerwise.trace(case.params, case.config, case.batch).outputs) or set(
        first.outputs
    ) == set(layerwise.trace(case.params, case.config, case.batch).outputs)


def test_rounded_cache_changes_the_answers_a_little(random_cases: dict[str, Case]) -> None:
    case = random_cases["dense"]
    whole, rounded = (
        layerwise.trace(case.params, case.config, case.batch, kv=kv).outputs["head"]
        for kv in (None, parity.e4m3_toward_zero)
    )
    assert 1e-3 < parity_rows.relative(rounded, whole) < 0.3


# ---- 8 bits


@pytest.mark.parametrize("format", ["int8_row", "e4m3_1x128", "e4m3_128x128"])
def test_torch_multiplies_out_the_same_weights(format: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 150, 200)), jnp.float32)
    q = quantize(x, format)
    np.testing.assert_array_equal(torch_trace.dequantize(q).numpy(), np.asarray(dequantize(q)))
    # From the start by torch alone: the same bits again.
    own = torch_trace._quantized(torch.tensor(np.asarray(x[1])), format)
    expected = np.asarray(q.values[1], np.float64) * _whole(np.asarray(q.scales[1], np.float64), format, (150, 200))
    np.testing.assert_array_equal(own.numpy(), expected)


def _whole(scales: np.ndarray, format: str, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (size or whole for size, whole in zip(FORMATS[format].block, shape, strict=True))
    return np.repeat(np.repeat(scales, rows, 0)[: shape[0]], columns, 1)[:, : shape[1]]


def test_scales_of_other_blocks_are_past_tier_1(random_cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that takes one scale per row where torch takes one per 128 columns would be coarser; it is seen."""
    monkeypatch.setitem(parity.EIGHT_BITS, "fp8", ("e4m3_tensor", "e4m3_128x128"))
    monkeypatch.setattr(
        torch_trace, "quantized_product",
        lambda x, w, formats, whole=torch_trace.quantized_product: whole(x, w, ("e4m3_1x128", formats[1])),
    )  # fmt: skip
    report = parity.against_torch(random_cases["dense"], "fp8")
    assert report.first_departure == "product.0.attn.q"


# ---- numbers and bounds


def test_divergence_of_known_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    expected = 0.5 * np.log(2) - 0.25 * np.log(2)
    np.testing.assert_allclose(parity_rows.kl(np.log(p) + 7, np.log(q) - 3), [expected], rtol=1e-12)
    assert parity_rows.kl(np.log(p), np.log(p))[0] == 0


def test_calc_diff_and_relative() -> None:
    a, b = np.array([3.0, 4.0]), np.array([3.0, 0.0])
    assert parity_rows.relative(a, b) == pytest.approx(4 / 3)
    assert parity_rows.calc_diff(a, b) == pytest.approx(1 - 2 * 9 / (25 + 9))
    assert parity_rows.calc_diff(a, a) == 0


def test_nan_is_past_every_bound_and_no_bound_is_no_judgement() -> None:
    for at_least in (False, True):
        assert not Row("x", {"kl": float("nan")}, (Bound("kl", 1.0, "tier", at_least),)).passed
    assert Row("x", {"kl": float("nan")}).passed
    report = Report("m", "fp8", "torch", [Row("a", {"kl": 1.0})], [Row("b", {"kl": 2.0}, (Bound("kl", 1.0, "t"),))])
    assert report.first_departure == "b" and not report.passed and not report.as_dict()["passed"]


def test_trained_models_are_judged_where_random_ones_are_told(random_cases: dict[str, Case]) -> None:
    import dataclasses

    case = dataclasses.replace(random_cases["dense"], random=False)
    [row] = [row for row in parity.against_torch(case, "fp8").ends if row.where == "8 bits and trainer"]
    assert [bound.limit for bound in row.bounds] == [parity_rows.TIER_4]


# ---- the command


def test_command_is_quiet_about_a_sound_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["parity", "--model", "dense", "--dtype", "float32", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "dense float32 against torch: within all bounds" in capsys.readouterr().out
    assert (tmp_path / "parity-dense.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "parity.json").read_text())
    assert saved["passed"] and [report["dtype"] for report in saved["reports"]] == ["float32"]
    assert "text.3.mlp" in (tmp_path / "parity.txt").read_text()


def test_command_fails_on_a_broken_model_and_names_the_operation(
    random_cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a folder this time, with wrong weights on our side alone."""
    load = parity.catalog.load

    def broken(folder: Path, *, dtype: str) -> Any:
        config, params = load(folder, dtype=dtype)
        return config, scaled(params, "text.layers.moe.gate_up", 1.01, 1)

    monkeypatch.setattr(parity.catalog, "load", broken)
    folder = str(random_cases["moe"].folder)
    assert cli.main(["parity", folder, "--dtype", "float32", "--json"]) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not told["passed"] and told["reports"][0]["first_departure"] == "text.1.mlp"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere is no folder"),
        ([".", "--model", "moe"], "says by itself"),
        (["--backend", "cuda", "--model", "dense"], "--backend cuda"),
        (["--dtypes", "fp8"], "did you mean --dtype"),
    ],
)
def test_mistakes_of_the_user(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in arguments and any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("a GPU is here")
    assert cli.main(["parity", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_vllm_with_an_8_bit_cache_is_our_model_with_rounded_keys_and_values(random_cases: dict[str, Case]) -> None:
    report = parity.against_vllm(random_cases["dense"], "bfloat16", kv_cache="fp8")
    assert report.passed, parity_report.table(report)
    kl = {row.where: row.metrics.get("kl") for row in report.ends}
    assert kl["prompt log-probs, rounded"] < 0.5 * kl["prompt log-probs"]


def test_rounding_toward_zero() -> None:
    x = np.random.default_rng(0).normal(size=4096).astype(np.float32) * np.exp2(np.arange(4096) % 16 - 10)
    x = np.concatenate([x, [0, -0.0, 448, 500, -500, 2.0**-9, 1.9 * 2.0**-9, 0.9 * 2.0**-9]]).astype(np.float32)
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = np.unique(np.abs(grid[np.isfinite(grid)]))
    expected = np.sign(x) * grid[np.searchsorted(grid, np.abs(x), side="right") - 1]
    np.testing.assert_array_equal(np.asarray(parity.e4m3_toward_zero(jnp.asarray(x))), expected)
