"""Public names and their signatures, against `public_names.txt`: what users call changes on purpose or not at all.

    python -m tests.house.test_public_names   # writes the list anew

Annotations are left out: types are checked by mypy.
"""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import basin_lens

LIST = Path(__file__).with_name("public_names.txt")


def signature(thing: object) -> str:
    """`(a, b=1, *, c=None)`; a default that is no plain value is "...", for its own text may change from run to run."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    plain = [
        p.replace(annotation=p.empty, default=p.default if p.default is p.empty or is_plain(p.default) else ...)
        for p in found.parameters.values()
        if not p.name.startswith("_")
    ]
    return str(found.replace(parameters=plain, return_annotation=found.empty)).replace("Ellipsis", "...")


def is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool | tuple | None)


def rooms() -> list[str]:
    """The front door, the rooms behind it, and the texts."""
    return [
        "basin_lens",
        *(f"basin_lens.{name}" for name in basin_lens.__all__ if inspect.ismodule(getattr(basin_lens, name))),
        "basin_lens.texts",
    ]


def exported(room: str) -> list[str]:
    """What the room says it exports; where it does not say, what is defined in it."""
    module = importlib.import_module(room)
    own = [
        name
        for name, thing in vars(module).items()
        if getattr(thing, "__module__", "").startswith(room) and not name.startswith("_")
    ]
    return sorted(getattr(module, "__all__", own))


def public() -> Iterator[str]:
    """One line for each name; classes with their public methods."""
    for room in rooms():
        for name in exported(room):
            thing = getattr(importlib.import_module(room), name)
            yield f"{room}.{name}{signature(thing) if callable(thing) else ''}"
            if inspect.isclass(thing) and thing.__module__.startswith("basin_lens") and not issubclass(thing, BaseException):
                for member in sorted(vars(thing)):
                    held = inspect.getattr_static(thing, member)
                    if member.startswith("_") or (
                        not isinstance(held, staticmethod | classmethod | property) and not inspect.isfunction(held)
                    ):
                        continue
                    yield f"{room}.{name}.{member}{'' if isinstance(held, property) else signature(getattr(thing, member))}"


def test_public_names_and_signatures_are_those_on_the_list():
    found, known = list(public()), LIST.read_text(encoding="utf-8").splitlines()
    gone, new = sorted(set(known) - set(found)), sorted(set(found) - set(known))
    assert not gone and not new, "if it was meant: python -m tests.house.test_public_names, and a line in CHANGELOG.md"
    assert found == known


def test_signatures_are_read_without_annotations_and_addresses():
    def f(a: int, /, b: str = "x", *rest: int, c: object = object(), d: None = None) -> int: ...

    assert signature(f) == "(a, /, b='x', *rest, c=..., d=None)"


if __name__ == "__main__":
    LIST.write_text("".join(f"{line}\n" for line in public()), encoding="utf-8")
