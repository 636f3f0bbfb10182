"""`mindjax doctor`, in a good environment and in broken ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import kernels_cuda
from kernels_cuda import library
from mindjax import doctor


def test_this_environment_is_healthy() -> None:
    report = doctor.examine()
    assert report.healthy
    assert any(device.startswith("cpu") for device in report.devices)
    text = report.as_text()
    assert metadata.version("jax") in text and "the core is healthy" in text
    assert json.loads(json.dumps(report.as_dict()))["healthy"] is True


def test_every_extra_is_described() -> None:
    assert set(metadata.metadata("mindjax").get_all("Provides-Extra") or ()) == set(doctor.USE_OF_EXTRA)


def test_broken_jax_is_reported_and_fails(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text("raise RuntimeError('broken on purpose')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "mindjax.cli", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    problems = {each["name"]: each["problem"] for each in report["requirements"] if not each["extra"]}
    assert "broken on purpose" in problems["jax"] and problems["pillow"] == ""
    assert any("the core lacks" in note and "jax" in note for note in report["notes"])
    assert any("JAX finds no device" in note for note in report["notes"])


def test_missing_and_unfitting_packages_name_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "scikit-learn":
            raise metadata.PackageNotFoundError(name)
        return "4.0.0" if name == "transformers" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = {requirement.name: requirement for requirement in doctor.requirements()}
    assert (found["scikit-learn"].problem, found["scikit-learn"].extra) == ("missing", "quickstart")
    assert found["transformers"].problem == "4.0.0 does not fit"
    report = doctor.examine()
    assert not report.healthy
    assert any("scikit-learn missing): pip install 'mindjax[quickstart]'" in note for note in report.notes)


def test_kernels_that_jax_cannot_call_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for_torch_alone = SimpleNamespace(mjk_isa=lambda: b"avx2")
    found = {"cpu": library.Library(Path("mine.so"), for_torch_alone, ""), "cuda": library.Library(None, None, "none")}  # type: ignore[arg-type]
    monkeypatch.setattr(library, "load", found.__getitem__)
    status = kernels_cuda.status()
    assert status["isa"] is None and "mine.so was built without JAX's headers" in status["message"]
    for_torch_alone.mjk_ffi_gmm = None
    assert kernels_cuda.status()["isa"] == "avx2"


def test_extra_of_an_extra_is_not_satisfied_by_its_base() -> None:
    """`jax` alone does not make `jax[cuda12]`."""
    names = {requirement.name for requirement in doctor.requirements() if requirement.extra == "cuda"}
    assert any("cuda" in name for name in names) and "jax" not in names
