"""Checkpoints: every key once, both expert layouts, errors that name what is wrong, and bounded memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mindjax.config import ModelConfig, TextConfig, VisionConfig
from mindjax.models import hf_weights, qwen3_vl, safetensors_io
from mindjax.models.safetensors_io import Reader, TensorSpec

DENSE = ModelConfig(
    TextConfig(50, 32, 48, 3, 4, 2, 16, (4, 2, 2)),
    VisionConfig(4, 16, 24, 2, 32, (0, 2), num_position_embeddings=16, patch_size=2, in_channels=3),
    image_token_id=40,
    video_token_id=41,
    vision_start_token_id=42,
    vision_end_token_id=43,
)
TIED = replace(DENSE, tie_word_embeddings=True, vision=replace(DENSE.vision, deepstack_visual_indexes=()))
MOE = replace(DENSE, text=replace(DENSE.text, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24))
AMBIGUOUS = replace(MOE, text=replace(MOE.text, moe_intermediate_size=16))  # 2 I == H


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Every number different, so that any mix-up shows."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), qwen3_vl.abstract_params(config)
    )


def assert_equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def rewrite(folder: Path, change: Any) -> None:
    """Reads all tensors of a folder into a dict, lets `change` edit it, and writes it as a single file."""
    reader = Reader(folder)
    tensors = {name: reader.view(name).copy() for name in reader.specs}
    change(tensors)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    safetensors_io.write(folder, specs, lambda spec: tensors[spec.name], 10**9)


@pytest.mark.parametrize("layout", ["published", "transformers"])
@pytest.mark.parametrize("config", [DENSE, TIED, MOE], ids=["dense", "tied", "moe"])
def test_save_then_load_gives_the_same_bits(config: ModelConfig, layout: Any, tmp_path: Path) -> None:
    params = random_params(config)
    hf_weights.save(tmp_path / "model", config, params, layout=layout, max_shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    read = ModelConfig.from_hf(json.loads((tmp_path / "model" / "config.json").read_text()))
    assert read == config
    assert_equal(hf_weights.load(tmp_path / "model", read, dtype="float32"), params)


def test_the_table_covers_the_model() -> None:
    for config in (DENSE, TIED, MOE):
        entries = hf_weights.table(config)
        paths = [entry.path for entry in entries]
        assert sorted(paths) == sorted(hf_weights._flatten(qwen3_vl.abstract_params(config)))
        keys = [key for entry in entries for key in hf_weights._keys(entry, config)]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize("kind", ["dense", "tied", "moe"])
def test_transformers_round_trip(kind: str, tmp_path: Path) -> None:
    """What transformers saves, we load; what we save in the published layout, transformers loads, all keys used."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

    from tests.parity.reference import transformers_model

    config = {"dense": DENSE, "tied": TIED, "moe": MOE}[kind]
    model = transformers_model(config, tmp_path / "theirs")
    read = ModelConfig.from_hf(json.loads((tmp_path / "theirs" / "config.json").read_text()))
    assert read == config
    params = hf_weights.load(tmp_path / "theirs", config, dtype="float32")

    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    layer = "model.language_model.layers.1."
    np.testing.assert_array_equal(params["text"]["layers"]["attn"]["k"][1], state[layer + "self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(
        params["vision"]["patch_embed"]["kernel"].T.reshape(-1, 3, 2, 2, 2),
        state["model.visual.patch_embed.proj.weight"],
    )
    if kind == "moe":
        gate_up = params["text"]["layers"]["moe"]["gate_up"][1]
        np.testing.assert_array_equal(gate_up, state[layer + "mlp.experts.gate_up_proj"].swapaxes(1, 2))

    hf_weights.save(tmp_path / "ours", config, params, max_shard_bytes=30_000, generation={"eos_token_id": 7})
    cls = Qwen3VLMoeForConditionalGeneration if kind == "moe" else Qwen3VLForConditionalGeneration
    again, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert again.generation_config.eos_token_id == 7
    assert again.dtype == torch.float32
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name], err_msg=name)


