"""The CUDA library compiles as it should, loads without a GPU, and the JAX operators lower to it, wherever nvcc is."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_cuda import checks, library

MISSING = [name for name, path in {"nvcc": library.nvcc(), "cmake": shutil.which("cmake")}.items() if path is None]
needs_compiler = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}")

# What ptxas prints of a kernel, and what it adds where something is wrong.
REPORT = """
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {spills} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8336 bytes smem
"""
NAME = "_ZN3mjk12_GLOBAL__N_115grouped_productINS0_4FormILNS_7ProductE{}ELi2ELi256EEEEEv14CUtensorMap_stS5_NS_7ProblemE"


@pytest.fixture(scope="module")
def built() -> tuple[Path, str]:
    return checks.build("cuda")


def log(*, stack: int = 0, spills: int = 0, forms: int = 5) -> str:
    return "".join(REPORT.format(name=NAME.format(form), stack=stack, spills=spills) for form in range(forms))


def test_a_sound_log_has_no_problems() -> None:
    assert checks.compile_problems(log()) == []
    (first, *_) = checks.kernels(log())
    assert (first.name, first.registers, first.shared) == ("gmm 128x256", 168, 8336)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (log(spills=8), "8 bytes of spills"),
        (log(stack=16), "a stack frame of 16 bytes"),
        (log() + "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async", "wgmma is serialised"),
        (log() + "ptxas info : (C7508) setmaxnreg ignored", "setmaxnreg is ignored"),
        (log(forms=4), "no kernel for gmm_s8"),
    ],
)
def test_a_planted_problem_is_found(text: str, says: str) -> None:
    assert any(says in problem for problem in checks.compile_problems(text))


def test_machine_code_without_the_matrix_instructions_is_found() -> None:
    sound = {name: {opcode, checks.COPIES} for name, opcode in checks.INSTRUCTIONS.items()}
    assert checks.sass_problems(sound) == []
    assert checks.sass_problems(sound | {"gmm": {checks.COPIES}}) == ["gmm: no HGMMA in its machine code"]
    assert checks.sass_problems(sound | {"permute f32": {"STL"}}) == ["permute f32: STL, an access of local memory"]


@needs_compiler
def test_no_spills_and_no_serialised_products(built: tuple[Path, str]) -> None:
    assert checks.compile_problems(built[1]) == []


@needs_compiler
@pytest.mark.skipif(checks.tool("cuobjdump") is None, reason="no cuobjdump: it comes with the toolkit and with triton")
def test_machine_code_has_the_instructions(built: tuple[Path, str]) -> None:
    assert checks.sass_problems(checks.instructions(built[0])) == []


@needs_compiler
def test_exports_the_functions_of_the_header(built: tuple[Path, str]) -> None:
    assert {"mjk_gmm", "mjk_tgmm", "mjk_gmm_fp8", "mjk_swiglu_grad"} <= checks.declared()
    assert checks.symbol_problems(built[0]) == []


@needs_compiler
def test_loads_without_a_gpu_and_says_so(built: tuple[Path, str]) -> None:
    handle = ctypes.CDLL(str(built[0]), mode=ctypes.RTLD_LOCAL)
    handle.mjk_isa.restype = handle.mjk_last_error.restype = ctypes.c_char_p
    assert handle.mjk_isa() == b"sm_90a"
    assert handle.mjk_abi_version() == library.ABI_VERSION
    sizes = [ctypes.c_int64(size) for size in (128, 64, 64, 2, 2)]
    pointers = [ctypes.c_void_p(4096)] * 4
    # group_offset 1 and two groups of two: refused before a GPU is looked for.
    assert handle.mjk_gmm(None, 1, 1, *sizes, ctypes.c_int64(1), *pointers) == 1
    assert b"exceed the 2 group sizes" in handle.mjk_last_error()
    if not Path("/dev/nvidiactl").exists():
        assert handle.mjk_gmm(None, 1, 1, *sizes, ctypes.c_int64(0), *pointers) == 3
        assert b"no CUDA GPU is there" in handle.mjk_last_error()


LOWER = """
import jax, jax.numpy as jnp
from kernels_cuda import jax_binding as b
assert b.available("cuda")  # its handlers register without a GPU
def every(x, w, sizes, scale):
    y = b.gmm(x, w, sizes)
    values, scales = b.quantize_e4m3(x)
    out = [b.gmm_t(y, w, sizes), b.tgmm(x, y, sizes), b.permute(x, sizes), b.unpermute(x, sizes[:, None]),
           b.swiglu(x, scale), values.astype(jnp.float32), scales, *b.swiglu_grad(x, x[:, ::2], scale)]
    matrices, steps = w.swapaxes(1, 2).astype(jnp.float8_e4m3fn), jnp.ones((4, 2, 2))
    out.append(b.gmm_fp8(values, scales, matrices, steps, sizes))
    out.append(b.gmm_s8(x.astype(jnp.int8), scale, w.swapaxes(1, 2).astype(jnp.int8), jnp.ones((4, 256)), sizes))
    return out
shape = jax.ShapeDtypeStruct
arguments = (shape((64, 256), jnp.bfloat16), shape((4, 256, 256), jnp.bfloat16), shape((4,), jnp.int32),
             shape((64,), jnp.float32))
text = jax.jit(every).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
missing = [name for name in b.TARGETS if f"custom_call @mjk_{name}(" not in text]
assert not missing, missing
"""


@needs_compiler
def test_jax_lowers_every_operator_for_cuda(built: tuple[Path, str]) -> None:
    environment = os.environ | {"MINDJAX_KERNELS": str(built[0].parent), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", LOWER], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
