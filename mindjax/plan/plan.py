"""`mindjax plan`: from a model, a topology and a batch to memory, FLOPs, exchanges, time, and what holds it back."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindjax.config import ModelConfig
from mindjax.models import qwen3_vl
from mindjax.models.catalog import CATALOG
from mindjax.models.safetensors_io import read_json
from mindjax.plan import program, recompute, roofline, search
from mindjax.plan.compile import Compiled, compile_step
from mindjax.plan.cost import Job, check
from mindjax.plan.hardware import Topology, places
from mindjax.plan.program import Program
from mindjax.plan.roofline import Prediction, Wires
from mindjax.plan.search import Candidate
from sharding.layout import Layout
from sharding.remat import NAMES, Remat

GIB = 2**30


def main(arguments: argparse.Namespace) -> int:
    """Runs the command, whose options are in `mindjax.cli`; returns 0 where the plan fits, 1 where it does not."""
    model, topology = model_config(arguments.model), Topology.parse(arguments.topology)
    if min(arguments.batch, arguments.length) < 1 or min(arguments.images, arguments.micro_batches) < 0:
        raise ValueError("--batch and --length must be 1 or more, --images and --micro-batches not negative")
    if arguments.images * arguments.image_tokens > arguments.length:
        raise ValueError(
            f"{arguments.images} images of {arguments.image_tokens} tokens do not fit a row of {arguments.length}; "
            "lower --images or --image-tokens"
        )
    job = Job(model, Layout(), arguments.batch, arguments.length, arguments.images, arguments.image_tokens)
    say = _progress(sys.stderr)
    candidates = choose(job, topology, arguments, say)
    compiles = not arguments.no_compile and topology.chip.kind != "gpu"
    wanted = arguments.candidates if arguments.search and compiles else 1
    plans: list[Plan] = []
    for number, candidate in enumerate(candidates, start=1):
        say(f"candidate {number} of {len(candidates)}: {describe(candidate.job)}")
        try:
            compiled = compile_step(candidate.job, topology, report=say) if compiles else None
        except RuntimeError as error:  # of the compiler itself; another layout may not meet it
            if number == len(candidates) and not plans:
                raise ValueError(f"{error}\nchoose another layout with --mesh") from None
            say(f"the compiler failed: {str(error).strip().splitlines()[-1]}")
            continue
        plans.append(Plan(arguments.model, topology, candidate, compiled))
        if sum(plan.fits for plan in plans) == wanted:
            break
    plan = min(plans, key=lambda plan: (not plan.fits, plan.prediction.step))
    print(plan.as_text())
    if arguments.recompute:
        print("\n" + recompute.as_text(plan.candidate.job))
    if len(plans) > 1:
        print("\nCompiled candidates:")
        for other in plans:
            mark = "  <-" if other is plan else ""
            fits, p = "fits" if other.fits else "too large", other.prediction
            size = f"{other.bytes / GIB:6.1f} GiB {fits}"
            print(f"  {p.step:8.3f} s  MFU {p.mfu:6.1%}  {size}  {describe(other.candidate.job)}{mark}")
    output = arguments.output or (
        Path("runs") / f"plan-{arguments.model.rpartition('/')[2]}.py" if arguments.search else None
    )
    if output:
        search.write(plan.candidate.job, topology, arguments.model, output)
        print(f"\nwritten: {output}, for  mindjax sft --config={output} --config.data.path=...")
    if arguments.html:
        plan.write_page(arguments.html)
        print(f"written: {arguments.html}")
    if arguments.json:
        print(json.dumps(plan.as_dict()))
    return 0 if plan.fits else 1


def model_config(name: str) -> ModelConfig:
    """Of a folder with config.json, or by name; no weights are read.

    Raises:
      ValueError: where it is neither.
    """
    if (Path(name) / "config.json").is_file():
        return ModelConfig.from_hf(read_json(Path(name) / "config.json"))
    if name not in CATALOG:
        near = difflib.get_close_matches(name.lower(), CATALOG, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{name!r} is neither a folder with config.json nor a model name{hint} The names are {', '.join(CATALOG)}."
        )
    return CATALOG[name]


def choose(job: Job, topology: Topology, arguments: argparse.Namespace, say: Callable[[str], None]) -> list[Candidate]:
    """The layout that was asked for, or the best by the cost model, fastest first."""
    remats: tuple[Remat, ...] = search.REMATS if arguments.remat is None else (parse_remat(arguments.remat),)
    if not arguments.mesh:
        started = time.monotonic()
        found = search.search(job, topology, remats=remats, micro_batches=arguments.micro_batches)
        say(f"{len(found)} plans fit by the cost model ({time.monotonic() - started:.0f} s)")
        return search.distinct(found, max(1, arguments.candidates))
    layout = Layout.parse(arguments.mesh)
    if layout.devices != topology.devices:
        raise ValueError(
            f"--mesh {layout} takes {layout.devices} devices and {topology.name} has {topology.devices}: sizes of "
            "data, fsdp, stage, sequence, expert and tensor must multiply to that"
        )
    job = replace(job, layout=layout, micro_batches=arguments.micro_batches or 1)
    check(job)
    counts = [arguments.micro_batches] if arguments.micro_batches else [2**i for i in range(12)]
    every = [
        search.judge(replace(job, micro_batches=n, remat=r), topology)
        for n in counts
        if _divides(job, n)
        for r in remats
    ]
    room = search.FILL * topology.chip.hbm
    fitting = sorted((c for c in every if c.bytes <= room), key=lambda c: c.prediction.step)
    return [fitting[0] if fitting else min(every, key=lambda c: c.bytes)]


def _divides(job: Job, micro_batches: int) -> bool:
    try:
        check(replace(job, micro_batches=micro_batches))
    except ValueError:
        return False
    return True


def parse_remat(text: str) -> Remat:
    """Raises ValueError for a name that no model marks."""
    if text in ("none", "full"):
        return text
    names = tuple(filter(None, text.split(",")))
    if not names or set(names) - set(NAMES):
        raise ValueError(f"--remat {text!r}: write none, full, or names of {', '.join(NAMES)} with commas between")
    return names


def describe(job: Job) -> str:
    """The layout, the policy and the micro-batches in a line."""
    remat = job.remat if isinstance(job.remat, str) else ",".join(job.remat)
    return f"{job.layout}; remat {remat}; {job.micro_batches} micro-batches of {job.rows} rows on a device"


class Plan:
    """One job on one topology, by the cost model and, where it was compiled, by its program."""

    def __init__(self, model: str, topology: Topology, candidate: Candidate, compiled: Compiled | None):
        self.model, self.topology, self.candidate, self.compiled = model, topology, candidate, compiled
        sizes = candidate.job.layout.sizes
        self.mesh = places(topology, tuple(sizes.values())) if compiled is None else compiled.mesh
        wires = Wires(topology, sizes, self.mesh)
        self.expected = roofline.of_cost(candidate.cost, wires)
        self.program: Program | None = None
        self.prediction: Prediction = self.expected
        if compiled is not None and compiled.text:
            self.program = program.read(compiled.text, sizes)
            self.prediction = roofline.of_program(self.program, candidate.cost.useful, wires)

    @property
    def bytes(self) -> float:
        """On a device."""
        return self.candidate.bytes if self.compiled is None else self.compiled.total

    @property
    def fits(self) -> bool:
        if self.compiled is not None and self.compiled.problem:
            return False
        return self.bytes <= self.topology.chip.hbm

    @property
    def memory(self) -> dict[str, float]:
        """Kind -> bytes, largest first."""
        parts = self.candidate.cost.memory if self.compiled is None else self.compiled.memory
        return {kind: float(size) for kind, size in sorted(parts.items(), key=lambda part: -part[1]) if size > 0}

    @property
    def sent(self) -> dict[str, float]:
        """Mesh axis -> bytes that leave a device in a step."""
        sent = self.candidate.cost.sent if self.program is None else self.program.sent
        return {axis: float(size) for axis, size in sent.items() if size}

    @property
    def flops(self) -> float:
        """Done by a device in a step."""
        return float(sum(self.candidate.cost.flops.values())) if self.program is None else self.program.flops

    def unexpected(self) -> list[program.Collective]:
        """Gathers that no layout should need, see `program.unexpected`."""
        if self.program is None:
            return []
        job = self.candidate.job
        return program.unexpected(self.program, stacks(job.model), job.model.text.vocab_size, job.layout.sizes)

    def as_dict(self) -> dict[str, Any]:
        """The result as other programs read it."""
        return {
            "topology": self.topology.name,
            "devices": self.topology.devices,
            "mesh": self.candidate.job.layout.sizes,
            "hbm_bytes": int(self.topology.chip.hbm),
            "bytes_per_device": int(self.bytes),
            "fits": self.fits,
            "flops_per_device": self.flops,
            "collective_bytes": {axis: self.sent.get(axis, 0.0) for axis in self.candidate.job.layout.sizes},
            "predicted_step_s": self.prediction.step,
            "predicted_mfu": self.prediction.mfu,
            "compile_s": None if self.compiled is None else round(self.compiled.seconds, 1),
            "layout": str(self.candidate.job.layout),
            "micro_batches": self.candidate.job.micro_batches,
            "remat": self.candidate.job.remat,
            "memory": {kind: int(size) for kind, size in self.memory.items()},
            "unexpected_gathers": [f"{found.result} {found.source}" for found in self.unexpected()],
            "cost_model": {
                "bytes_per_device": int(self.candidate.bytes),
                "flops_per_device": float(sum(self.candidate.cost.flops.values())),
                "predicted_step_s": self.expected.step,
                "predicted_mfu": self.expected.mfu,
            },
        }

    def as_text(self) -> str:
        """For a terminal."""
        job, chip, p = self.candidate.job, self.topology.chip, self.prediction
        by = "the cost model" if self.compiled is None else f"the compiled step ({self.compiled.seconds:.0f} s)"
        lines = [
            f"{self.model} on {self.topology.name}, {self.topology.devices} devices: {job.batch} rows of {job.length} "
            f"tokens an update, {job.images} images a row",
            f"layout   {describe(job)}",
            f"by       {by}",
            f"memory   {self.bytes / GIB:.1f} of {chip.hbm / GIB:.1f} GiB a device: "
            + ("fits" if self.fits else "DOES NOT FIT"),
        ]
        if self.compiled is not None and self.compiled.problem:
            lines.append(f"         {self.compiled.problem}")
        lines += [
            f"         {size / GIB:8.2f} GiB  {kind}" for kind, size in self.memory.items() if size >= 0.005 * GIB
        ]
        lines.append(
            f"FLOPs    {self.flops:.3g} a device, of which the mathematics asks for {self.candidate.cost.useful:.3g}"
        )
        for axis, size in sorted(self.sent.items(), key=lambda part: -part[1]):
            lines.append(f"sent     {size / 1e9:10.2f} GB over {axis}: {p.links.get(axis, 0.0):.3f} s")
        lines += [
            f"limits   compute {p.compute:.3f} s, memory {p.memory:.3f} s, exchanges {sum(p.links.values()):.3f} s",
            f"step     {p.step:.3f} s: kernels {p.kernels:.3f} s, exchanges that nothing hides {p.exposed:.3f} s",
            f"MFU      {p.mfu:.1%}, {job.tokens / p.step / self.topology.devices:,.0f} tokens/s a device",
            "longest  " + "\n         ".join(f"{seconds:8.3f} s  {name}" for name, seconds in p.slowest[:8]),
            "assumed  " + "\n         ".join(p.assumptions),
        ]
        if self.program is not None:
            for found in self.unexpected():
                lines.append(f"WARNING  whole weights or logits are gathered: {found.result} by {found.source}")
            for loop in self.program.unknown_loops:
                lines.append(f"note     a loop whose rounds are not known counts once: {loop}")
            e = self.expected
            lines.append(
                f"model    the cost model expects {self.candidate.bytes / GIB:.1f} GiB, {e.step:.3f} s, MFU {e.mfu:.1%}"
            )
        return "\n".join(lines)

    def write_page(self, path: Path) -> None:
        """See `mindjax.plan.page`."""
        from mindjax.plan import page

        job, chip = self.candidate.job, self.topology.chip
        memory = {"cost model": {k: float(v) for k, v in self.candidate.cost.memory.items()}}
        predictions = {"cost model": self.expected}
        if self.program is not None:
            memory = {"compiled": self.memory, **memory}
            predictions = {"compiled": self.prediction, **predictions}
        facts = {
            "model": self.model,
            "topology": self.topology.name,
            "layout": describe(job),
            "batch": f"{job.batch} rows of {job.length} tokens, {job.images} images of {job.image_tokens} tokens a row",
            "memory": f"{self.bytes / GIB:.1f} of {self.topology.chip.hbm / GIB:.1f} GiB a device",
            "step": f"{self.prediction.step:.3f} s, MFU {self.prediction.mfu:.1%}",
            "chip": f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s; {chip.source}",
        }
        notes = [f"Gathered whole: {found.result}, {found.source}" for found in self.unexpected()]
        page.write(
            path, facts=facts, memory=memory, hbm=self.topology.chip.hbm, predictions=predictions,
            sizes=job.layout.sizes, mesh=self.mesh, notes=notes,
        )  # fmt: skip


def stacks(model: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of the weights that are stacked over layers."""
    import jax

    params = qwen3_vl.abstract_params(model)
    trees = params["text"]["layers"], params["vision"]["blocks"]
    return sorted({leaf.shape for leaf in jax.tree.leaves(trees) if leaf.ndim >= 3})


def _progress(stream: Any) -> Callable[[str], None]:
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", file=stream, flush=True)

    return say
