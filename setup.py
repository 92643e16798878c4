"""Builds the native library with CMake; all other metadata is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HAS_NVCC = bool(os.environ.get("CUDACXX") or shutil.which("nvcc"))


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt; MGRPO_CMAKE_ARGS adds to its configuration."""

    def build_extension(self, ext: Extension) -> None:
        """Build all native modules of the project into the package, at the call for the first."""
        import pybind11

        if ext is not self.extensions[0]:
            return

        # First beside the interpreter, because an environment that is not activated is not on the PATH.
        cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if cmake is None:
            raise SystemExit("setup.py: cmake must be on the PATH, got none. pip install cmake.")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        work = Path(self.build_temp).resolve()
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(work),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DMGRPO_CUDA={'ON' if HAS_NVCC else 'OFF'}",
            *os.environ.get("MGRPO_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(work), "--parallel", str(os.cpu_count() or 1)], check=True)


# Without a compiler, MGRPO_SKIP_NATIVE=1 installs only Python: the reference backend then runs everything.
skip = os.environ.get("MGRPO_SKIP_NATIVE") == "1"
names = [] if skip else ["_C", "_C_cuda"] if HAS_NVCC else ["_C"]
setup(
    ext_modules=[Extension(f"mgrpo_kernels.{name}", sources=[]) for name in names], cmdclass={"build_ext": CMakeBuild}
)
