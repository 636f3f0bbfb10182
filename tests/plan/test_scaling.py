"""The rows of docs/scaling.md, by their commands."""

from __future__ import annotations

import json

import pytest

from mindjax import cli

JOBS = {
    "8b-v6e": "qwen3-vl-8b v6e:4x4 64",
    "30b-v5p": "qwen3-vl-30b-a3b v5p:4x4x4 256",
    "30b-v6e": "qwen3-vl-30b-a3b v6e:16x16 512",
    "235b-v5p": "qwen3-vl-235b-a22b v5p:8x8x16 1024",
}


@pytest.mark.prove
@pytest.mark.parametrize("name", JOBS)
def test_job_fits_gathers_nothing_whole_and_compiles_in_ten_minutes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, topology, batch = JOBS[name].split()
    status = cli.main(
        ["plan", "--model", model, "--topology", topology, "--batch", batch, "--length", "8192", "--json"]
    )
    out = capsys.readouterr().out
    with capsys.disabled():
        print(out)
    # `unexpected` finds what tests/plan/test_program.py plants.
    result = json.loads(out.splitlines()[-1])
    assert status == 0 and result["fits"] and result["unexpected_gathers"] == []
    assert result["compile_s"] < 600
