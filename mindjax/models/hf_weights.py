"""Published Qwen3-VL checkpoints in and out: one table from our parameters to their keys, streamed, without torch.

Every key is used exactly once. Our kernels are [in, out] and stacked over layers; published ones are [out, in], one
key per layer. `load` needs the parameters themselves and, for another device than the CPU, one leaf on the host; `save`
and `convert` need one leaf at most.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mindjax.config import ModelConfig
from mindjax.models import qwen3_vl
from mindjax.models.safetensors_io import Reader, TensorSpec, copy_cast, read_json, replaced_folder, write, write_json
from sharding.parallel import Parallel
from sharding.processes import is_first

# How the experts lie in a file. Published files, and vLLM: gate_up_proj [E, H, 2I], down_proj [E, I, H]. What
# transformers 5 saves: [E, 2I, H] and [E, H, I].
Layout = Literal["published", "transformers"]
Params = dict[str, Any]
_SHARD_BYTES = 5 * 10**9  # as the published files


@dataclass(frozen=True)
class Entry:
    """One parameter and its key.

    Attributes:
      path: its place in our tree, dotted.
      key: the published key; `{i}` stands for the layer where our leaf is stacked.
      kind: how the two relate, see `_published`.
    """

    path: str
    key: str
    kind: Literal["same", "transpose", "conv", "experts"] = "same"


def _linear(path: str, key: str) -> list[Entry]:
    return [Entry(f"{path}.kernel", f"{key}.weight", "transpose"), Entry(f"{path}.bias", f"{key}.bias")]


def _layer_norm(path: str, key: str) -> list[Entry]:
    return [Entry(f"{path}.scale", f"{key}.weight"), Entry(f"{path}.bias", f"{key}.bias")]


def _merger(path: str, key: str) -> list[Entry]:
    return [
        *_layer_norm(f"{path}.norm", f"{key}.norm"),
        *_linear(f"{path}.fc1", f"{key}.linear_fc1"),
        *_linear(f"{path}.fc2", f"{key}.linear_fc2"),
    ]


def table(config: ModelConfig) -> list[Entry]:
    """All parameters of a model, in the order in which they are read and written."""
    blocks, layers = "model.visual.blocks.{i}", "model.language_model.layers.{i}"
    entries = [
        Entry("vision.patch_embed.kernel", "model.visual.patch_embed.proj.weight", "conv"),
        Entry("vision.patch_embed.bias", "model.visual.patch_embed.proj.bias"),
        Entry("vision.position_embed", "model.visual.pos_embed.weight"),
        *_layer_norm("vision.blocks.norm1", f"{blocks}.norm1"),
        *_layer_norm("vision.blocks.norm2", f"{blocks}.norm2"),
        *_linear("vision.blocks.attn.qkv", f"{blocks}.attn.qkv"),
        *_linear("vision.blocks.attn.proj", f"{blocks}.attn.proj"),
        *_linear("vision.blocks.mlp.fc1", f"{blocks}.mlp.linear_fc1"),
        *_linear("vision.blocks.mlp.fc2", f"{blocks}.mlp.linear_fc2"),
        *_merger("vision.merger", "model.visual.merger"),
    ]
    if config.vision.deepstack_visual_indexes:
        entries += _merger("vision.deepstack_mergers", "model.visual.deepstack_merger_list.{i}")
    entries += [
        Entry("text.embed", "model.language_model.embed_tokens.weight"),
        Entry("text.layers.input_norm", f"{layers}.input_layernorm.weight"),
        Entry("text.layers.post_attention_norm", f"{layers}.post_attention_layernorm.weight"),
        *(Entry(f"text.layers.attn.{x}", f"{layers}.self_attn.{x}_proj.weight", "transpose") for x in "qkvo"),
        *(Entry(f"text.layers.attn.{x}_norm", f"{layers}.self_attn.{x}_norm.weight") for x in "qk"),
    ]
    if config.text.num_experts:
        entries += [
            Entry("text.layers.moe.router", f"{layers}.mlp.gate.weight", "transpose"),
            Entry("text.layers.moe.gate_up", f"{layers}.mlp.experts.gate_up_proj", "experts"),
            Entry("text.layers.moe.down", f"{layers}.mlp.experts.down_proj", "experts"),
        ]
    else:
        entries += [
            Entry(f"text.layers.mlp.{x}", f"{layers}.mlp.{x}_proj.weight", "transpose") for x in ("gate", "up", "down")
        ]
    entries.append(Entry("text.norm", "model.language_model.norm.weight"))
    if not config.tie_word_embeddings:
        entries.append(Entry("text.head", _HEAD, "transpose"))
    return entries


_HEAD, _EMBED = "lm_head.weight", "model.language_model.embed_tokens.weight"


def load(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    *,
    dtype: Any,
    parallel: Parallel | None = None,
    layout: Layout | None = None,
) -> Params:
    """Reads a checkpoint folder into parameters.

    A file of a tied model that still holds `lm_head.weight` is accepted where it equals the embedding.

    Args:
      folder: `model.safetensors`, or its shards and their index.
      config: of the model; `catalog.load` reads it from the same folder.
      dtype: of the parameters; the file's may be another float type.
      parallel: the devices on which each leaf is placed as it is read; None puts all on the default device.
      layout: of the experts in the file; None tells the layouts apart by shape.

    Raises:
      ValueError: for missing, unknown or wrongly shaped keys (all are named), for expert layouts that shapes cannot
        tell apart, and for damaged files.
    """
    reader = Reader(folder)
    entries, shapes = table(config), _flatten(qwen3_vl.abstract_params(config))
    layout = layout or _detect_layout(reader, config)
    _check_keys(reader, config, layout)
    shardings = _flatten(qwen3_vl.shardings(config, parallel)) if parallel else {}
    dtype = jnp.dtype(dtype)

    def read(entry: Entry, index: tuple[slice, ...] | None) -> np.ndarray:
        """One leaf, or the part of it that `index` names."""
        shape = shapes[entry.path].shape
        index = index or (slice(None),) * len(shape)
        part = _empty_for_jax([len(range(*s.indices(size))) for s, size in zip(index, shape, strict=True)], dtype)
        if not _stacked(entry):
            copy_cast(part, _ours(reader.view(entry.key), entry, layout)[index])
        else:
            for i, layer in enumerate(range(*index[0].indices(shape[0]))):
                source = _ours(reader.view(entry.key.format(i=layer)), entry, layout)
                copy_cast(part[i], source[index[1:]])
        return part

    leaves: dict[str, jax.Array] = {}
    for entry in entries:
        shape = shapes[entry.path].shape
        if parallel is None:
            leaf = jax.device_put(read(entry, None))
        else:
            leaf = jax.make_array_from_callback(shape, shardings[entry.path], partial(read, entry))
        leaves[entry.path] = leaf.block_until_ready()  # so that two leaves are never on their way at once
    return _unflatten(leaves)


def _empty_for_jax(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that JAX on the CPU takes over where it lies: others than of 64-byte alignment it copies."""
    buffer = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : buffer.size - 64 + start].view(dtype).reshape(shape)


