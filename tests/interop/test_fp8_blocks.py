"""Block-fp8 folders against torch's arithmetic, transformers and a running vLLM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mindjax.cli import main
from mindjax.interop import vllm
from mindjax.interop.fp8_blocks import SCALE, export, from_blocks, is_quantised, restore, to_blocks
from mindjax.interop.random_checkpoint import random_checkpoint, random_model
from mindjax.models import hf_weights
from mindjax.models.safetensors_io import DTYPES, QUANTISED_DTYPES, Reader, read_json, write_json

LAYER = "model.language_model.layers.0"


def read(folder: Path) -> dict[str, np.ndarray]:
    reader = Reader(folder, DTYPES | QUANTISED_DTYPES)
    return {key: reader.view(key) for key in reader.specs}


def by_torch(w: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of a matrix by torch's float32 division and its cast."""
    rows, columns = w.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    padded[:rows, :columns] = torch.from_numpy(w.astype(np.float32))
    blocks = padded.reshape(len(padded) // 128, 128, -1, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    scales[scales == 0] = 1
    values = (blocks / scales[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values.reshape(padded.shape)[:rows, :columns], scales


def assert_same(values: np.ndarray, scales: np.ndarray, w: np.ndarray) -> None:
    for index in np.ndindex(w.shape[:-2]):
        want_values, want_scales = by_torch(w[index])
        np.testing.assert_array_equal(values[index].view(np.uint8), want_values.view(torch.uint8).numpy())
        np.testing.assert_array_equal(scales[index], want_scales.numpy())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model and a mixture in bfloat16, every block of every projection of a size of its own."""
    root, found = tmp_path_factory.mktemp("fp8"), {}
    for name, moe in (("dense", False), ("mixture", True)):
        saved, plain = root / f"{name}-saved", root / name
        config = random_checkpoint(saved, moe=moe)
        text = replace(config.text, hidden_size=256, intermediate_size=384)
        if moe:
            text = replace(text, moe_intermediate_size=256)
        random_model(
            replace(config, text=text, vision=replace(config.vision, out_hidden_size=256)), saved, embedding=0.1
        )
        hf_weights.convert(saved, plain, dtype="bfloat16", source_layout="transformers")
        rng = np.random.default_rng(0)
        for key, w in _writable(plain).items():
            if is_quantised(key):
                sizes = np.exp2(rng.integers(-2, 3, [*w.shape[:-2], *(-(-size // 128) for size in w.shape[-2:])]) / 2)
                sizes = sizes.repeat(128, -2).repeat(128, -1)[..., : w.shape[-2], : w.shape[-1]]
                w[...] = (w.astype(np.float32) * sizes).astype(w.dtype)
        found[name] = plain
    return found


def _writable(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a single file, where writing to them changes the file."""
    reader = Reader(folder)
    data = np.memmap(folder / "model.safetensors", np.uint8, "r+")
    return {
        key: data[offset : offset + spec.nbytes].view(spec.dtype).reshape(spec.shape)
        for key, spec in reader.specs.items()
        for offset in [reader._where[key][1]]
    }


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_export_and_restore(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders[name]
    export(source, tmp_path / "fp8", max_shard_bytes=300_000)
    plain, quantised = read(source), read(tmp_path / "fp8")
    projections = {key for key in plain if is_quantised(key)}
    per_layer = {"dense": 7, "mixture": 6}[name]
    assert len(projections) == 4 * per_layer and len(list((tmp_path / "fp8").glob("*.safetensors"))) > 3
    assert set(quantised) == set(plain) | {key + SCALE for key in projections}
    for key, w in plain.items():
        if key in projections:
            assert_same(quantised[key], quantised[key + SCALE], w)
        else:
            np.testing.assert_array_equal(quantised[key].view(np.uint16), w.view(np.uint16))
    if name == "mixture":  # [E, H, 2I], as Qwen publishes, and one scale per 128 x 128 of it
        assert quantised[f"{LAYER}.mlp.experts.gate_up_proj"].shape == (8, 256, 512)
        assert quantised[f"{LAYER}.mlp.experts.gate_up_proj_scale_inv"].shape == (8, 2, 4)
        assert quantised[f"{LAYER}.mlp.experts.down_proj_scale_inv"].shape == (8, 2, 2)
    config = read_json(tmp_path / "fp8" / "config.json")["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    assert {"lm_head", "model.visual.blocks.0.attn.qkv"} <= set(config["modules_to_not_convert"])
    assert not any(f"{module}.weight" in projections for module in config["modules_to_not_convert"])
    assert (tmp_path / "fp8" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    restore(tmp_path / "fp8", tmp_path / "back", dtype="float32")
    back = read(tmp_path / "back")
    assert set(back) == set(plain) and "quantization_config" not in read_json(tmp_path / "back" / "config.json")
    for key, w in plain.items():
        want = w.astype(np.float32)
        if key in projections:
            scales = quantised[key + SCALE].repeat(128, -2).repeat(128, -1)[..., : w.shape[-2], : w.shape[-1]]
            want = quantised[key].astype(np.float32) * scales
        np.testing.assert_array_equal(back[key], want)
    hf_weights.convert(tmp_path / "back", tmp_path / "again", dtype="bfloat16")  # a folder like any other


def test_command(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert = ["convert", str(folders["dense"]), str(tmp_path / "fp8"), "--dtype", "fp8-block"]
    assert main(convert) == 0 and main(["convert", str(tmp_path / "fp8"), str(tmp_path / "back")]) == 0
    back, plain = read(tmp_path / "back"), read(folders["dense"])
    assert set(back) == set(plain) and all(w.dtype == ml_dtypes.bfloat16 for w in back.values())
    assert main([*convert, "--layout", "transformers"]) == 2
    assert "a step of its own" in capsys.readouterr().err


def test_any_shape_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindjax.interop.fp8_blocks._PART", 2 * 128 * 200)
    rng = np.random.default_rng(0)
    for shape in ((700, 200), (3, 130, 300), (5, 7)):
        w = rng.normal(size=shape).astype(np.float32)
        values, scales = to_blocks(w)
        assert_same(values, scales, w)
        back = from_blocks(values, scales, ml_dtypes.bfloat16)
        assert np.linalg.norm(back.astype(np.float32) - w) < 0.04 * np.linalg.norm(w)


def test_transformers_reads_the_same_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """Without a GPU it dequantises, by code of its own."""
    export(folders["dense"], tmp_path / "fp8")
    restore(tmp_path / "fp8", tmp_path / "back")
    theirs, ours = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.bfloat16).state_dict()
        for name in ("fp8", "back")
    )
    assert set(theirs) == set(ours)
    for key in ours:
        assert torch.equal(theirs[key], ours[key]), key


def has_amx() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "amx_tile" in cpu.read_text()


@pytest.mark.skipif(not has_amx(), reason="vLLM's block-fp8 products on a CPU need AMX")
def test_vllm_runs_the_mixture(folders: dict[str, Path], tmp_path: Path) -> None:
    """vLLM on the fp8 folder, on what it restores to, and on the same values with the scales of other blocks."""
    export(folders["mixture"], tmp_path / "fp8")
    restore(tmp_path / "fp8", tmp_path / "back")
    export(folders["mixture"], tmp_path / "wrong")
    reader = Reader(tmp_path / "wrong", DTYPES | QUANTISED_DTYPES)
    data = np.memmap(tmp_path / "wrong" / "model.safetensors", np.uint8, "r+")
    for key, spec in reader.specs.items():
        if key.endswith(f"gate_up_proj{SCALE}"):
            offset = reader._where[key][1]
            scales = data[offset : offset + spec.nbytes].view(np.float32).reshape(spec.shape)
            scales[...] = np.roll(scales, 1, axis=-1)
    question = [[{"role": "user", "content": "What do you see in the picture? A digit: seven. Compare the two."}]]
    answers = vllm.greedy(
        [(tmp_path / name, question) for name in ("fp8", "back", "wrong")], max_new_tokens=1, dtype="bfloat16"
    )
    fp8, back, wrong = (np.array(answer[0]["prompt_logprobs"][1:]) for answer in answers)
    # The median, as the order of a bfloat16 sum now and then turns a router's choice.
    assert np.median(np.abs(fp8 - back)) < 0.03 < 0.3 < np.median(np.abs(wrong - back))


def test_mistakes_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    export(folders["dense"], tmp_path / "fp8")
    with pytest.raises(ValueError, match="mindjax convert"):
        hf_weights.load(tmp_path / "fp8", None, dtype="float32")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype F8_E4M3"):
        export(tmp_path / "fp8", tmp_path / "twice")
    with pytest.raises(ValueError, match="quantization_config is None"):
        restore(folders["dense"], tmp_path / "plain")
    with pytest.raises(ValueError, match="another target"):
        export(folders["dense"], folders["dense"])
    config = read_json(folders["mixture"] / "config.json")
    config["text_config"]["moe_intermediate_size"] = 128
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "model.safetensors").symlink_to(folders["mixture"] / "model.safetensors")
    write_json(tmp_path / "odd" / "config.json", config)
    with pytest.raises(ValueError, match="--layout published"):
        export(tmp_path / "odd", tmp_path / "fp8")
    with pytest.raises(ValueError, match=r"in blocks of 128 they are \[2, 1\]"):
        from_blocks(np.zeros((200, 128), ml_dtypes.float8_e4m3fn), np.ones((1, 1), np.float32), "float32")
    # Values whose scales are gone.
    text = (tmp_path / "fp8" / "model.safetensors").read_bytes()
    header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
    lone = f"{LAYER}.self_attn.q_proj.weight"
    entry = json.dumps(header[lone + SCALE], separators=(",", ":"))
    renamed = text.replace(f'"{lone}{SCALE}":{entry}'.encode(), f'"{lone}_scale_xxx":{entry}'.encode())
    (tmp_path / "fp8" / "model.safetensors").write_bytes(renamed)
    with pytest.raises(ValueError, match=f"without their scales|without scales.*{lone}"):
        restore(tmp_path / "fp8", tmp_path / "back")
