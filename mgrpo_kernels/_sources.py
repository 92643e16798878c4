"""Hashes of implementations without their comments, which identify the code that a GPU record is for.

Needs only Python. As a script, `python _sources.py FILE.cu...`, it prints a C++ table of the CUDA sources' hashes,
which the build compiles into the library.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import sys
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# Schemas and result types contain no arithmetic.
_WITHOUT_ARITHMETIC = ("ops.py", "results.py")
_CPP = re.compile(r"""//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')""", re.DOTALL)
_LENGTH = 16


def _digest(texts: Iterable[str]) -> str:
    """The first characters of SHA-256."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:_LENGTH]


def strip_python(source: str) -> str:
    """Source without comments, docstrings and blank lines, equal for all versions of Python."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for row in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def strip_cpp(source: str) -> str:
    """Source without comments and line breaks; quoted text stays."""
    return " ".join(_CPP.sub(lambda match: match.group(1) or " ", source).split())


def _imported(path: Path) -> set[Path]:
    """Files of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_PACKAGE.name):
            folder = _PACKAGE.joinpath(*str(node.module).split(".")[1:])
            found |= {folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)}
    return {file for file in found if file.is_file() and file.name not in _WITHOUT_ARITHMETIC}


@cache
def hash_python(*names: str) -> str:
    """Hash of files of the package, such as "token_logprob/triton.py", and of all that they import from it.

    Names that do not exist are skipped.
    """
    seen: set[Path] = set()
    new = {path for path in (_PACKAGE / name for name in names) if path.is_file()}
    while new:
        seen |= new
        new = {file for path in new for file in _imported(path)} - seen
    return _digest(strip_python(path.read_text()) for path in sorted(seen))


def hash_cpp(source: Path) -> str:
    """Hash of a file and of the project's headers that it includes."""
    folders = (source.parent, source.parent.parent / "common")
    seen: set[Path] = set()
    new = {source}
    while new:
        seen |= new
        names = {name for path in new for name in re.findall(r'#include "([^"]+)"', path.read_text())}
        new = {folder / name for folder in folders for name in names if (folder / name).is_file()} - seen
    return _digest(strip_cpp(path.read_text()) for path in sorted(seen))


if __name__ == "__main__":
    print("// Generated from the sources that were compiled.")
    print("constexpr const char* kSourceHashes[][2] = {")
    for argument in sys.argv[1:]:
        print(f'    {{"{Path(argument).stem}", "{hash_cpp(Path(argument))}"}},')
    print("};")
