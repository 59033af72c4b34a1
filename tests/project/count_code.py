"""Counts lines of code: physical lines that hold a token which is neither a comment nor part of a docstring.

`python tests/project/count_code.py [FOLDER]` prints the lines of each room, its longest files and longest functions.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

_SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> set[int]:
    """Numbers of the lines of this source that are code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - _docstring_lines(source)


def _docstring_lines(source: str) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def functions(source: str) -> dict[str, int]:
    """Code lines of each function, those of functions in it included."""
    code = code_lines(source)
    return {
        f"{node.name}:{node.lineno}": len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


def main(folder: Path) -> None:
    rooms: Counter[str] = Counter()
    files: Counter[str] = Counter()
    longest: Counter[str] = Counter()
    for path in sorted(folder.rglob("*.py")):
        source, name = path.read_text(), path.relative_to(folder)
        count = len(code_lines(source))
        rooms[str(name.parent) if len(name.parts) > 1 else name.name] += count
        files[f"{name} ({len(source.splitlines())} lines in all)"] = count
        for function, lines in functions(source).items():
            longest[f"{name}:{function}"] = lines
    for title, counter in (("rooms", rooms), ("longest files", files), ("longest functions", longest)):
        print(title)
        for name_, lines in counter.most_common(None if title == "rooms" else 12):
            print(f"  {lines:6d}  {name_}")
    print(f"{sum(rooms.values())} lines of code in {folder.name}/")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "sadp_fast")