def save(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    dtype: Any = None,
    layout: Layout = "published",
    max_shard_bytes: int = _SHARD_BYTES,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json, generation_config.json and the weights, so that transformers and vLLM load the folder.

    The folder appears, or changes from the old version to the new, as a whole. Other files in it (a tokenizer) stay.
    transformers 5.19 silently misreads `layout="published"` where 2 moe_intermediate_size == hidden_size, vLLM
    misreads `layout="transformers"` always.

    Args:
      folder: new, empty, or one that already holds a Qwen3-VL model or its processor.
      params: arrays or numpy arrays, sharded ones included. Where they lie on devices of several processes, all of
        these call this, and the first one writes.
      dtype: on disk; None keeps that of each parameter.
      layout: of the experts.
      max_shard_bytes: a larger model is split.
      generation: what generation_config.json says, such as eos_token_id.

    Raises:
      ValueError: where the parameters are not those of `config` (all differences are named), or the folder is
        something else's.
      OSError: where the disk is full; the folder is then as it was.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    entries, leaves = table(config), _flatten(params)
    _check_leaves(leaves, config)
    if not is_first():
        for entry in entries:
            _to_host(leaves[entry.path])
        return
    specs: list[TensorSpec] = []
    places: dict[str, tuple[Entry, int | None]] = {}
    for entry in entries:
        leaf = leaves[entry.path]
        on_disk = jnp.dtype(dtype or leaf.dtype)
        for layer in range(leaf.shape[0]) if _stacked(entry) else (None,):
            key = entry.key.format(i=layer)
            specs.append(TensorSpec(key, on_disk, _published_shape(leaf.shape, entry, config, layout)))
            places[key] = entry, layer

    held: list[tuple[Entry, np.ndarray]] = []  # the one leaf that is in host memory

    def tensor(spec: TensorSpec) -> np.ndarray:
        entry, layer = places[spec.name]
        if not held or held[0][0] is not entry:
            held.clear()
            held.append((entry, _to_host(leaves[entry.path])))
        host = held[0][1]
        return _published(host if layer is None else host[layer], entry, config, layout)

    with replaced_folder(folder, sum(spec.nbytes for spec in specs)) as staging:
        write(staging, specs, tensor, max_shard_bytes)
        write_json(staging / "config.json", with_dtype(config.to_hf(), specs[-1].dtype))
        write_json(staging / "generation_config.json", dict(generation or {}))


def published_tensors(config: ModelConfig, params: Any, *, layout: Layout = "published") -> Iterator[tuple[str, Any]]:
    """(published key, tensor) of every parameter, as views where the array type has them; nothing is written.

    Args:
      params: a tree of the model's parameters, of NumPy arrays or torch tensors.
      layout: of the experts.

    Raises:
      ValueError: where the parameters are not those of `config` (all differences are named).
    """
    leaves = _flatten(params)
    _check_leaves(leaves, config)

    def tensors() -> Iterator[tuple[str, Any]]:
        for entry in table(config):
            leaf = leaves[entry.path]
            for layer in range(leaf.shape[0]) if _stacked(entry) else (None,):
                tensor = leaf if layer is None else leaf[layer]
                yield entry.key.format(i=layer), _published(tensor, entry, config, layout)

    return tensors()


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: Any = None,
    layout: Layout = "published",
    source_layout: Layout | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Rewrites a checkpoint folder, file to file: dtype, expert layout, shard size. Other files are copied.

    Args:
      source: a Qwen3-VL folder with config.json.
      target: see `save`.
      dtype: on disk; None keeps that of each tensor.
      layout: of the experts in the result.
      source_layout: of the experts in the source; None tells by shape.
      max_shard_bytes: see `save`.

    Raises:
      ValueError, OSError: see `load` and `save`.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ValueError(f"source and target are both {source}; give another target")
    refuse_foreign(target)
    hf_config = read_json(source / "config.json")
    config = ModelConfig.from_hf(hf_config)
    reader = Reader(source)
    source_layout = source_layout or _detect_layout(reader, config)
    _check_keys(reader, config, source_layout)
    entries = {key: entry for entry in table(config) for key in _keys(entry, config)}
    swap = {key for key, entry in entries.items() if entry.kind == "experts" and layout != source_layout}

    def spec(key: str) -> TensorSpec:
        old = reader.specs[key]
        shape = (old.shape[0], old.shape[2], old.shape[1]) if key in swap else old.shape
        return TensorSpec(key, jnp.dtype(dtype or old.dtype), shape)

    def tensor(spec: TensorSpec) -> np.ndarray:
        view = reader.view(spec.name)
        return view.swapaxes(1, 2) if spec.name in swap else view

    specs = [spec(key) for key in entries]
    with replaced_folder(target, sum(spec.nbytes for spec in specs)) as staging:
        write(staging, specs, tensor, max_shard_bytes)
        copy_companions(source, staging)
        write_json(staging / "config.json", with_dtype(hf_config, specs[-1].dtype))


# What belongs to a model folder beside its weights: tokenizer, processor, templates, the card.
_COPIED = {".json", ".jinja", ".txt", ".md", ".model"}


def copy_companions(source: Path, target: Path) -> None:
    """Copies what belongs to a model folder beside its weights."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in _COPIED and not path.name.endswith(".index.json"):
            (target / path.name).write_bytes(path.read_bytes())


# ---- one tensor: ours and published ----


def _stacked(entry: Entry) -> bool:
    return "{i}" in entry.key


def _ours(tensor: np.ndarray, entry: Entry, layout: Layout) -> np.ndarray:
    """A published tensor as a view in our order (one layer of a stacked leaf)."""
    match entry.kind:
        case "same":
            return tensor
        case "transpose":
            return tensor.T
        case "conv":  # [out, channels, time, height, width]: what the processor emits is flattened in this order
            return tensor.reshape(len(tensor), -1).T
        case "experts":
            return tensor if layout == "published" else tensor.swapaxes(1, 2)


def _published(leaf: np.ndarray, entry: Entry, config: ModelConfig, layout: Layout) -> np.ndarray:
    """One layer of our leaf as a view in the published order."""
    match entry.kind:
        case "same":
            return leaf
        case "transpose":
            return leaf.T
        case "conv":
            v = config.vision
            return leaf.T.reshape(-1, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
        case "experts":
            return leaf if layout == "published" else leaf.swapaxes(1, 2)


def _published_shape(shape: tuple[int, ...], entry: Entry, config: ModelConfig, layout: Layout) -> tuple[int, ...]:
    """Of one published tensor, given the shape of our (stacked) leaf."""
    nothing = np.broadcast_to(np.float32(0), shape[1:] if _stacked(entry) else shape)  # a shape without memory
    if entry.kind == "conv":
        v = config.vision
        return shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size
    return _published(nothing, entry, config, layout).shape


def _to_host(leaf: Any) -> np.ndarray:
    """A leaf in host memory; unlike np.asarray it leaves no cached copy behind in the array."""
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return np.asarray(leaf)
    if not leaf.is_fully_addressable:
        assert isinstance(leaf.sharding, NamedSharding)
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return np.asarray(jax.jit(lambda x: x, out_shardings=whole)(leaf).addressable_data(0))
    host = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            host[shard.index] = np.asarray(shard.data)
    return host


# ---- checks ----


def _keys(entry: Entry, config: ModelConfig) -> Iterator[str]:
    if not _stacked(entry):
        yield entry.key
        return
    if entry.path.startswith("text."):
        layers = config.text.num_hidden_layers
    elif "deepstack" in entry.path:
        layers = len(config.vision.deepstack_visual_indexes)
    else:
        layers = config.vision.depth
    for i in range(layers):
        yield entry.key.format(i=i)


def _detect_layout(reader: Reader, config: ModelConfig) -> Layout:
    text = config.text
    if not text.num_experts:
        return "published"
    if 2 * text.moe_intermediate_size == text.hidden_size:
        raise ValueError(
            f"{reader.folder}: 2 moe_intermediate_size == hidden_size == {text.hidden_size}, so that the shape of "
            "gate_up_proj does not tell the expert layout. Say layout='published' (published files, vLLM, this "
            "package) or layout='transformers' (what transformers 5 saves)."
        )
    gate_up = [spec.shape for key, spec in reader.specs.items() if key.endswith("experts.gate_up_proj")]
    transposed = (text.num_experts, 2 * text.moe_intermediate_size, text.hidden_size)
    return "transformers" if gate_up and all(shape == transposed for shape in gate_up) else "published"


def _check_keys(reader: Reader, config: ModelConfig, layout: Layout) -> None:
    shapes = _flatten(qwen3_vl.abstract_params(config))
    expected = {
        key: _published_shape(shapes[entry.path].shape, entry, config, layout)
        for entry in table(config)
        for key in _keys(entry, config)
    }
    found = {key: spec.shape for key, spec in reader.specs.items()}
    if config.tie_word_embeddings and _HEAD in found:
        embed = reader.specs.get(_EMBED)
        if embed is not None and _same_bits(reader, _HEAD, _EMBED):
            del found[_HEAD]
        else:
            raise ValueError(
                f"{reader.folder}: config.json ties the head to the embedding, but {_HEAD} differs from {_EMBED}. "
                "Set tie_word_embeddings to false to keep it, or remove it."
            )
    _raise_differences(str(reader.folder), expected, found)


def _check_leaves(leaves: dict[str, Any], config: ModelConfig) -> None:
    shapes = _flatten(qwen3_vl.abstract_params(config))
    expected = {path: leaf.shape for path, leaf in shapes.items()}
    _raise_differences("the parameters", expected, {path: tuple(leaf.shape) for path, leaf in leaves.items()})


def _raise_differences(where: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    problems = []
    for number, key in enumerate(missing):
        # Looking for a near name costs milliseconds; a thousand missing keys need none.
        near = difflib.get_close_matches(key, unknown, 1, 0.8) if number < 20 else []
        problems.append(f"missing {key}" + (f" (is it {near[0]}?)" if near else ""))
    problems += [f"unknown {key} {list(found[key])}" for key in unknown]
    problems += [
        f"{key} has shape {list(found[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    if problems:
        raise ValueError(f"{where} does not fit the config:\n  " + "\n  ".join(problems))


def _same_bits(reader: Reader, a: str, b: str) -> bool:
    if reader.specs[a].shape != reader.specs[b].shape or reader.specs[a].dtype != reader.specs[b].dtype:
        return False
    left, right = (reader.view(name).reshape(-1).view(np.uint8) for name in (a, b))
    step = 16 * 2**20  # bytes, so that the comparison makes no large temporary
    return all(np.array_equal(left[i : i + step], right[i : i + step]) for i in range(0, len(left), step))


def refuse_foreign(folder: Path) -> None:
    """A folder is replaced as a whole, so it must be a model's."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    config = folder / "config.json"
    if config.is_file():
        kind = read_json(config).get("model_type")
        if kind not in ("qwen3_vl", "qwen3_vl_moe"):
            raise ValueError(f"{folder} holds a model of type {kind!r}; write to another folder")
    strange = [p.name for p in folder.iterdir() if p.is_dir() or p.suffix not in _COPIED | {".safetensors"}]
    if strange:
        raise ValueError(f"{folder} holds things that are no model's ({', '.join(sorted(strange)[:5])}); name another")


def with_dtype(hf_config: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """config.json with the dtype of the weights, where transformers and vLLM look for it."""
    result = {key: value for key, value in hf_config.items() if key != "torch_dtype"}
    text = {key: value for key, value in result["text_config"].items() if key != "torch_dtype"}
    return {**result, "dtype": dtype.name, "text_config": {**text, "dtype": dtype.name}}


# ---- trees ----


def _flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as a flat one with dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _unflatten(leaves: dict[str, Any]) -> Params:
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
