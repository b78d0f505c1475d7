"""Functions that can be read at once, lines that fit, code that the formatter shapes, names that mean one thing, no circles."""

import ast

import pytest

from tests.house import offenders
from tests.house.offenders import KINDS


@pytest.fixture(scope="module")
def found():
    return offenders.offenders()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_new_offends(found, kind):
    known = offenders.listed()
    new = {place: count for (of, place), count in found.items() if of == kind and count > known.get((of, place), 0)}
    assert not new, "mend these; the list in tests/house/offenders.txt may only become shorter"


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_mended_leaves_the_list(found, kind):
    mended = {
        place: f"{count} listed, {found.get((of, place), 0)} found"
        for (of, place), count in offenders.listed().items()
        if of == kind and found.get((of, place), 0) < count
    }
    assert not mended, "write the list anew, which is shorter now: python -m tests.house.offenders"


def function(text: str) -> ast.FunctionDef:
    return ast.parse(text).body[0]


def test_lines_and_branches_are_counted_as_said():
    short = function('def f(x):\n    """Said.\n\n    At length.\n    """\n    return x\n')
    assert offenders.lines(short) == 2 and offenders.branches(short) == 0
    every = function(
        "def f(x):\n"
        "    for i in x:\n"
        "        while i and x or not i:\n"
        "            i -= 1 if i else 2\n"
        "    try:\n"
        "        y = [a for a in x for b in a if b]\n"
        "    except ValueError:\n"
        "        def g():\n"
        "            if x: pass\n"
        "    match x:\n"
        "        case 1: pass\n"
    )
    assert offenders.lines(every) == 11 and offenders.branches(every) == 1 + 1 + 2 + 1 + 2 + 1 + 1 + 1


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e2"}, "e2": {"e"}}
    assert offenders.circles(graph) == [["a", "b", "c"], ["e", "e2"]]
    trees = {"p": "import p.q", "p.q": "def f():\n    from p.r import x", "p.r": "from p import q"}
    assert offenders.imports({name: ast.parse(text) for name, text in trees.items()}) == {
        "p": {"p.q"},
        "p.q": {"p.r"},
        "p.r": {"p.q"},
    }
