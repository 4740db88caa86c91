"""Collects the wheels that a host without a network needs, beside a torch that is there already:

    make cuda-wheels DIR=wheels TARGET_PYTHON=3.12      where there is a network
    make WHEELS=wheels cuda-check                       there, with g++ 12 or newer

What `kvc2`, its engine, the extra `cuda`, their build and the checks ask for, but torch and what
torch brings with it; for x86-64 and glibc 2.31 or later, which llguidance asks for; as many bytes
as it prints. requirements.txt in the folder lists what is installed there, without flashinfer, most
of whose own requirements are left out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests import ROOT

# torch is there, and with it these; transformers too, where models run
THERE = {"torch", "transformers", "safetensors", "tokenizers", "numpy", "jinja2"}
EXTRAS = ("engine", "cuda")
BUILD = ("scikit-build-core", "pybind11", "cmake", "ninja")
CHECKS = ("pytest", "httpx", "psutil", "openai", "pytest-timeout", "pytest-xdist", "hypothesis")
# flashinfer asks for compilers of kernels that we don't use; it imports and attends with these
# (0.6.13 and 0.7.4). 0.6.13 is the last small one, and the last with prebuilt kernels.
FLASHINFER = "flashinfer-python==0.6.13"
PLATFORMS = ("manylinux_2_31", "manylinux_2_28", "manylinux2014")
FOR_FLASHINFER = ("apache-tvm-ffi", "einops", "tabulate", "requests", "tqdm", "packaging", "ninja")


def wanted() -> list[str]:
    """Requirements, as pip takes them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(each for name in EXTRAS for each in extras[name])]
    asked += [each for each in extras["dev"] if name_of(each) in {*BUILD, *CHECKS}]
    kept = [each for each in asked if name_of(each) not in {*THERE, "flashinfer-python"}]
    return [*kept, *FOR_FLASHINFER]


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower()


def download(folder: Path, python: str, *words: str) -> None:
    platform = ["--only-binary", ":all:", "--python-version", python]
    platform += [word for tag in PLATFORMS for word in ("--platform", f"{tag}_x86_64")]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    subprocess.run([*pip, *platform, "-c", str(ROOT / "constraints.txt"), *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the host, as 3.12")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    download(asked.folder, asked.python, *wanted())
    download(asked.folder, asked.python, "--no-deps", FLASHINFER)
    for wheel in asked.folder.iterdir():
        if name_of(wheel.name).split("-")[0] in THERE:
            wheel.unlink()
    (asked.folder / "requirements.txt").write_text("\n".join([*wanted(), ""]))
    sizes = {each.name: each.stat().st_size for each in sorted(asked.folder.iterdir())}
    for name, size in sizes.items():
        print(f"{size:12,}  {name}")
    print(f"{sum(sizes.values()):12,}  {len(sizes)} files")


if __name__ == "__main__":
    main()
