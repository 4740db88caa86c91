"""The files of the house, what they import, how large their classes are: for the tests that judge
where things stand. `python -m tests.house` prints the counts."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests import ROOT

CLASS_MAX = (250, 25, 14)  # lines, methods, attributes: what fits a head


def python_files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if "v1" not in path.relative_to(ROOT).parts]


def cpp_files() -> list[Path]:
    folders = (ROOT / "csrc", ROOT / "tests" / "cpp", ROOT / "tests" / "cuda" / "driver")
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix in {".h", ".cpp"}
    ]


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, also inside functions and TYPE_CHECKING."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


class Size(NamedTuple):
    """Of a class: its lines, its methods, and the attributes that it sets on self."""

    lines: int
    methods: int
    attributes: int


def classes(*folders: str) -> dict[str, Size]:
    """By `file: name`."""
    return {
        f"{identify(path)}: {node.name}": size_of(node)
        for path in python_files(*folders)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }


def size_of(node: ast.ClassDef) -> Size:
    methods = [
        each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    attributes = {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    }
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    return Size(lines, len(methods), len(attributes))


def none_assertions(*folders: str) -> list[str]:
    """`file:line` of each `assert x is not None`."""
    return [
        f"{identify(path)}:{node.lineno}"
        for path in python_files(*folders)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert) and "is not None" in ast.unparse(node.test)
    ]


def flat_files(*folders: str) -> Counter[str]:
    """Python files by the folder that they lie in, without __init__.py."""
    found = [path for path in python_files(*folders) if path.stem != "__init__"]
    return Counter(identify(path.parent) for path in found)


def main() -> None:
    """Print what the gates of test_tidy.py count."""
    found = classes("kvc2", "engine")
    print(f"{'lines':>5} {'methods':>8} {'attributes':>11}  large classes")
    for name, size in sorted(found.items(), key=lambda each: each[1], reverse=True):
        if any(count > most for count, most in zip(size, CLASS_MAX, strict=True)):
            print(f"{size.lines:5} {size.methods:8} {size.attributes:11}  {name}")
    for folder in ("kvc2", "engine"):
        print(f"{len(none_assertions(folder)):5} assertions of `is not None` in {folder}/")
    for folder, count in sorted(flat_files("kvc2", "engine", "tests").items()):
        print(f"{count:5} files flat in {folder}/")


if __name__ == "__main__":
    main()
