"""The seal of a checkpoint: checksums of all its files, made by who wrote them and checked before they are believed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax import checkpoint as ocp

MANIFEST, STATE = "manifest.json", "state"
READERS = 4  # threads that hash; hashing releases the interpreter's lock


class Damaged(ValueError):
    """A file of a checkpoint is not what was written; the message is a clause that names it."""


class SealingHandler(ocp.StandardCheckpointHandler):
    """Saves a tree of arrays as Orbax does, each process its own shards, and seals it with a manifest.

    Every process hashes what it wrote, in the background; the first one adds the files that are common to all and
    writes the manifest. All of it comes before the rename by which a checkpoint appears.

    Attributes:
      manifest: what the next save's manifest says, JSON-able; `files` and `seal` are added.
    """

    def __init__(self) -> None:
        super().__init__()
        self.manifest: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(1, "seal")

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        writes = await super().async_save(directory, *args, **kwargs) or []
        return [*writes, self._thread.submit(self._hash_own, directory, writes)]

    def _hash_own(self, directory: Any, writes: Sequence[Future[None]]) -> None:
        for write in writes:
            write.result()
        folder = Path(getattr(directory, "path", directory))  # Orbax makes the folder in the background
        index = jax.process_index()
        files = hash_files(folder, [path for path in (folder / f"ocdbt.process_{index}").rglob("*") if path.is_file()])
        (folder / f"files.process_{index}").write_text(json.dumps(files))

    def finalize(self, directory: Any) -> None:
        """Of the first process alone, once all have written."""
        super().finalize(directory)
        folder, files = Path(directory), {}
        for part in folder.glob("files.process_*"):
            files.update(json.loads(part.read_text()))
            part.unlink()
        rest = [
            path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).as_posix() not in files
        ]
        files.update(hash_files(folder, rest))
        write_manifest(folder.parent / MANIFEST, {**self.manifest, "files": dict(sorted(files.items()))})

    def close(self) -> None:
        self._thread.shutdown()
        super().close()


def hash_files(folder: Path, paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """{name within the folder: bytes and SHA-256}, read in pieces."""
    with ThreadPoolExecutor(READERS) as pool:
        sums = pool.map(_sha256, paths)
        return {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, sums, strict=True)
        }


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Writes it with a checksum of its own, `seal`; on disk when this returns."""
    with path.open("w") as file:
        json.dump({**manifest, "seal": _seal(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder.

    Raises:
      Damaged: it is not there, or is not what was written.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        seal = manifest.pop("seal")
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (ValueError, KeyError, AttributeError):
        raise Damaged(f"{path} is cut short or not JSON") from None
    if seal != _seal(manifest):
        raise Damaged(f"{path} is not what was written: its own checksum is another")
    return manifest


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Reads all files of a checkpoint once and compares; the processes share the work and all come to one result.

    Raises:
      Damaged: in every process, for the first file that is not what was written.
    """
    names = list(manifest["files"])

    def wrong(place: int) -> str | None:
        return _difference(folder / STATE / names[place], manifest["files"][names[place]])

    mine = range(jax.process_index(), len(names), jax.process_count())
    with ThreadPoolExecutor(READERS) as pool:
        first = next((place for place, text in zip(mine, pool.map(wrong, mine), strict=True) if text), len(names))
    if jax.process_count() > 1:
        first = int(np.min(multihost_utils.process_allgather(np.int32(first))))
    if first < len(names):
        raise Damaged(wrong(first) or f"{folder / STATE / names[first]} reads differently in another process")


def _difference(path: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path} has {size:,} bytes, {expected['bytes']:,} were written"
        if _sha256(path) != expected["sha256"]:
            return f"{path} is not what was written: its SHA-256 is another"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
