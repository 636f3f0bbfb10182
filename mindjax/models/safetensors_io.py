"""Sharded safetensors files, read and written as streams.

A file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte offsets), and the bytes
(https://github.com/huggingface/safetensors). Reading maps the files, so that a tensor costs no anonymous memory until
it is copied; writing needs the shapes first and then one tensor at a time.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
# Only `mindjax.interop.fp8_blocks` reads these: without their scales they are not the weights.
QUANTISED_DTYPES = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
_NAMES = {dtype: name for name, dtype in (DTYPES | QUANTISED_DTYPES).items()}
_HEADER_LIMIT = 100_000_000  # bytes, as in the reference implementation: a larger header is not a header
_CHUNK = 16 * 2**20  # bytes copied at a time, so that a cast or a transpose never needs a second tensor


@dataclass(frozen=True)
class TensorSpec:
    """What a file says of a tensor before its bytes are touched."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Reader:
    """The tensors of a checkpoint folder, one file or many behind an index.

    Attributes:
      specs: name -> TensorSpec of everything in the files.

    Raises:
      ValueError: for a folder without weights, and for missing, truncated, damaged or contradictory files, by name.
    """

    def __init__(self, folder: str | os.PathLike[str], dtypes: Mapping[str, np.dtype] = DTYPES):
        self.folder = Path(folder)
        self._dtypes = dtypes
        self.specs: dict[str, TensorSpec] = {}
        self._where: dict[str, tuple[Path, int]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        index = self.folder / INDEX_FILE
        if index.is_file():
            weight_map = _parse_json(index.read_bytes(), index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no weight_map")
            files = sorted(set(weight_map.values()))
            if outside := [name for name in files if Path(name).name != name]:
                raise ValueError(f"{index} names files outside its folder: {outside}")
        elif (self.folder / SINGLE_FILE).is_file():
            weight_map, files = None, [SINGLE_FILE]
        else:
            raise ValueError(f"{self.folder} holds neither {INDEX_FILE} nor {SINGLE_FILE}")
        if absent := [name for name in files if not (self.folder / name).is_file()]:
            raise ValueError(f"{index} names files that are not there: {', '.join(absent)}")
        for name in files:
            self._read_header(self.folder / name)
        if weight_map is not None:
            misplaced = [
                f"{key} (not in {file})"
                for key, file in weight_map.items()
                if key not in self._where or self._where[key][0].name != file
            ]
            if misplaced:
                raise ValueError(f"{index} names tensors that its files do not hold: {', '.join(misplaced)}")

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the mapped file."""
        spec, (path, offset) = self.specs[name], self._where[name]
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(self._maps[path], np.uint8, spec.nbytes, offset)
        return flat.view(spec.dtype).reshape(spec.shape)

    def _read_header(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT + 1
            if length > min(_HEADER_LIMIT, size - 8):
                raise ValueError(f"{path} is truncated or no safetensors file ({size} bytes)")
            header = _parse_json(file.read(length), path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            try:
                dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: the header of {name} is damaged: {entry}") from error
            if dtype not in self._dtypes:
                raise ValueError(
                    f"{path}: {name} has dtype {dtype}; this reads {', '.join(self._dtypes)}. "
                    "Quantised checkpoints must be dequantised first, those in blocks of fp8 by `mindjax convert`."
                )
            spec = TensorSpec(name, self._dtypes[dtype], shape)
            if begin < 0 or end - begin != spec.nbytes:
                raise ValueError(
                    f"{path}: {name} {dtype} {list(shape)} needs {spec.nbytes} bytes, the header gives {end - begin}"
                )
            if 8 + length + end > size:
                raise ValueError(f"{path} is truncated: {name} ends at byte {8 + length + end} of {size}")
            if name in self.specs:
                raise ValueError(f"{name} is in both {self._where[name][0]} and {path}")
            self.specs[name] = spec
            self._where[name] = (path, 8 + length + begin)


def copy_cast(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source with a cast, through no temporary; the two may be transposed to each other."""
    if target.dtype == source.dtype and target.dtype.itemsize == 2:
        # numpy moves a foreign dtype such as bfloat16 element by element through a callback, integers in bulk.
        target, source = target.view(np.uint16), source.view(np.uint16)
    if target.ndim == 3:
        for one_target, one_source in zip(target, source, strict=True):
            copy_cast(one_target, one_source)
    elif target.ndim == 2 and not source.flags.c_contiguous:
        # In square tiles that fit the cache: a whole transposed row would touch one cache line per element.
        tile = 256
        for i in range(0, target.shape[0], tile):
            for j in range(0, target.shape[1], tile):
                np.copyto(target[i : i + tile, j : j + tile], source[i : i + tile, j : j + tile], casting="unsafe")
    else:
        np.copyto(target, source, casting="unsafe")


def write(
    folder: Path,
    specs: Iterable[TensorSpec],
    tensor: Callable[[TensorSpec], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes tensors in the order of `specs`, calling `tensor` for one at a time, and the index where there are shards.

    Args:
      folder: exists, holds no weights.
      specs: names, dtypes on disk and shapes.
      tensor: gives the values, in any float dtype and memory order.
      max_shard_bytes: a file grows to this; a tensor larger than it gets a file of its own.
    """
    shards = _split(list(specs), max_shard_bytes)
    names = [SINGLE_FILE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
        offset = 0
        for spec in shard:
            header[spec.name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data start aligned
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for spec in shard:
                for chunk in _chunks(tensor(spec), spec):
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(spec.nbytes for shard in shards for spec in shard)
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        write_json(
            folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: where the file is not there, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    return _parse_json(path.read_bytes(), path)


def write_json(path: Path, value: object) -> None:
    with path.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replaced_folder(folder: Path, nbytes: int) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end; after a failure `folder` is as it was.

    What `folder` held before and the new one lacks is carried over, weights apart, so that a tokenizer saved there
    stays. The switch is two renames: a crash between them leaves both versions whole, beside where they belong.

    Args:
      folder: where the result shall be; absent, or a folder of a model.
      nbytes: how much will be written, checked against the free space before anything is.

    Raises:
      OSError: where the disk is full, with the sizes.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if nbytes > free:
        message = f"{folder} needs {nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, message)
    suffix = uuid.uuid4().hex[:8]
    staging, old = (folder.with_name(f".{folder.name}.{kind}-{suffix}") for kind in ("new", "old"))
    try:
        staging.mkdir()
        yield staging
        if folder.exists():
            for path in folder.iterdir():
                if path.name != INDEX_FILE and path.suffix != ".safetensors" and not (staging / path.name).exists():
                    shutil.copytree(path, staging / path.name) if path.is_dir() else shutil.copy2(path, staging)
        _fsync_folder(staging)
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        _fsync_folder(folder.parent)
    except OSError as error:
        raise OSError(error.errno, f"could not write {folder} ({nbytes / 1e9:.2f} GB): {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not folder.exists() and old.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _split(specs: list[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _chunks(values: np.ndarray, spec: TensorSpec) -> Iterator[memoryview]:
    """The tensor's bytes in order, cast and made contiguous a few rows at a time."""
    assert values.shape == spec.shape, (spec.name, values.shape, spec.shape)
    rows = max(1, _CHUNK // max(1, spec.nbytes // max(1, len(values)))) if values.ndim else 1
    for i in range(0, len(values), rows):
        part = values[i : i + rows]
        if part.dtype != spec.dtype or not part.flags.c_contiguous:
            contiguous = np.empty(part.shape, spec.dtype)
            copy_cast(contiguous, part)
            part = contiguous
        yield part.reshape(-1).view(np.uint8).data


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(f"{path} does not hold the JSON that it should: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds JSON, but no object")
    return value
