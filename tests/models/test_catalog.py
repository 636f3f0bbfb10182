"""The published shapes against what is known of the published files, and loading by name or folder."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.models import catalog, hf_weights, qwen3_vl

# Bytes of the bf16 tensors, `metadata.total_size` of model.safetensors.index.json of Qwen/Qwen3-VL-{2B,4B,8B,32B}-
# Instruct: each parameter counted once, two bytes each. A wrong width or depth anywhere changes them.
TOTAL_SIZE = {
    "qwen3-vl-2b": 4_255_064_064,
    "qwen3-vl-4b": 8_875_631_616,
    "qwen3-vl-8b": 17_534_247_392,
    "qwen3-vl-32b": 66_714_780_128,
}
# The model cards' numbers, in billions.
CARD = {"qwen3-vl-30b-a3b": 31.1, "qwen3-vl-235b-a22b": 235.7}


def parameter_count(name: str) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(qwen3_vl.abstract_params(catalog.CATALOG[name])))


@pytest.mark.parametrize("name", TOTAL_SIZE)
def test_dense_sizes_are_the_published_ones(name: str) -> None:
    assert 2 * parameter_count(name) == TOTAL_SIZE[name]


@pytest.mark.parametrize("name", CARD)
def test_mixture_sizes_are_the_published_ones(name: str) -> None:
    assert round(parameter_count(name) / 1e9, 1) == CARD[name]
    text = catalog.CATALOG[name].text
    idle = 3 * text.hidden_size * text.moe_intermediate_size * (text.num_experts - text.num_experts_per_tok)
    active = (parameter_count(name) - text.num_hidden_layers * idle) / 1e9
    # The names' A3B and A22B count what one token uses.
    assert round(active) == {"qwen3-vl-30b-a3b": 4, "qwen3-vl-235b-a22b": 23}[name]


def test_settings_that_sizes_do_not_show() -> None:
    for name, config in catalog.CATALOG.items():
        if not name.startswith("tiny"):
            assert config.tie_word_embeddings == (name in ("qwen3-vl-2b", "qwen3-vl-4b"))
            assert config.text.mrope_section == (24, 20, 20) and config.text.rope_theta == 5e6
            assert config.vision.head_dim in (64, 72)
            assert len(config.vision.deepstack_visual_indexes) == 3


def test_a_name_is_random_but_repeats() -> None:
    config, params = catalog.load("tiny", dtype="bfloat16")
    assert config == catalog.CATALOG["tiny"]
    assert params["text"]["embed"].dtype == jnp.bfloat16
    assert 0.015 < float(jnp.std(params["text"]["embed"].astype(jnp.float32))) < 0.025
    _, again = catalog.load("tiny", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_folder_is_read(tmp_path: Path) -> None:
    config, params = catalog.load("tiny-moe", dtype="float32")
    params["text"]["norm"] = params["text"]["norm"] + 0.5
    hf_weights.save(tmp_path / "m", config, params, layout="transformers")
    read_config, read = catalog.load(tmp_path / "m", dtype="float32")
    assert read_config == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    _, told = catalog.load(str(tmp_path / "m"), dtype="float32", layout="transformers")
    jax.tree.map(np.testing.assert_array_equal, told, params)


def test_an_unknown_name_suggests() -> None:
    with pytest.raises(ValueError, match=r"neither a folder nor a model name; did you mean 'qwen3-vl-8b'\?"):
        catalog.load("Qwen3VL-8B", dtype="float32")
    with pytest.raises(ValueError, match=r"config\.json is not there"):
        catalog.load(Path(__file__).parent, dtype="float32")
