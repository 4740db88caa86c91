"""A pytest plugin: the extensions come from KVC2_EXTENSIONS, a build folder, not from the install.

`make asan` and `make tsan` name their own build there, so that the same tests run over the
sanitized C++ code; see tests/cpp/README.md for the command line.
"""

import importlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

BUILD = Path(os.environ["KVC2_EXTENSIONS"])
MODULES = {"kvc2._core": "_core", "engine._kernels": "_kernels"}


class BuiltExtensions(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        [library] = BUILD.glob(f"{MODULES[fullname]}.*.so")
        return importlib.util.spec_from_file_location(fullname, library)


sys.meta_path.insert(0, BuiltExtensions())


def pytest_report_header() -> str:
    """Where the core really came from, so that nobody trusts a run over the wrong build."""
    return f"kvc2._core: {importlib.import_module('kvc2._core').__file__}"
