"""How often the package says `Any`, and that no public signature does.

    python -m tests.house.test_types   # by room: how many, and the public signatures that have it

Public is what bears no leading underscore (module, class and name) and stands outside of functions; double-underscored methods of a public class
are public too. An import of `Any` is not counted.
"""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.offenders import ROOT, sources

MOST = 120


def is_public(name: str) -> bool:
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def is_any(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")


def hints(tree: ast.AST) -> Iterator[ast.AST]:
    """Every annotation."""
    for node in ast.walk(tree):
        yield from (hint for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)) if hint is not None)


def written(hint: ast.AST) -> int:
    """`Any` in the parts of an annotation that are written as text. Of jaxtyping's text, names of axes, not all can be read."""
    count = 0
    for node in ast.walk(hint):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                count += sum(map(is_any, ast.walk(ast.parse(node.value.strip(), mode="eval"))))
            except SyntaxError:
                continue
    return count


def in_module(tree: ast.Module) -> int:
    """`Any` in code and annotations."""
    return sum(map(is_any, ast.walk(tree))) + sum(map(written, hints(tree)))


def in_public(tree: ast.AST, within: str = "") -> Counter[str]:
    """Name -> how many: of public functions and methods, and of the annotated fields of public classes."""
    found = Counter[str]()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            said, name = [*hints(node.args), *([node.returns] if node.returns else [])], node.name
        elif within and isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said, name = [node.annotation], node.target.id
        elif isinstance(node, ast.ClassDef):
            found += in_public(node, f"{within}{node.name}.") if is_public(node.name) else Counter()
            continue
        else:  # under `if TYPE_CHECKING:`, `try:`
            found += in_public(node, within)
            continue
        if is_public(name):
            found[within + name] += sum(sum(map(is_any, ast.walk(hint))) + written(hint) for hint in said)
    return +found


def room_of(path: Path) -> str:
    """`model/` or `files.py`."""
    place = path.relative_to(ROOT / "basin_lens")
    return f"{place.parts[0]}/" if len(place.parts) > 1 else place.name


def by_room() -> dict[str, tuple[int, list[str]]]:
    """Room -> how many, and where public signatures have it."""
    counts, places = Counter[str](), defaultdict[str, list[str]](list)
    for path in sources():
        text, room = path.read_text(encoding="utf-8"), room_of(path)
        if "Any" not in text:
            continue
        tree = ast.parse(text)
        counts[room] += in_module(tree)
        if is_public(path.stem):
            places[room] += [f"{path.relative_to(ROOT)} {name} ({count})" for name, count in in_public(tree).items()]
    return {room: (count, places[room]) for room, count in counts.most_common()}


@pytest.fixture(scope="module")
def rooms():
    return by_room()


def test_any_is_rare(rooms):
    counts = {room: count for room, (count, _) in rooms.items() if count}
    assert sum(counts.values()) <= MOST, counts


def test_no_public_signature_says_any(rooms):
    said = {room: places for room, (_, places) in rooms.items() if places}
    assert not said, "name the type, or `object` for what is checked at a door: python -m tests.house.test_types"


EXAMPLE = """
from typing import Any
import typing as t

def f(a: Any, *rest: Any, b: "list[Any]" = ()) -> Float[Any, "batch pos"]:
    def inside(x: Any) -> Any: ...
    c: Any = a

def _own(a: Any) -> None: ...

@dataclass
class Record:
    field: t.Any
    _hidden: Any

    def __init__(self, x: Any) -> None: ...
    def method(self, x: dict[str, Any]) -> "Any": ...
    def _step(self, x: Any) -> None: ...

class _Hidden:
    field: Any

held: Any = cast(Any, "Any other text")

if True:
    def g() -> Any: ...
"""


def test_any_is_counted_as_said():
    tree = ast.parse(EXAMPLE)
    assert in_public(tree) == {"f": 4, "Record.field": 1, "Record.__init__": 1, "Record.method": 2, "g": 1}
    assert in_module(tree) == 9 + 3 + 1 + 1 + 1 + 1 + 2 + 0  # those, in f, _own, _hidden, _step, _Hidden, held


if __name__ == "__main__":
    for room, (count, places) in by_room().items():
        print(f"{count:4} {room}", *places, sep="\n       ")
    print(f"{sum(count for count, _ in by_room().values()):4} in all, of at most {MOST}")
