"""Compiles the CUDA kernels and checks what can be checked without a GPU: `python -m kernels_cuda.checks`.

Fails where ptxas serialises wgmma (C7510), ignores setmaxnreg (C7508) or spills registers, where a kernel lacks the
instructions it is written for, and where the library's symbols are not those of include/launch.h.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from kernels_cuda import library

PACKAGE = Path(__file__).resolve().parent
BUILD = PACKAGE.parent / "build"
POOL = {"mjk_pool_create", "mjk_pool_destroy"}  # of the CPU library alone
# What ptxas says when it makes a kernel slow, and what it means.
SLOW = {"C7510": "wgmma is serialised", "C7508": "setmaxnreg is ignored"}
# Template arguments of grouped_product in the order of enum Product, and the instruction each form must contain.
PRODUCTS = ("gmm", "gmm_t", "tgmm", "gmm_fp8", "gmm_s8")
INSTRUCTIONS = {"gmm": "HGMMA", "gmm_t": "HGMMA", "tgmm": "HGMMA", "gmm_fp8": "QGMMA", "gmm_s8": "IGMMA"}
COPIES = "UTMALDG"
# Types as C++ mangles them.
TYPES = {"13__nv_bfloat16": "bf16", "13__nv_fp8_e4m3": "e4m3", "5uint4": "16 bytes", "j": "4 bytes", "h": "1 byte"}
TYPES |= {"f": "f32", "a": "s8"}


@dataclass(frozen=True)
class Kernel:
    """One kernel's resources, as ptxas reports them; shared memory is the static part, in bytes."""

    name: str
    registers: int
    spills: int
    stack: int
    shared: int


def build(backend: str, folder: Path | None = None) -> tuple[Path, str]:
    """Builds "cuda" or "emulated" in build/<backend>, unless its sources are those of the last build.

    Returns:
      The library and the compiler's output, that of the last build where nothing has changed.

    Raises:
      RuntimeError: with the end of the output, where it does not build.
    """
    folder, target = folder or BUILD / backend, f"mindjax_{backend}"
    folder.mkdir(parents=True, exist_ok=True)
    log, stamp = folder / "compile.log", folder / "compile.stamp"
    where = folder / "cuda" / ("emulate" if backend == "emulated" else "") / f"lib{target}.so"
    digest = _digest()
    if stamp.is_file() and stamp.read_text() == digest and where.is_file():
        return where, log.read_text()
    configure = ["cmake", "-S", str(PACKAGE), "-B", str(folder), "-DMINDJAX_CUDA=ON"]
    configure.append(f"-DPython3_EXECUTABLE={sys.executable}")
    configure.append(f"-DMINDJAX_CUTLASS={os.environ.get('MINDJAX_CUTLASS', '')}")
    if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja"]
    compile_all = ["cmake", "--build", str(folder), "--target", target, "--clean-first", "--parallel", _jobs()]
    output = ""
    for command in (configure, compile_all):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output += result.stdout
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{output[-4000:]}")
    log.write_text(output)
    stamp.write_text(digest)
    return where, output


def _jobs() -> str:
    return str(min(8, os.cpu_count() or 1))


def _digest() -> str:
    """Of everything that the build reads."""
    paths = [PACKAGE / "CMakeLists.txt", *(PACKAGE / "cuda").rglob("*"), *(PACKAGE / "bindings").glob("*")]
    paths += (PACKAGE / "include").glob("*")
    digest = hashlib.sha256(f"{sys.executable} {os.environ.get('MINDJAX_CUTLASS')}".encode())
    for path in sorted(p for p in paths if p.is_file()):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()


def kernel_name(mangled: str) -> str:
    """A short name of a kernel: `gmm 128x256` from the mangled name of its template."""
    product = re.search(r"grouped_product.*ProductE(\d)ELi(\d)ELi(\d+)E", mangled)
    if product:
        form, consumers, columns = (int(group) for group in product.groups())
        return f"{PRODUCTS[form]} {64 * consumers}x{columns}"
    if "cutlass" in mangled:
        return "CUTLASS"
    names = "simt_product|quantize_any|quantize|unpermute|permute|swiglu_grad|swiglu"
    plain = re.search(rf"\d({names})I([a-z]|\d+[a-z_]+[0-9a-z_]*?\d?)(?:Li(\d)E)?EEv", mangled)
    if plain is None:
        return mangled
    name, letters, width = plain.groups()
    return f"{name} {TYPES.get(letters, letters)}{f' x {width}' if width else ''}"


