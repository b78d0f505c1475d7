"""What the code must not have, and how much of it there still is: `offenders.txt`, which may only become shorter.

    python -m tests.house.offenders   # writes the list anew: after something on it was mended, never to admit something new

A function counts without its docstring: documentation costs nobody a look at the code. Its branches are its `if`s (in expressions too),
loops, comprehensions, handlers, cases, and each `and` or `or`; functions inside it count with it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("offenders.txt")
MOST_LINES, MOST_BRANCHES, LONGEST = 60, 20, 132
KINDS = ("lines", "branches", "long lines", "fmt: skip", "module's name", "circle")
Found = dict[tuple[str, str], int]
_ONE = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.comprehension, ast.ExceptHandler, ast.match_case)


def sources() -> list[Path]:
    return sorted((ROOT / "basin_lens").rglob("*.py"))


def branches(function: ast.AST) -> int:
    return sum(
        isinstance(node, _ONE) + (len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0) for node in ast.walk(function)
    )


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first, whole = function.body[0], function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return whole
    return whole - (first.end_lineno - first.lineno + 1)


def functions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods, not those inside other functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield within + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{within}{node.name}.")
        else:
            yield from functions(node, within)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    """Which modules of the package each one imports, wherever in it: an import inside a function hides a circle, and makes none."""
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        named: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                named |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in trees else node.module for a in node.names}
        graph[module] = (named & set(trees)) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import one another, directly or through others."""
    reach = {module: set(then) for module, then in graph.items()}
    for through in graph:
        for module in graph:
            if through in reach[module]:
                reach[module] |= reach[through]
    found = {
        tuple(sorted(m for m in graph if m in reach[module] and module in reach[m])) for module in graph if module in reach[module]
    }
    return [list(circle) for circle in sorted(found)]


def offenders() -> Found:
    """(kind, place) -> how much. The package's front door looks names up lazily and is no part of a circle."""
    found: Found = {}
    trees: dict[str, ast.AST] = {}
    for path in sources():
        text, place = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        tree = trees[module_of(path)] = ast.parse(text)
        for name, node in functions(tree):
            found["lines", f"{place} {name}"] = lines(node)
            found["branches", f"{place} {name}"] = branches(node)
            if name == module_of(path).rsplit(".", 1)[-1]:
                found["module's name", f"{place} {name}"] = 1
        found["long lines", place] = sum(len(line) > LONGEST for line in text.splitlines())
        found["fmt: skip", place] = len(re.findall(r"#\s*fmt:\s*(?:skip|off)", text))
    del trees["basin_lens"]
    found |= {("circle", " ".join(circle)): len(circle) for circle in circles(imports(trees))}
    most = {"lines": MOST_LINES, "branches": MOST_BRANCHES}
    return {key: count for key, count in found.items() if count > most.get(key[0], 0)}


def listed() -> Found:
    rows = [line.split("\t") for line in LIST.read_text(encoding="utf-8").splitlines()]
    return {(kind, place): int(count) for kind, place, count in rows}


def written(found: Found) -> str:
    rows = sorted(found.items(), key=lambda row: (KINDS.index(row[0][0]), row[0][1]))
    return "".join(f"{kind}\t{place}\t{count}\n" for (kind, place), count in rows)


if __name__ == "__main__":
    LIST.write_text(written(offenders()), encoding="utf-8")
