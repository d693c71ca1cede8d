"""The compiled kernels give the same bytes on other processors: x86-64 with and without AVX2, aarch64 under qemu-user.

Guards `weights.compiled`. The driver beside this file runs every method on numbers of every size; needs a C compiler,
and for aarch64 a cross compiler (`gcc-aarch64-linux-gnu`, or `pip install ziglang`) and `qemu-user`.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("kernels.c")
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
"""Those of native/CMakeLists.txt."""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def built(folder: Path, name: str, *command: str, option: str = "-O3") -> Path:
    target = folder / name
    subprocess.run([*command, *FLAGS, option, str(DRIVER), "-o", str(target), "-lm"], check=True, capture_output=True)
    return target


def told(*command: str | Path) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def cross_compilers() -> dict[str, list[str]]:
    """Those that build for aarch64 here."""
    found = {}
    if shutil.which("aarch64-linux-gnu-gcc"):
        found["gcc"] = ["aarch64-linux-gnu-gcc", "-static"]
    if importlib.util.find_spec("ziglang"):
        found["clang"] = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    lines = told(built(tmp_path_factory.mktemp("native"), "native", "cc"))
    assert len(lines) == 1 + 5 * 3 * 3 * 3
    assert len({line.split()[-6] for line in lines[1:]}) > 100  # digests that differ
    assert all(line.endswith(" 0 0") for line in lines[1:])  # all results are finite
    return lines


def test_the_driver_is_compiled_like_the_kernels() -> None:
    text = (DRIVER.parents[2] / "native" / "CMakeLists.txt").read_text()
    options = re.search(r"target_compile_options\(\$\{name\} PRIVATE ([^)]*)", text)
    assert options is not None
    assert set(FLAGS) - {"-std=c11"} <= set(options[1].split())
    assert "CMAKE_C_STANDARD 11" in text
    assert "CMAKE_C_EXTENSIONS OFF" in text


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64")
@pytest.mark.parametrize("option", ["-march=x86-64-v3", "-march=x86-64", "-O1"])
def test_every_way_to_compile_gives_the_same_bytes(expected: list[str], tmp_path: Path, option: str) -> None:
    if "v3" in option and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("no AVX2 here")
    assert told(built(tmp_path, "other", "cc", option=option)) == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="no qemu-user")
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_aarch64_gives_the_same_bytes(expected: list[str], tmp_path: Path, compiler: str) -> None:
    found = cross_compilers()
    if compiler not in found:
        pytest.skip(f"no {compiler} for aarch64")
    assert told("qemu-aarch64", built(tmp_path, "arm", *found[compiler])) == expected


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_compiler_for_aarch64_contracts_nothing(tmp_path: Path, compiler: str) -> None:
    """With contraction left to it, it would put more fused multiply-adds there than the source spells out."""
    found = cross_compilers()
    if compiler not in found:
        pytest.skip(f"no {compiler} for aarch64")
    counts = []
    for contract in ("off", "fast"):
        target = tmp_path / f"{contract}.s"
        flags = [flag for flag in FLAGS if "contract" not in flag]
        command = [*found[compiler], *flags, f"-ffp-contract={contract}", "-S", str(DRIVER), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True)
        counts.append(len(re.findall(r"\bf(?:n?madd|n?msub|mla|mls)\b", target.read_text())))
    assert 0 < counts[0] < counts[1]
