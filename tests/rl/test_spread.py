"""Answers and GSPO over eight devices, with experts and heads split, against one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(what: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.rl.spread", what, str(folder)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PJRT_NPROC": "32",  # threads: collectives block them
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
        },
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_answers_are_those_of_one_device(tmp_path: Path) -> None:
    result = run("answers", tmp_path)
    assert result["greedy"] < 1e-5
    assert result["drawn"] < 1e-5
    assert result["lengths"] > 3  # some rows end early and are left behind


@pytest.mark.prove
def test_gspo_is_that_of_one_device(tmp_path: Path) -> None:
    result = run("gspo", tmp_path)
    # Adam makes a step of what is left of a small gradient, whatever its size.
    assert result["full"]["params"] < 0.02 * result["full"]["moved"]
    # In 8 bits a rounding in float32 may move an activation by a whole step, and a draw with it.
    for kind, bound in (("full", 1e-4), ("8-bit", 0.1)):
        one, many = result[kind]["grad_norm"]
        assert abs(one - many) < bound * one
        assert result[kind]["rollout_kl"][0] < 2 * result[kind]["rollout_kl"][1] + 1e-9