def test_bfloat16_in_and_out(tmp_path: Path) -> None:
    params = random_params(DENSE)
    hf_weights.save(tmp_path / "bf16", DENSE, params, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    loaded = hf_weights.load(tmp_path / "bf16", DENSE, dtype=jnp.bfloat16)
    assert loaded["text"]["embed"].dtype == jnp.bfloat16
    assert_equal(loaded, rounded)
    assert_equal(
        hf_weights.load(tmp_path / "bf16", DENSE, dtype="float32"),
        jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded),
    )
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_every_problem_is_named(tmp_path: Path) -> None:
    hf_weights.save(tmp_path / "m", DENSE, random_params(DENSE))

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.visual.merger.mlp.linear_fc1.weight"] = tensors.pop("model.visual.merger.linear_fc1.weight")
        del tensors["model.language_model.layers.2.self_attn.q_norm.weight"]
        tensors["model.language_model.norm.weight"] = np.zeros(33, np.float32)
        tensors["model.visual.extra"] = np.zeros(2, np.float32)

    rewrite(tmp_path / "m", spoil)
    with pytest.raises(ValueError) as error:
        hf_weights.load(tmp_path / "m", DENSE, dtype="float32")
    message = str(error.value)
    assert "missing model.visual.merger.linear_fc1.weight (is it model.visual.merger.mlp.linear_fc1.weight?)" in message
    assert "missing model.language_model.layers.2.self_attn.q_norm.weight" in message
    assert "unknown model.visual.extra [2]" in message
    assert "model.language_model.norm.weight has shape [33], not [32]" in message
    with pytest.raises(ValueError, match=r"unknown model\.visual\.extra"):
        hf_weights.convert(tmp_path / "m", tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_layout_that_shapes_do_not_tell_is_refused(tmp_path: Path) -> None:
    params = random_params(AMBIGUOUS)
    for layout in ("published", "transformers"):
        folder = tmp_path / layout
        hf_weights.save(folder, AMBIGUOUS, params, layout=layout)
        with pytest.raises(ValueError, match="Say layout="):
            hf_weights.load(folder, AMBIGUOUS, dtype="float32")
        assert_equal(hf_weights.load(folder, AMBIGUOUS, dtype="float32", layout=layout), params)
        with pytest.raises(ValueError, match="down_proj has shape"):
            other = "transformers" if layout == "published" else "published"
            hf_weights.load(folder, AMBIGUOUS, dtype="float32", layout=other)


def test_a_tied_head_in_the_file(tmp_path: Path) -> None:
    params = random_params(TIED)
    hf_weights.save(tmp_path / "m", TIED, params)
    rewrite(tmp_path / "m", lambda t: t.update({"lm_head.weight": t["model.language_model.embed_tokens.weight"]}))
    assert_equal(hf_weights.load(tmp_path / "m", TIED, dtype="float32"), params)
    rewrite(tmp_path / "m", lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"tie_word_embeddings"):
        hf_weights.load(tmp_path / "m", TIED, dtype="float32")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    hf_weights.save(folder, DENSE, random_params(DENSE), max_shard_bytes=30_000)
    shard = folder / "model-00002-of-00010.safetensors"
    assert len(list(folder.glob("*.safetensors"))) == 10
    whole = shard.read_bytes()

    def load() -> None:
        hf_weights.load(folder, DENSE, dtype="float32")

    for keep in (0, 5, 40, len(whole) - 1):
        shard.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=f"{shard.name} is truncated"):
            load()
    shard.write_bytes(whole[:8] + b"!" + whole[9:])
    with pytest.raises(ValueError, match=rf"{shard.name} does not hold the JSON"):
        load()
    length = struct.unpack("<Q", whole[:8])[0]
    shard.write_bytes(whole[: 8 + length].replace(b'"F32"', b'"F64"') + whole[8 + length :])
    with pytest.raises(ValueError, match="has dtype F64"):
        load()
    shard.unlink()
    with pytest.raises(ValueError, match=f"not there: {shard.name}"):
        load()
    shard.write_bytes(whole)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../model-00001-of-00010.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        load()
    with pytest.raises(ValueError, match=r"neither model\.safetensors\.index\.json nor model\.safetensors"):
        hf_weights.load(tmp_path, DENSE, dtype="float32")


def test_saving_other_parameters_is_refused(tmp_path: Path) -> None:
    params = random_params(DENSE)
    params["text"]["final_norm"] = params["text"].pop("norm")
    params["text"]["head"] = params["text"]["head"][:, :-1]
    with pytest.raises(ValueError) as error:
        hf_weights.save(tmp_path / "m", DENSE, params)
    assert "missing text.norm" in str(error.value)
    assert "unknown text.final_norm [32]" in str(error.value)
    assert "text.head has shape [32, 49], not [32, 50]" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = random_params(DENSE, 0), random_params(DENSE, 1)
    folder = tmp_path / "m"
    hf_weights.save(folder, DENSE, old, max_shard_bytes=30_000)
    (folder / "tokenizer.json").write_text("{}")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "write_json", full)  # the index, after all shards
        with pytest.raises(OSError, match=r"could not write .*No space left") as error:
            hf_weights.save(folder, DENSE, new, max_shard_bytes=30_000)
        assert error.value.errno == errno.ENOSPC
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(OSError, match="GB free"):
            hf_weights.save(folder, DENSE, new)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert_equal(hf_weights.load(folder, DENSE, dtype="float32"), old)

    hf_weights.save(folder, DENSE, new)  # fewer shards now: none of the old may stay
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    assert_equal(hf_weights.load(folder, DENSE, dtype="float32"), new)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    params = random_params(DENSE)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "main.py").write_text("")
    (tmp_path / "file").write_text("")
    for name, message in (("llama", "of type 'llama'"), ("code", r"no model's \(main\.py\)"), ("file", "is a file")):
        with pytest.raises(ValueError, match=message):
            hf_weights.save(tmp_path / name, DENSE, params)
    assert (tmp_path / "code" / "main.py").exists()


