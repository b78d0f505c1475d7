"""One reader of options from dataclasses, for every command that has some."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer

from basin_lens.cli.dataclass_options import command_of, options_of, taking
from basin_lens.studies.framework.spec import option
from basin_lens.values import Whole


@dataclass(frozen=True)
class One:
    """Every way in which a field is an option, and two in which it is none."""

    count: Whole = option(3, "How many.")
    most: Whole | None = option(None, "At most.")
    other: object = option(None, "Another model.", model=True)
    places: list[Path] = option([], "Where.")
    share: float = field(default=0.5, metadata={"help": "How much."})
    named: Annotated[str, typer.Option("--called", help="A name.")] = "x"
    hidden: float = option(1.0)
    plain: int = 2


@dataclass(frozen=True)
class Other:
    """Shares a field with the first."""

    count: int = option(7, "Of the other.")
    flag: bool = option(False, "A flag.")


def read(parameters) -> dict[str, tuple]:
    """Type, default, flags and help of each."""
    found = {}
    for one in parameters:
        kind, told = one.annotation.__origin__, one.annotation.__metadata__[0]
        # typer takes the first flag for a default until it sees that the option stands in an annotation.
        found[one.name] = (kind, one.default, (told.default, *told.param_decls), told.help)
    return found


def test_fields_become_options():
    assert read(options_of(One)) == {
        "count": (int, 3, ("--count",), "How many."),
        "most": (int | None, None, ("--most",), "At most."),
        "other": (str | None, None, ("--other",), "Another model."),
        "places": (list[Path], [], ("--places",), "Where."),
        "share": (float, 0.5, ("--share",), "How much."),
        "named": (str, "x", ("--called",), "A name."),
    }


def test_a_command_may_differ_from_the_dataclass():
    found = read(options_of(One, without=("most", "other", "places", "named"), defaults={"count": None}, flags={"share": "--part"}))
    assert found == {"count": (int | None, None, ("--count",), "How many."), "share": (float, 0.5, ("--part",), "How much.")}


def test_a_field_without_a_default_is_refused():
    @dataclass
    class Bare:
        width: int = field(metadata={"help": "How wide."})

    with pytest.raises(TypeError, match=r"expected a default of Bare.width, got none. Give one"):
        options_of(Bare)


def test_a_field_of_several_is_one_option_and_goes_to_all():
    got = []
    made = command_of(lambda *given: got.extend(given), One, Other, defaults={"share": 0.25})
    parameters = inspect.signature(made).parameters
    assert parameters["count"].default == 3 and parameters["share"].default == 0.25
    made(**{name: one.default for name, one in parameters.items()} | {"count": 5, "flag": True})
    assert got == [One(count=5, share=0.25), Other(5, True)]


def test_options_stand_in_the_place_of_keywords():
    @taking(options_of(Other))
    def command(name: str, **options: object) -> None:
        """Say it."""

    assert list(inspect.signature(command).parameters) == ["name", "count", "flag"]


def test_typer_reads_what_is_made(capsys):
    app, got = typer.Typer(add_completion=False), []
    app.command()(command_of(got.append, One))
    words = ["--count", "4", "--places", "a", "--places", "b", "--other", "tiny", "--called", "y"]
    app(words, standalone_mode=False)
    assert got == [One(4, None, "tiny", [Path("a"), Path("b")], named="y")]
    with pytest.raises(SystemExit):
        app(["--help"])
    assert "How much." in capsys.readouterr().out
