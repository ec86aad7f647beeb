"""Compile the C library of keras_mml/native with zig, which pip installs for it. All else is in pyproject.toml.

KERAS_MML_TARGET names another machine than this one, as zig does, and KERAS_MML_PLATFORM its tag for wheels: see `make wheels`.
"""

import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = Path("keras_mml", "native")
TARGET, PLATFORM = os.environ.get("KERAS_MML_TARGET"), os.environ.get("KERAS_MML_PLATFORM")
WINDOWS = "windows" in TARGET if TARGET else sys.platform == "win32"
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # has no limited API: a binary for this version alone


class BuildWithZig(build_ext):
    def build_extension(self, extension):
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        build = runpy.run_path(str(NATIVE / "build.py"))
        try:
            build["compile_module"](extension.sources, output, TARGET)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            raise CompileError(str(error)) from error  # which an optional extension may raise

    def get_ext_filename(self, name):
        return str(Path(*name.split("."))) + (".pyd" if WINDOWS else ".so" if FREE_THREADED else ".abi3.so")


class Wheel(bdist_wheel):
    def get_tag(self):
        python, abi, platform = super().get_tag()
        return *((python, abi) if FREE_THREADED else ("cp311", "abi3")), PLATFORM or platform


sources = [str(path) for path in sorted(NATIVE.glob("*.c"))]
# Where it cannot be compiled, NumPy computes the same, slowly. A wheel for a machine that was named shall not be made without it.
module = Extension("keras_mml.native._native", sources, depends=[str(path) for path in NATIVE.glob("*.h")], optional=not TARGET)
setup(ext_modules=[module], cmdclass={"build_ext": BuildWithZig, "bdist_wheel": Wheel})
