"""Rooms stay small: how many modules a folder holds, and how long a module, a class and a function may be."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.support.sources import PACKAGES, SOURCES

MOST_MODULES = 20
MOST_MODULES_AT_THE_TOP = 15
LONGEST_MODULE = 450
LONGEST_CLASS = 300
MOST_METHODS = 25
LONGEST_FUNCTION = 50

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions() -> Iterator[tuple[str, Definition]]:
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, Definition):
                yield f"{module}.{node.name}", node


def length(node: Definition) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def methods(node: ast.ClassDef) -> int:
    """Methods that have a body; overloads say only what one of them takes."""
    own = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    return sum(all("overload" not in ast.unparse(mark) for mark in each.decorator_list) for each in own)


def test_no_folder_holds_more_modules_than_one_can_remember() -> None:
    per_folder = Counter(path.parent for path in SOURCES.values() if path.name not in ("__init__.py", "__main__.py"))
    tops: set[Path] = set(PACKAGES.values())
    wrong = {
        str(folder): count
        for folder, count in per_folder.items()
        if count > (MOST_MODULES_AT_THE_TOP if folder in tops else MOST_MODULES)
    }
    assert wrong == {}


def test_no_two_modules_have_the_same_name() -> None:
    names = Counter(path.stem for path in SOURCES.values() if path.name not in ("__init__.py", "__main__.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_two_public_classes_have_the_same_name() -> None:
    names = Counter(node.name for _, node in definitions() if isinstance(node, ast.ClassDef) and node.name[0] != "_")
    assert [name for name, count in names.items() if count > 1] == []


def test_no_module_is_longer_than_one_reading() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in SOURCES.items()}
    assert {module: count for module, count in lengths.items() if count > LONGEST_MODULE} == {}


def test_no_class_hides_a_second_one() -> None:
    classes = [(name, node) for name, node in definitions() if isinstance(node, ast.ClassDef)]
    assert {name: length(node) for name, node in classes if length(node) > LONGEST_CLASS} == {}
    assert {name: methods(node) for name, node in classes if methods(node) > MOST_METHODS} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    functions = [(name, node) for name, node in definitions() if not isinstance(node, ast.ClassDef)]
    assert {name: length(node) for name, node in functions if length(node) > LONGEST_FUNCTION} == {}
