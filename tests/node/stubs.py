"""CUDA libraries that only say no, so that the image can be tested without 3 GB of real ones.

torch from PyPI links against cuBLAS, cuDNN, NCCL and more, and can't be imported without them,
though a CPU never calls them. For the test image these packages are left out (see
``requirements/image-cpu.txt``), and its base image gets libraries with the same names and
symbols, each a function that returns 1: an error, in every one of those libraries. The CUDA
runtime itself is real (it is small), and says that there is no driver.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LIBRARIES = "cublas cublasLt cudnn cufft cusolver cusparse cusparseLt nccl nvrtc nvshmem_host"


def _symbols(library: Path) -> list[tuple[str, str, bool]]:
    """Return (name, version, is it a function) of everything that ``library`` exports."""
    command = ["nm", "-D", "--defined-only", "--with-symbol-versions", str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    split = [line.split()[-2:] for line in lines]
    named = [(kind, *one.partition("@@")) for kind, one in split if kind != "A"]
    return [(name, version, kind in "TWi") for kind, name, _, version in named]


def _assembly(symbols: list[tuple[str, str, bool]]) -> str:
    code = [f".globl {n}\n.type {n},@function\n{n}:" for n, _, call in symbols if call]
    data = [
        f".globl {n}\n.type {n},@object\n.size {n},64\n{n}: .zero 64"
        for n, _, c in symbols
        if not c
    ]
    return "\n".join([".text", *code, "mov $1,%eax", "ret", ".data", *data, ""])


def make_stub(library: Path, folder: Path) -> Path:
    """Write a library with the name and the symbols of ``library`` into ``folder``."""
    symbols = _symbols(library)
    source = folder / f"{library.name}.s"
    source.write_text(_assembly(symbols))
    names: dict[str, list[str]] = {}
    for name, version, _ in symbols:
        names.setdefault(version, []).append(name)
    script = folder / f"{library.name}.map"
    script.write_text("".join(f"{v} {{ {'; '.join(n)}; }};\n" for v, n in names.items() if v))
    versions = [f"-Wl,--version-script={script}"] if any(names) else []
    out = folder / library.name
    link = ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{library.name}", *versions]
    subprocess.run([*link, "-o", str(out), str(source)], check=True)
    source.unlink()
    script.unlink()
    return out


def make_stubs(site_packages: Path, folder: Path) -> list[Path]:
    """Write stubs for the CUDA libraries under ``site_packages/nvidia`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    pattern = re.compile(rf"^lib({'|'.join(LIBRARIES.split())})\.so\.\d+$")
    found = sorted((site_packages / "nvidia").rglob("*.so.*"))
    return [make_stub(one, folder) for one in found if pattern.match(one.name)]


if __name__ == "__main__":
    for made in make_stubs(Path(sys.argv[1]), Path(sys.argv[2])):
        print(made)
