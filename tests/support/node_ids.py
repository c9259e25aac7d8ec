"""The names of the tests in a file, for documents and tables that name tests."""

import ast
from functools import cache

from tests.support.serving import ROOT


@cache
def node_ids(file: str) -> frozenset[str]:
    """Node ids of the tests in a file, without parameters."""
    path = ROOT / file
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body if path.exists() else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(f"{file}::{node.name}")
        elif isinstance(node, ast.ClassDef):
            methods = (n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{file}::{node.name}::{method.name}" for method in methods}
    return frozenset(test for test in found if test.rpartition("::")[2].startswith("test_"))
