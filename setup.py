"""Builds the merge kernels, which pyproject.toml cannot say yet; without a C compiler torch does their work."""

import platform

from setuptools import Extension, setup

FLAGS = ["-g0", "-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def library(name: str, *flags: str) -> Extension:
    """The same source, compiled for some kind of processor."""
    return Extension(
        f"safemerge_recipes.weights.{name}",
        ["native/merge.c"],
        extra_compile_args=[*FLAGS, *flags],
        libraries=["m"],
        optional=True,
    )


libraries = [library("_merge")]
if platform.machine() in ("x86_64", "AMD64"):
    libraries.append(library("_merge_v3", "-march=x86-64-v3"))
setup(ext_modules=libraries)
