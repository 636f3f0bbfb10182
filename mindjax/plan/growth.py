"""How cost grows with devices, tokens and experts: the cost model as lines, compiled steps as points.

python -m mindjax.plan.growth docs/images/growth.png --points runs/growth.jsonl --compile 3

Each call compiles that many points that the file lacks, one at a time, and draws what there is.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindjax.models.catalog import CATALOG
from mindjax.plan import program
from mindjax.plan.compile import compile_step
from mindjax.plan.cost import Job, estimate
from mindjax.plan.hardware import Topology
from sharding.layout import Layout

MODEL = CATALOG["qwen3-vl-30b-a3b"]
# Chips -> their slice, from one host to 1,024 chips; libtpu has no slice of one chip, which is planned alone.
SLICES = {1: "", 4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8", 1024: "8x8x16"}
TOKENS = (2048, 8192, 32768, 131072)
EXPERTS = (8, 32, 128)
PANELS = {
    "devices": "devices, a row of 8,192 tokens each",
    "tokens": "tokens of a row, 2 million tokens an update, 64 devices",
    "experts": "experts, 8 chosen, 64 devices",
}


def jobs() -> list[tuple[str, int, Job, str]]:
    """(panel, x, job, topology): the first in each panel is as small as the others allow."""
    found: list[tuple[str, int, Job, str]] = []
    for devices, shape in SLICES.items():
        # The width of the vision encoder is divisible by 128, no further.
        layout = Layout(data=max(1, devices // 64), fsdp=min(devices, 64))
        found.append(("devices", devices, Job(MODEL, layout, devices, 8192), f"v5p:{shape}" if shape else ""))
    for length in TOKENS:
        # Rows that are fewer than devices are split: heads over Ulysses.
        sequence = max(1, 64 * length // 2**21)
        job = Job(MODEL, Layout(fsdp=64 // sequence, sequence=sequence), 2**21 // length, length)
        micro_batches = max(1, min(job.rows, job.rows * length // 32768))
        found.append(("tokens", length, replace(job, micro_batches=micro_batches), "v5p:4x4x4"))
    for experts in EXPERTS:
        model = replace(MODEL, text=replace(MODEL.text, num_experts=experts))
        found.append(("experts", experts, Job(model, Layout(fsdp=64), 64, 8192), "v5p:4x4x4"))
    return found


def expected(job: Job) -> dict[str, float]:
    """FLOPs for each token, and bytes on a device, by the cost model."""
    cost = estimate(job)
    return {
        "flops_per_token": sum(cost.flops.values()) * job.layout.devices / job.tokens,
        "bytes_per_device": float(sum(cost.memory.values())),
    }


def measured(job: Job, topology: str) -> dict[str, float]:
    """The same of the compiled step."""
    compiled = compile_step(job, Topology.parse(topology), report=lambda text: print(f"\r{text}", end="", flush=True))
    found = program.read(compiled.text, job.layout.sizes) if compiled.text else None
    return {
        "flops_per_token": found.flops * job.layout.devices / job.tokens if found else 0.0,
        "bytes_per_device": compiled.total,
        "compile_s": compiled.seconds,
    }


def draw(path: Path, points: list[dict[str, Any]]) -> None:
    """Two rows of pictures, FLOPs for each token and bytes on a device, over each of the three."""
    from matplotlib import pyplot

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.4), layout="constrained")
        for column, (panel, label) in enumerate(PANELS.items()):
            of = [(x, job) for name, x, job, _ in jobs() if name == panel]
            for row, (what, unit, scale) in enumerate(
                (("flops_per_token", "GFLOP a token", 1e9), ("bytes_per_device", "GiB a device", 2**30))
            ):
                axis, xs = axes[row][column], [x for x, _ in of]
                line = [expected(job)[what] / scale for _, job in of]
                axis.plot(xs, line, color="#2457c5", lw=2, label="cost model")
                axis.plot(xs, _law(panel, what, xs, line), "--", color="#6b7385", lw=1.2, label=_LAWS[panel, what])
                seen = [p for p in points if p["panel"] == panel and p[what]]
                axis.plot(
                    [p["x"] for p in seen], [p[what] / scale for p in seen], "o", color="#d07a14", label="compiled"
                )
                axis.set_xscale("log", base=2)
                axis.set_xticks(xs, [f"{x:,}" for x in xs])
                axis.set_yscale("log" if (panel, what) == ("devices", "bytes_per_device") else "linear")
                if axis.get_yscale() == "linear":
                    axis.set_ylim(0)
                axis.set_ylabel(unit)
                axis.grid(alpha=0.25)
                axis.legend(frameon=False, fontsize=8)
            axes[1][column].set_xlabel(label)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)


_LAWS = {
    ("devices", "flops_per_token"): "constant",
    ("devices", "bytes_per_device"): "a + b / min(devices, 64)",
    ("tokens", "flops_per_token"): "a + b T, scores",
    ("tokens", "bytes_per_device"): "constant, at equal tokens a device",
    ("experts", "flops_per_token"): "constant but for the router",
    ("experts", "bytes_per_device"): "a + b E",
}


def _law(panel: str, what: str, xs: list[int], line: list[float]) -> list[float]:
    """The law through the first and the last point of the line."""
    if "constant" in _LAWS[panel, what]:
        return [line[0]] * len(xs)
    basis = [1 / min(x, 64) for x in xs] if panel == "devices" else [float(x) for x in xs]
    slope = (line[-1] - line[0]) / (basis[-1] - basis[0])
    return [line[0] + slope * (b - basis[0]) for b in basis]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--points", type=Path, default=Path("runs/growth.jsonl"), help="what has been compiled")
    parser.add_argument("--compile", type=int, default=0, metavar="N", help="compile N points more; default none")
    arguments = parser.parse_args()
    lines = arguments.points.read_text().splitlines() if arguments.points.exists() else []
    points = [json.loads(line) for line in lines]
    done = {(p["panel"], p["x"]) for p in points}
    missing = [job for job in jobs() if job[:2] not in done and job[3]]
    for panel, x, job, topology in missing[: arguments.compile]:
        point = {"panel": panel, "x": x, "topology": topology, **measured(job, topology)}
        points.append(point)
        arguments.points.parent.mkdir(parents=True, exist_ok=True)
        with arguments.points.open("a") as file:
            file.write(json.dumps(point) + "\n")
        print(f"\r{panel} {x}: {point}")
    draw(arguments.picture, points)


if __name__ == "__main__":
    main()
