"""Speed of the CUDA kernels on a GPU: `python -m kernels_cuda.benchmarks.gpu [--json FILE]`.

Every number stands beside the ceilings that the same run measures, a device-to-device copy (bytes read plus written)
and a dense bf16 product of torch, and beside other implementations: torch._grouped_mm, lax.ragged_dot, a Triton kernel,
CUTLASS where it is built. Inputs are random (zeros run faster) and far larger than the L2 cache, and each time is the
median of event-timed launches after a warm-up. Shapes: Qwen3-VL-30B-A3B, 128 experts, top 8, hidden 2048, intermediate
768.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

EXPERTS, CHOICES = 128, 8
GATE_UP, DOWN = (2048, 1536), (768, 2048)  # (K, N)
TOKENS = (64, 512, 4096, 16384)
OURS = "mindjax"


@dataclass(frozen=True)
class Timing:
    """One kernel of one implementation: seconds, and the operations and bytes that the task needs at the least."""

    kernel: str
    by: str
    tokens: int
    shape: str
    seconds: float
    flops: float
    bytes: float

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12

    @property
    def bandwidth(self) -> float:
        """TB/s"""
        return self.bytes / self.seconds / 1e12


@dataclass(frozen=True)
class Ceilings:
    copy: float  # TB/s, bytes read plus written
    bf16: float  # TFLOP/s
    fp8: float  # TFLOP/s, 0 where torch cannot say

    def seconds(self, flops: float, moved: float, *, fp8: bool = False) -> float:
        """The least time: the larger of arithmetic and memory."""
        rate = self.fp8 if fp8 and self.fp8 else self.bf16
        return max(flops / rate, moved / self.copy) / 1e12


@dataclass(frozen=True)
class Bar:
    """One line of the table of bars: a measured number and what it must reach."""

    what: str
    measured: float
    wanted: float
    unit: str

    @property
    def passed(self) -> bool:
        return self.measured >= self.wanted


def bars(timings: list[Timing], ceilings: Ceilings) -> list[Bar]:
    """The bars of the design for an H200, from what was measured; the slowest of a kernel's cases counts."""

    def ours(kernel: str, tokens: int) -> list[Timing]:
        return [t for t in timings if t.kernel == kernel and t.tokens == tokens and t.by == OURS]

    def slowest(kernel: str, tokens: int) -> float:
        return min((t.tflops for t in ours(kernel, tokens)), default=0.0)

    def moves(kernel: str, tokens: int) -> float:
        return min((t.bandwidth / ceilings.copy for t in ours(kernel, tokens)), default=0.0)

    def against(kernel: str, tokens: int, rival: str) -> float:
        pairs = [
            r.seconds / t.seconds
            for t in ours(kernel, tokens)
            for r in timings
            if (r.kernel, r.tokens, r.shape, r.by) == (kernel, tokens, t.shape, rival)
        ]
        return min(pairs, default=0.0)

    return [
        Bar("bf16 gmm, 131k rows", slowest("gmm", 16384), 600, "TFLOP/s"),
        Bar("bf16 gmm, 131k rows, over torch._grouped_mm", against("gmm", 16384, "torch"), 1, "x"),
        Bar("bf16 input gradient, 131k rows", slowest("gmm_t", 16384), 600, "TFLOP/s"),
        Bar("bf16 input gradient, 131k rows, over torch._grouped_mm", against("gmm_t", 16384, "torch"), 1, "x"),
        Bar("bf16 gmm, 4k tokens", slowest("gmm", 4096), 450, "TFLOP/s"),
        Bar("bf16 weight gradient, 131k rows", slowest("tgmm", 16384), 500, "TFLOP/s"),
        Bar("fp8 gmm, 131k rows", slowest("gmm_fp8", 16384), 1000, "TFLOP/s"),
        Bar("decode, 64 tokens, of the copy bandwidth", moves("gmm_decode", 64), 0.80, "x"),
        Bar("permute, 16k tokens, of the copy bandwidth", moves("permute", 16384), 0.85, "x"),
        Bar("quantize, 16k tokens, of the copy bandwidth", moves("quantize", 16384), 0.85, "x"),
        Bar("quantize and permute, 16k tokens, of the copy bandwidth", moves("quantize_permute", 16384), 0.85, "x"),
    ]


