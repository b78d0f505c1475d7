"""Options of a command that are fields of dataclasses: name, type, default and help are those of the field."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import MISSING, Field, fields
from operator import or_
from types import NoneType, UnionType
from typing import Annotated, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from basin_lens.values import takes_whole

Command = TypeVar("Command", bound=Callable[..., object])
Parameters = Sequence[inspect.Parameter]
_GIVEN: ContextVar[frozenset[str]] = ContextVar("options that were named in the call", default=frozenset())


def options_of(
    record: type,
    *,
    without: Collection[str] = (),
    defaults: Mapping[str, object] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Parameters:
    """A keyword parameter for each field that the command line offers.

    Those are the fields whose type is an `Annotated` one of typer's, and those that have a text under "help" in their metadata;
    with "model" there, too, the option is a model's name.

    Args:
        record: the dataclass.
        without: fields that are left out.
        defaults: where the command's differ from the dataclass's.
        flags: where an option is not named as its field.
    """
    hints = get_type_hints(record, include_extras=True)
    found = []
    for one in fields(record):
        if one.name in without or not (get_origin(hints[one.name]) is Annotated or "help" in one.metadata):
            continue
        default = (defaults or {}).get(one.name, one.default if one.default_factory is MISSING else one.default_factory())
        if default is MISSING:
            raise TypeError(f"expected a default of {record.__name__}.{one.name}, got none. Give one, or leave the field out.")
        flag = (flags or {}).get(one.name, flag_of(one))
        annotation = hints[one.name] if get_origin(hints[one.name]) is Annotated else _annotated(one, hints, default, flag)
        found.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return found


def flag_of(one: "Field[object]") -> str:
    """How an option is spelt."""
    return "--" + one.name.replace("_", "-")


def _annotated(one: "Field[object]", hints: Mapping[str, object], default: object, flag: str) -> object:
    """As the command line reads it: whole numbers as int, models by name, None allowed where it is the default."""
    hint = str if one.metadata.get("model") else hints[one.name]
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if get_origin(hint) in (Union, UnionType) else [hint]
    kind = int if takes_whole(kinds[0]) else kinds[0]
    return Annotated[or_(kind, None) if default is None else kind, typer.Option(flag, help=one.metadata["help"])]


def taking(*groups: Parameters) -> Callable[[Command], Command]:
    """A decorator for a command that takes `**options`: the options of the groups stand in its place."""

    def decorate(command: Command) -> Command:
        own = inspect.signature(command).parameters.values()
        kept = [one for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD]
        return _with_parameters(command, [*kept, *(one for group in groups for one in group)])

    return decorate


def command_of(function: Callable[..., None], *kinds: type, defaults: Mapping[str, object] | None = None) -> Callable[..., None]:
    """A function that typer makes a command of: its parameters are the fields of dataclasses, see `options_of`.

    A field that stands in several of them is one option and goes to all; the first says its type, default and help.

    Args:
        function: called with an instance of each dataclass.
        kinds: the dataclasses.
        defaults: where the command's differ from theirs.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for kind in kinds:
        parameters = {one.name: one for one in options_of(kind, defaults=defaults)} | parameters

    def command(ctx: typer.Context | None = None, **given: object) -> None:
        how = {name: "" if ctx is None else getattr(ctx.get_parameter_source(name), "name", "") for name in given}
        _GIVEN.set(frozenset(name for name in given if how[name] == "COMMANDLINE"))
        function(*(kind(**{one.name: given[one.name] for one in fields(kind) if one.name in given}) for kind in kinds))

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=typer.Context)
    return _with_parameters(command, [context, *parameters.values()])


def was_given(name: str) -> bool:
    """Whether an option of a command of `command_of` was named in the call, if only with the value that it has by default."""
    return name in _GIVEN.get()


def _with_parameters(command: Command, parameters: Parameters) -> Command:
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {one.name: one.annotation for one in parameters if one.annotation is not one.empty}
    return command
