"""Options of a command that are fields of a dataclass: name, type, default and help are those of the field."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, TypeVar, get_args

import typer

from basin_lens.values import takes_whole

Command = TypeVar("Command", bound=Callable[..., Any])


def options_of(
    record: type,
    *,
    without: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    flags: Mapping[str, str] | None = None,
) -> list[inspect.Parameter]:
    """A keyword parameter for each field that has a text under "help" in its metadata.

    Args:
        record: the dataclass.
        without: fields that are left out.
        defaults: where the command's differ from the dataclass's.
        flags: where an option is not named as its field.
    """
    defaults, flags = defaults or {}, flags or {}
    found = []
    for one in fields(record):
        if "help" not in one.metadata or one.name in without:
            continue
        default = defaults.get(one.name, one.default)
        if default is MISSING:
            raise TypeError(f"expected a default of {record.__name__}.{one.name}, got none. Give one, or leave the field out.")
        option = typer.Option(flags.get(one.name, "--" + one.name.replace("_", "-")), help=one.metadata["help"])
        kind = inspect.Parameter.KEYWORD_ONLY
        annotation: Any = Annotated[_type_of(one, default), option]
        found.append(inspect.Parameter(one.name, kind, default=default, annotation=annotation))
    return found


def _type_of(one: "Field[Any]", default: Any) -> Any:
    """As the command line reads it: whole numbers as int, None allowed where it is the default."""
    kinds = [kind for kind in get_args(one.type) or (one.type,) if kind is not type(None)]
    kind = int if takes_whole(one.type) else kinds[0]
    return kind | None if default is None else kind


def taking(*groups: list[inspect.Parameter]) -> Callable[[Command], Command]:
    """A decorator for a command that takes `**options`: the options of the groups stand in its place."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        whole = signature.replace(parameters=[*own, *(one for group in groups for one in group)])
        command.__signature__ = whole  # type: ignore[attr-defined]  # typer reads it
        return command

    return decorate