def routed(tokens: int, seed: int = 0) -> np.ndarray:
    """Rows of each expert: `CHOICES` different ones for every token, some experts liked more."""
    random = np.random.default_rng(seed)
    liking = np.log(random.dirichlet(np.full(EXPERTS, 20.0)))
    noise = random.gumbel(size=(tokens, EXPERTS))
    chosen = np.argpartition(-(liking + noise), CHOICES, axis=1)[:, :CHOICES]
    return np.bincount(chosen.ravel(), minlength=EXPERTS).astype(np.int32)


@dataclass
class Run:
    """What one run measures."""

    device: str
    ceilings: Ceilings
    repeats: int
    timings: list[Timing] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def time(
        self, kernel: str, by: str, tokens: int, shape: str, call: Callable[[int], Any], *, flops: float,
        moved: float, graph: bool = False,
    ) -> None:  # fmt: skip
        """Times call(i), i a running number with which it can rotate its inputs; a failure is kept and shown."""
        try:
            seconds = (graph_seconds if graph else median_seconds)(call, self.repeats)
        except Exception as error:
            self.failures.append(f"{kernel} by {by}, {tokens} tokens, {shape}: {str(error).splitlines()[0][:200]}")
            return
        timing = Timing(kernel, by, tokens, shape, seconds, flops, moved)
        self.timings.append(timing)
        floor = self.ceilings.seconds(flops, moved, fp8=kernel == "gmm_fp8")
        print(
            f"{kernel:17} {by:9} {tokens:6} {shape:10} {1e6 * seconds:9.1f} us {timing.tflops:7.0f} TFLOP/s "
            f"{timing.bandwidth:5.2f} TB/s  {floor / seconds:4.0%} of the floor",
            flush=True,
        )


def median_seconds(call: Callable[[int], Any], repeats: int) -> float:
    """Of `repeats` launches, each between two events, after five more."""
    import torch

    for i in range(5):
        call(i)
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (before, after) in enumerate(events):
        before.record()
        call(i)
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) / 1e3


def graph_seconds(call: Callable[[int], Any], repeats: int, calls: int = 12) -> float:
    """Of one launch in a CUDA graph of `calls`: for kernels that end before Python can launch the next one."""
    import torch

    call(0)  # modules load before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return median_seconds(lambda i: graph.replay(), repeats) / calls


def measure_ceilings(repeats: int) -> Ceilings:
    import torch

    size = 4 << 30
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * size / median_seconds(lambda i: target.copy_(source), repeats) / 1e12
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * size**3 / median_seconds(lambda i: a @ b, repeats) / 1e12
    fp8 = 0.0
    try:
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device="cuda")
        call = lambda i: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)  # noqa: E731
        fp8 = 2 * size**3 / median_seconds(call, repeats) / 1e12
    except (AttributeError, RuntimeError) as error:
        print(f"no fp8 ceiling: {error}")
    return Ceilings(copy, bf16, fp8)


def products(run: Run, tokens: int, rivals: bool) -> None:
    """gmm, gmm_t, tgmm in bf16, and gmm_fp8, of both of a layer's shapes."""
    import torch

    from kernels_cuda import torch_binding as ops

    counts = routed(tokens)
    rows, used = int(counts.sum()), int((counts > 0).sum())
    sizes = torch.from_numpy(counts).cuda()
    ends = torch.cumsum(sizes, 0).to(torch.int32)
    for k, n in (GATE_UP, DOWN):
        shape, flops = f"{k}x{n}", 2.0 * rows * k * n
        x, g = (torch.randn(rows, width, device="cuda").to(torch.bfloat16) for width in (k, n))
        w = torch.randn(EXPERTS, k, n, device="cuda", dtype=torch.bfloat16)
        weights = 2.0 * used * k * n
        moved = {"gmm": weights + 2.0 * rows * (k + n), "tgmm": 2.0 * EXPERTS * k * n + 2.0 * rows * (k + n)}

        def time(kernel: str, by: str, call: Callable[[int], Any], key: str = "gmm") -> None:
            run.time(kernel, by, tokens, shape, call, flops=flops, moved=moved[key])  # noqa: B023

        time("gmm", OURS, lambda i: ops.gmm(x, w, sizes))  # noqa: B023
        time("gmm_t", OURS, lambda i: ops.gmm_t(g, w, sizes))  # noqa: B023
        time("tgmm", OURS, lambda i: ops.tgmm(x, g, sizes, EXPERTS), "tgmm")  # noqa: B023
        if rivals:
            grouped = torch._grouped_mm
            time("gmm", "torch", lambda i: grouped(x, w, offs=ends))  # noqa: B023
            time("gmm_t", "torch", lambda i: grouped(g, w.transpose(1, 2), offs=ends))  # noqa: B023
            time("tgmm", "torch", lambda i: grouped(x.t(), g, offs=ends), "tgmm")  # noqa: B023
            triton_product(run, time, x, w, ends)
            jax_products(run, tokens, shape, x, w, sizes, flops, moved["gmm"])
        fp8_product(run, tokens, shape, x, w, sizes, flops, used)


