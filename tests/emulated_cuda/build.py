"""Builds the emulated libraries: every symbol of the installed ones is there, so that everything links.

A symbol that device/*.cpp defines does something. Every other one says its name and fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "device"
STRINGS = ".section .rodata"


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's libraries: where pip has the real one, and what it is called when it is loaded."""

    source: str
    real: str
    name: str
    needs: tuple[str, ...] = ()


LIBRARIES = (
    Library("cudart", "cu13/lib/libcudart.so.13", "libcudart.so.13"),
    Library("cublaslt", "cu13/lib/libcublasLt.so.13", "libcublasLt.so.13"),
    Library("cublas", "cu13/lib/libcublas.so.13", "libcublas.so.13"),
    Library("nccl", "nccl/lib/libnccl.so.2", "libnccl.so.2", ("libcudart.so.13",)),
)
DRIVER = Library("cuda", "", "libcuda.so.1", ("libcudart.so.13",))
"""No package brings the driver: its calls are read from cuda.h."""


def packages_folder() -> Path:
    """Where NVIDIA's pip packages are."""
    return Path(sysconfig.get_path("purelib")) / "nvidia"


def symbols_of(library: Path) -> dict[str, str]:
    """Functions that the library offers, and the version of each, which may be empty."""
    listed = _output(["nm", "-D", "--defined-only", str(library)])
    symbols = {}
    for line in listed.splitlines():
        kind, name = line.split()[-2:]
        plain, _, version = name.partition("@")
        if kind in "TWti" and not plain.startswith("_Z"):
            symbols[plain] = version.lstrip("@")
    return symbols


def calls_of_driver(include: Path) -> dict[str, str]:
    """Every function that cuda.h declares; none has a version."""
    header = str(include / "cuda.h")
    declared = _output(
        ["gcc", "-E", "-P", "-I", str(include), "-D__CUDA_API_VERSION_INTERNAL", "-x", "c", header]
    )
    return dict.fromkeys(
        re.findall(r"\bCUresult\s+(?:__attribute__\(\(\w+\)\)\s*)?(cu\w+)\s*\(", declared), ""
    )


def jumps(names: list[str]) -> str:
    """Assembly in which each name says itself to the library's own emulated_unanswered."""
    text, strings = [".text"], [STRINGS]
    for i, name in enumerate(names):
        text += [f".globl {name}", f".type {name},@function", f"{name}:"]
        text += [f"  leaq .Lname{i}(%rip), %rdi", "  jmp emulated_unanswered"]
        strings += [f'.Lname{i}: .string "{name}"']
    return "\n".join([*text, *strings, '.section .note.GNU-stack,"",@progbits', ""])


def build(folder: Path) -> list[str]:
    """Compile all libraries into the folder; returns one line about each.

    Raises subprocess.CalledProcessError where a compiler fails, FileNotFoundError where a library is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packages = packages_folder()
    include = [packages / "cu13/include", packages / "nccl/include", SOURCES]
    lines = []
    for library in (*LIBRARIES, DRIVER):
        real = packages / library.real
        if library.real and not real.exists():
            raise FileNotFoundError(f"{real}: pip install torch, in its build for CUDA 13")
        symbols = symbols_of(real) if library.real else calls_of_driver(include[0])
        lines.append(_compile(library, symbols, include, folder))
    return lines


def _compile(library: Library, symbols: dict[str, str], include: list[Path], folder: Path) -> str:
    compiled = folder / f"{library.source}.o"
    command = ["g++", "-c", "-fPIC", "-O2", "-std=c++17", "-Wall", "-Wno-deprecated-declarations"]
    command += [f"-I{path}" for path in include]
    subprocess.run([*command, str(SOURCES / f"{library.source}.cpp"), "-o", str(compiled)], check=True)
    defined = _output(["nm", "--defined-only", str(compiled)])
    own = {line.split()[-1] for line in defined.splitlines() if line.split()[-2] == "T"}
    rest = folder / f"{library.source}.s"
    rest.write_text(jumps(sorted(symbols.keys() - own)))
    options = ["-shared", f"-Wl,-soname,{library.name}", "-o", str(folder / library.name), "-ldl"]
    versions = sorted({version for version in symbols.values() if version})
    if versions:
        script = folder / f"{library.source}.map"
        by_version = {version: [n for n in sorted(symbols) if symbols[n] == version] for version in versions}
        lines = [f"{version} {{ global: {'; '.join(names)}; }};" for version, names in by_version.items()]
        script.write_text("\n".join(lines) + "\n")
        options.append(f"-Wl,--version-script={script}")
    options += [str(folder / needed) for needed in library.needs]
    subprocess.run(["g++", str(compiled), str(rest), *options], check=True)
    return f"{library.name}: {len(symbols)} calls, {len(own & symbols.keys())} emulated"


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print("\n".join(build(Path(sys.argv[1]))))