@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_convert(layout: Any, tmp_path: Path) -> None:
    params = random_params(MOE)
    source = tmp_path / "source"
    other = "transformers" if layout == "published" else "published"
    hf_weights.save(source, MOE, params, layout=other, generation={"eos_token_id": 3})
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "notes.bin").write_text("")
    hf_weights.convert(source, tmp_path / "target", layout=layout, max_shard_bytes=30_000)
    target = tmp_path / "target"
    first = next(spec for key, spec in Reader(target).specs.items() if key.endswith("experts.gate_up_proj"))
    assert first.shape == ((4, 32, 48) if layout == "published" else (4, 48, 32))
    assert (target / "tokenizer.json").read_text() == '{"a": 1}'
    assert json.loads((target / "generation_config.json").read_text()) == {"eos_token_id": 3}
    assert not (target / "notes.bin").exists()
    assert_equal(hf_weights.load(target, MOE, dtype="float32"), params)

    hf_weights.convert(target, tmp_path / "half", dtype="bfloat16", layout=layout)
    assert {spec.dtype.name for spec in Reader(tmp_path / "half").specs.values()} == {"bfloat16"}
    assert not (tmp_path / "half" / "model.safetensors.index.json").exists()
    with pytest.raises(ValueError, match="another target"):
        hf_weights.convert(target, target)


# ---- memory ----

# Measured from before the call; a MB or two of Python objects comes on top.
_MEASURE = """
import json, sys, threading, time
import jax, numpy as np
from mindjax.config import ModelConfig
from mindjax.models import hf_weights, qwen3_vl

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def peak_of(function):
    base = top = anonymous()
    running = True
    def watch():
        nonlocal top
        while running:
            top = max(top, anonymous())
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = function()
    finally:
        running = False
        thread.join()
    return top - base, result

source, target = sys.argv[1:]
config = ModelConfig.from_hf(json.load(open(f"{source}/config.json")))
leaves = jax.tree.leaves(qwen3_vl.abstract_params(config))
jax.device_put(np.zeros(3)).block_until_ready()
convert, _ = peak_of(lambda: hf_weights.convert(source, target, layout="transformers"))
load, params = peak_of(lambda: hf_weights.load(source, config, dtype="float32"))
save, _ = peak_of(lambda: hf_weights.save(target, config, params))
print(json.dumps({
    "convert": convert, "load": load, "save": save,
    "total": 4 * sum(leaf.size for leaf in leaves), "leaf": 4 * max(leaf.size for leaf in leaves),
}))
"""


def _measure(config: ModelConfig, folder: Path) -> dict[str, int]:
    """Generates a checkpoint of that shape without holding it, and measures in a fresh process."""
    source = folder / "source"
    source.mkdir(parents=True)
    shapes = hf_weights._flatten(qwen3_vl.abstract_params(config))
    specs = [
        TensorSpec(
            key,
            np.dtype(np.float32),
            hf_weights._published_shape(shapes[entry.path].shape, entry, config, "published"),
        )
        for entry in hf_weights.table(config)
        for key in hf_weights._keys(entry, config)
    ]
    rng = np.random.default_rng(0)
    safetensors_io.write(source, specs, lambda spec: rng.standard_normal(spec.shape, np.float32), 400 * 10**6)
    safetensors_io.write_json(source / "config.json", config.to_hf())
    command = [sys.executable, "-c", _MEASURE, str(source), str(folder / "target")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder)


def _sized(hidden: int, layers: int, vocab: int, **experts: int) -> ModelConfig:
    vision = VisionConfig(2, 128, 256, 2, hidden, (0,), num_position_embeddings=64, patch_size=8)
    heads = hidden // 64
    return ModelConfig(
        TextConfig(vocab, hidden, 4 * hidden, layers, heads, heads // 2, 64, (12, 10, 10), **experts), vision
    )


def _assert_bounded(measured: dict[str, int]) -> None:
    assert measured["convert"] <= 1.2 * measured["leaf"], measured
    assert measured["load"] <= measured["total"] + 8 * 2**20, measured  # no leaf is held twice
    assert measured["save"] <= 1.2 * measured["leaf"], measured


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_on_a_small_checkpoint(tmp_path: Path) -> None:
    measured = _measure(_sized(512, 8, 4000), tmp_path / "dense")
    assert measured["total"] > 100e6 and measured["leaf"] > 32e6
    _assert_bounded(measured)


@pytest.mark.prove
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_memory_on_a_gigabyte(kind: str, tmp_path: Path) -> None:
    experts = {"num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 256} if kind == "moe" else {}
    measured = _measure(_sized(1024, 12, 32000, **experts), tmp_path / kind)
    print(kind, {name: f"{size / 1e6:.0f} MB" for name, size in measured.items()})
    assert measured["total"] >= 1e9
    _assert_bounded(measured)