def triton_product(run: Run, time: Callable[..., None], x: Any, w: Any, ends: Any) -> None:
    try:
        from kernels_cuda.benchmarks import triton_gmm
    except ImportError as error:
        run.failures.append(f"Triton: {error}")
        return
    time("gmm", "triton", lambda i: triton_gmm.gmm(x, w, ends))


def fp8_product(run: Run, tokens: int, shape: str, x: Any, w: Any, sizes: Any, flops: float, used: int) -> None:
    import torch

    from kernels_cuda import torch_binding as ops

    values, scales = ops.quantize_e4m3(x)
    (rows, k), n = x.shape, w.shape[2]
    w8 = (w.transpose(1, 2) * 50).clamp(-448, 448).to(torch.float8_e4m3fn).contiguous()
    w_scales = torch.rand(EXPERTS, -(-n // 128), -(-k // 128), device="cuda") + 0.5
    moved = 1.0 * used * k * n + rows * (k + k / 32 + 2.0 * n)
    call = lambda i: ops.gmm_fp8(values, scales, w8, w_scales, sizes)  # noqa: E731
    run.time("gmm_fp8", OURS, tokens, shape, call, flops=flops, moved=moved)


def jax_products(
    run: Run, tokens: int, shape: str, x: Any, w: Any, sizes: Any, flops: float, moved: float
) -> None:  # fmt: skip
    """The same arrays through JAX: our operator, CUTLASS where it is built, and lax.ragged_dot."""
    import time as clock

    import torch

    try:
        import jax

        if jax.default_backend() != "gpu":
            raise RuntimeError("JAX sees no GPU")
    except (ImportError, RuntimeError) as error:
        run.failures.append(f"JAX: {error}")
        return
    from kernels_cuda import jax_binding

    torch.cuda.synchronize()
    arrays = [jax.dlpack.from_dlpack(tensor) for tensor in (x, w, sizes)]
    candidates: dict[str, Callable[..., Any]] = {
        "jax": jax_binding.gmm,
        "cutlass": lambda *a: jax_binding.gmm(*a, by="cutlass"),
        "ragged": lambda a, b, s: jax.lax.ragged_dot(a, b, s, preferred_element_type=jax.numpy.bfloat16),
    }
    for by, function in candidates.items():
        if by == "cutlass" and not has_cutlass():
            continue
        try:
            step = jax.jit(function)
            step(*arrays).block_until_ready()
            # JAX has no events: a queue of launches between two waits.
            started = clock.perf_counter()
            for _ in range(run.repeats):
                out = step(*arrays)
            out.block_until_ready()
            seconds = (clock.perf_counter() - started) / run.repeats
        except Exception as error:
            run.failures.append(f"gmm by {by}, {tokens} tokens, {shape}: {str(error).splitlines()[0][:200]}")
            continue
        timing = Timing("gmm", by, tokens, shape, seconds, flops, moved)
        run.timings.append(timing)
        print(f"{'gmm':17} {by:9} {tokens:6} {shape:10} {1e6 * seconds:9.1f} us {timing.tflops:7.0f} TFLOP/s")


def has_cutlass() -> bool:
    from kernels_cuda import library

    return hasattr(library.load("cuda").handle, "mjk_ffi_gmm_cutlass")


def decode(run: Run, tokens: int) -> None:
    """Few rows: every weight that is used is read once, and little else."""
    import torch

    from kernels_cuda import torch_binding as ops

    counts = routed(tokens)
    rows, used = int(counts.sum()), int((counts > 0).sum())
    sizes = torch.from_numpy(counts).cuda()
    for k, n in (GATE_UP, DOWN):
        x = torch.randn(rows, k, device="cuda").to(torch.bfloat16)
        # Sets that together are far larger than the L2 cache, in turn.
        w = [torch.randn(EXPERTS, k, n, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        moved, flops = 2.0 * used * k * n + 2.0 * rows * (k + n), 2.0 * rows * k * n
        call = lambda i: ops.gmm_decode(x, w[i % 3], sizes)  # noqa: E731, B023
        run.time("gmm_decode", OURS, tokens, f"{k}x{n}", call, flops=flops, moved=moved, graph=True)


def rows(run: Run, tokens: int) -> None:
    """The kernels that move rows; bytes are each input and output once."""
    import torch

    from kernels_cuda import torch_binding as ops

    hidden, width = GATE_UP[0], GATE_UP[1] // 2
    many = tokens * CHOICES
    x = torch.randn(tokens, hidden, device="cuda").to(torch.bfloat16)
    order = torch.randperm(many, device="cuda")
    index = (order // CHOICES).to(torch.int32)
    back = torch.argsort(order).to(torch.int32).reshape(tokens, CHOICES)
    y = torch.randn(many, hidden, device="cuda").to(torch.bfloat16)
    weight = torch.rand(tokens, CHOICES, device="cuda")
    gate_up = torch.randn(many, 2 * width, device="cuda").to(torch.bfloat16)
    d_out = torch.randn(many, width, device="cuda").to(torch.bfloat16)
    shape, time, row = f"{hidden}", run.time, 2.0 * hidden
    # Each row moves once: a gather of every token's row CHOICES times would read the cache and not memory.
    everywhere = order.to(torch.int32)
    time("permute", OURS, tokens, shape, lambda i: ops.permute(y, everywhere), flops=0, moved=2 * many * row)
    time("gather", OURS, tokens, shape, lambda i: ops.permute(x, index), flops=0, moved=(tokens + many) * row)
    time(
        "unpermute", OURS, tokens, shape, lambda i: ops.unpermute(y, back, weight), flops=0, moved=(tokens + many) * row
    )
    quantized = many * (row + hidden * (1 + 4 / 128))
    time("quantize", OURS, tokens, shape, lambda i: ops.quantize_e4m3(y), flops=0, moved=quantized)
    permuted = lambda i: ops.quantize_e4m3(y, everywhere)  # noqa: E731
    time("quantize_permute", OURS, tokens, shape, permuted, flops=0, moved=quantized)
    time("swiglu", OURS, tokens, f"{width}", lambda i: ops.swiglu(gate_up), flops=0, moved=6.0 * many * width)
    time(
        "swiglu_grad", OURS, tokens, f"{width}", lambda i: ops.swiglu_grad(gate_up, d_out, None), flops=0,
        moved=10.0 * many * width,
    )  # fmt: skip


def table(checked: list[Bar]) -> str:
    lines = [f"{'bar':58} {'measured':>9} {'wanted':>7}"]
    for bar in checked:
        digits = 2 if bar.unit == "x" else 0
        verdict = "pass" if bar.passed else "FAIL"
        lines.append(f"{bar.what:58} {bar.measured:9.{digits}f} {bar.wanted:7.{digits}f} {bar.unit:8} {verdict}")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--repeats", type=int, default=30, help="timed launches of each kernel (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS), help="default: %(default)s")
    parser.add_argument("--no-rivals", action="store_true", help="our kernels alone")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from kernels_cuda import library

    found = library.load("cuda")
    if found.handle is None:
        print(f"the CUDA kernels are {found.problem}", file=sys.stderr)
        return 2
    try:
        import torch
    except ImportError:
        print("the benchmark needs torch", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no CUDA GPU is there", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    run = Run(name, measure_ceilings(options.repeats), options.repeats)
    ceilings = run.ceilings
    print(f"{name}: copy {ceilings.copy:.2f} TB/s, dense bf16 {ceilings.bf16:.0f}, fp8 {ceilings.fp8:.0f} TFLOP/s")
    for tokens in options.tokens:
        products(run, tokens, not options.no_rivals)
    for tokens in (1, 8, 64):
        decode(run, tokens)
    rows(run, 16384)
    print(*(f"failed: {failure}" for failure in run.failures), sep="\n")
    checked = bars(run.timings, ceilings)
    print(table(checked))
    if options.json:
        results = [asdict(t) | {"tflops": t.tflops, "tb_per_s": t.bandwidth} for t in run.timings]
        report = {"device": name, "ceilings": asdict(ceilings), "timings": results, "failures": run.failures}
        report["bars"] = [asdict(bar) | {"passed": bar.passed} for bar in checked]
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(bar.passed for bar in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