def kernels(log: str) -> list[Kernel]:
    """Every kernel that ptxas reported, in a log of `-Xptxas -v`."""
    pattern = re.compile(
        r"Function properties for (\S+)\n"
        r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers([^\n]*)"
    )
    found = []
    for name, stack, stores, loads, registers, rest in pattern.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = int(stores) + int(loads)
        found.append(
            Kernel(kernel_name(name), int(registers), spills, int(stack), int(shared.group(1)) if shared else 0)
        )
    return sorted(found, key=lambda kernel: kernel.name)


def compile_problems(log: str) -> list[str]:
    """What the compiler's output says against the kernels."""
    problems = [f"{code}: {meaning}: {line.strip()}" for code, meaning in SLOW.items() for line in _lines(log, code)]
    reported = kernels(log)
    problems += [f"{k.name}: {k.spills} bytes of spills" for k in reported if k.spills]
    problems += [f"{k.name}: a stack frame of {k.stack} bytes" for k in reported if k.stack and not k.spills]
    missing = set(PRODUCTS) - {k.name.split()[0] for k in reported}
    return problems + [f"no kernel for {name} was compiled" for name in sorted(missing)]


def _lines(log: str, word: str) -> list[str]:
    return [line for line in log.splitlines() if word in line]


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on PATH, in CUDA_HOME, beside nvcc, or in Triton's package."""
    folders = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    triton = find_spec("triton")
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return next((found for path in (None, *folders) if (found := shutil.which(name, path=path))), None)


def instructions(path: Path) -> dict[str, set[str]]:
    """Kernel -> the opcodes of its machine code that have to do with tensor cores, tensor copies and spills."""
    cuobjdump = tool("cuobjdump")
    assert cuobjdump is not None
    sass = subprocess.run([cuobjdump, "--dump-sass", str(path)], capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in sass.splitlines():
        if "Function :" in line:
            current = found.setdefault(kernel_name(line.split(":", 1)[1].strip()), set())
        else:
            current.update(re.findall(rf"\b(HGMMA|QGMMA|IGMMA|{COPIES}|STL|LDL)\b", line))
    return found


def sass_problems(found: dict[str, set[str]]) -> list[str]:
    """Kernels without the instructions they are written for, or with accesses of local memory."""
    problems = []
    for name, opcodes in found.items():
        product = name.split()[0]
        wanted = {INSTRUCTIONS[product], COPIES} if product in INSTRUCTIONS else set()
        problems += [f"{name}: no {opcode} in its machine code" for opcode in sorted(wanted - opcodes)]
        problems += [f"{name}: {opcode}, an access of local memory" for opcode in sorted(opcodes & {"STL", "LDL"})]
    missing = set(INSTRUCTIONS) - {name.split()[0] for name in found}
    return problems + [f"no machine code of {name}" for name in sorted(missing)]


def declared() -> set[str]:
    """The functions of include/launch.h."""
    header = re.sub(r"//[^\n]*", "", (PACKAGE / "include" / "launch.h").read_text())
    return set(re.findall(r"MJK_API[\s\w*]*?\b(mjk_\w+)\s*\(", header))


def exported(path: Path) -> set[str]:
    """The functions of the C ABI that a library exports."""
    output = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return {name for name in re.findall(r" T (mjk_\w+)", output) if not re.match(r"mjk_ffi_|.*_cutlass$", name)}


def symbol_problems(path: Path) -> list[str]:
    wanted, found = declared() - POOL, exported(path)
    problems = [f"{name} is in launch.h and not in {path.name}" for name in sorted(wanted - found)]
    return problems + [f"{name} is in {path.name} and not in launch.h" for name in sorted(found - wanted)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, help="build folder (default: build/cuda)")
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    if library.nvcc() is None:
        print("no nvcc: put it in PATH or set CUDA_HOME", file=sys.stderr)
        return 2
    path, log = build("cuda", arguments.build)
    problems = compile_problems(log) + symbol_problems(path)
    if tool("cuobjdump"):
        problems += sass_problems(instructions(path))
    else:
        print("no cuobjdump: machine code not checked")
    table = kernels(log)
    print(f"{'kernel':32} registers  spills  static shared")
    for kernel in table:
        print(f"{kernel.name:32} {kernel.registers:9}  {kernel.spills:6}  {kernel.shared:13}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(kernel) for kernel in table], indent=1) + "\n")
    print("\n".join(problems) or f"{path}: no problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
