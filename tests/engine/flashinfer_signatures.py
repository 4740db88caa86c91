"""Writes down how flashinfer is called, from its wheels, which need not be installed:

pip download --no-deps flashinfer-python==0.7.4
python -m tests.engine.flashinfer_signatures flashinfer_python-*.whl
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLASS, METHODS = "BatchPrefillWithPagedKVCacheWrapper", ("__init__", "plan", "run")


def methods(source: str) -> Iterator[ast.FunctionDef]:
    """Of the class; not the overloads for type checkers."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == CLASS:
            for each in node.body:
                overload = [
                    d for d in getattr(each, "decorator_list", []) if "overload" in ast.unparse(d)
                ]
                if isinstance(each, ast.FunctionDef) and each.name in METHODS and not overload:
                    yield each


def parameters(arguments: ast.arguments) -> Iterator[dict[str, Any]]:
    """As inspect.Parameter takes them."""
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    for number, each in enumerate(positional):
        default = arguments.defaults[number - required] if number >= required else None
        yield row(each, "POSITIONAL_OR_KEYWORD", default)
    if arguments.vararg is not None:
        yield row(arguments.vararg, "VAR_POSITIONAL", None)
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield row(each, "KEYWORD_ONLY", default)


def row(name: ast.arg, kind: str, default: ast.expr | None) -> dict[str, Any]:
    told = {"name": name.arg, "kind": kind}
    return told if default is None else {**told, "default": ast.literal_eval(default)}


def main() -> None:
    found = {}
    for wheel in sys.argv[1:]:
        source = zipfile.ZipFile(wheel).read("flashinfer/prefill.py").decode()
        version = Path(wheel).name.split("-")[1]
        found[version] = {each.name: list(parameters(each.args)) for each in methods(source)}
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
