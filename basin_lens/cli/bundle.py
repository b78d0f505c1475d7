"""`basin-lens rerun`: what a supplement says of its runs, and the runs again."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from basin_lens.cli import options as shared
from basin_lens.errors import TableError
from basin_lens.values import Facts

if TYPE_CHECKING:
    import pandas

    from basin_lens.tables import Bundle

_EXTRA = {"apart": "values differ", "only_one": "values in one of the two only"}
_OTHER_NUMBERS = 3  # exit code: 1 is a refusal, 2 a wrong call


def rerun(
    supplement: Annotated[Path, typer.Argument(metavar="SUPPLEMENT.zip", help="Written by bl.tables.bundle.")],
    run: Annotated[str | None, typer.Option("--run", help="Which run, where the supplement has several; all if left out.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Where the model is found here; as it was loaded then if left out.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run it. Without this, only say what would be run.")] = False,
    batch_size: shared.BatchSize = None,
) -> None:
    """Say what a supplement's runs were; with --yes, run them again and compare the numbers with its table.

    Exit code: 0 if all numbers are the same, 3 if some differ, are missing on one side, or none could be compared, 1 if a run
    cannot be repeated.

    Examples: basin-lens rerun supplement.zip
              basin-lens rerun supplement.zip --yes --model smollm2-135m
    """
    from basin_lens import tables
    from basin_lens.scoring.rerun import check_facts

    size = shared.batch_size_of(batch_size)
    bundle = tables.read_bundle(supplement)
    held = tables.provenance(bundle.table)
    if run is not None and run not in held:
        raise typer.BadParameter(f"expected a run of the supplement as --run, got {run!r}; it has {', '.join(held)}.")
    chosen = [run] if run is not None else list(held)
    if bundle.study is not None:
        typer.echo(
            f"{'study':<12} {_plain(bundle.study['study'])}: {_plain(bundle.study['title'])} {_plain(bundle.study['decision'])}"
        )
    for name in chosen:
        check_facts(held[name])
        _describe(name, held[name], bundle.runs[name], model)
    if not yes:
        typer.echo("\nNothing was run. Add --yes to run it and compare.")
        return
    same = [_repeat(bundle, name, model, size) for name in chosen]
    if not all(same):
        raise typer.Exit(_OTHER_NUMBERS)


def _plain(text: object) -> str:
    """A stranger's words on a terminal: no control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))[:400]


def _describe(name: str, facts: Facts, held: Facts, model: str | None) -> None:
    """One run in words."""
    from basin_lens.tables.making import versions

    of_model, made = facts.get("model") or {}, facts.get("made") or {}
    command = made.get("command")
    lines = {
        "run": name,
        "model": f"{of_model.get('name', 'not known')}, loaded from {_place(facts, model) or 'not known: name it with --model'}",
        "fingerprint": of_model.get("fingerprint", "not known"),
        "texts": f"hash {facts.get('texts', 'not known')}" + (f", {len(held['sequences'])} sequences" if held["sequences"] else ""),
        "layers": ", ".join(map(str, facts.get("layers") or [])),
        "analyzers": "; ".join(map(str, facts.get("analyzers") or [])),
        "date": made.get("date", "not known"),
        "package": f"basin-lens {made.get('basin_lens', 'not known')}, commit {made.get('commit') or 'not known'}",
        "command": shlex.join(map(str, command)) if command else "none: made in Python",
    }
    for what, words in lines.items():
        typer.echo(f"{what:<12} {_plain(words)}")
    here, then = versions(), made.get("versions") or {}
    apart = [f"{each} {then[each]} then, {here.get(each)} here" for each in sorted(then) if then[each] != here.get(each)]
    typer.echo(f"{'versions':<12} {_plain('; '.join(apart)) if apart else 'as they are here' if then else 'not known'}")
    if held["why"]:
        typer.echo(f"{'note':<12} cannot be run again from this file alone: {_plain(held['why'])}")


def _place(facts: Facts, model: str | None) -> str | None:
    loaded = (facts.get("made") or {}).get("loaded") or {}
    return model or loaded.get("name_or_path")


def _repeat(bundle: "Bundle", name: str, model: str | None, batch_size: int | None) -> bool:
    """One run again, and whether its numbers are those of the table; how far they are apart is printed."""
    from basin_lens import tables
    from basin_lens.model import load_model
    from basin_lens.scoring.rerun import differences, planned, run_again

    again = planned(bundle, name)
    place = _place(again.facts, model)
    if place is None:
        raise TableError("expected to know where the model is, got a run whose model was not made by load_model. Pass --model.")
    typer.echo(f"\nloading {_plain(place)}")
    kind: Literal["bridge", "hooked"] = "hooked" if (again.facts.get("model") or {}).get("kind") == "hooked" else "bridge"
    table = run_again(load_model(place, kind=kind), again, batch_size=batch_size)
    before = tables.select(bundle.table, bundle.table["run"] == name)
    own = again.facts.get("columns") or {}
    # Beside other runs, a run has their columns, too, without values.
    then = [score for score in tables.scores(before) if score in own or before[score].notna().any()]
    now = tables.scores(table)
    return _say(differences(before, table), [n for n in then if n not in now], [n for n in now if n not in then])


def _say(found: "pandas.DataFrame", missing: list[str], new: list[str]) -> bool:
    """Print how far columns are apart, and whether all are the same.

    `missing`: scores that the new run does not have; `new`: those that the table does not have. Either are other numbers.
    """
    from basin_lens.scoring.rerun import FLOOR, SAME

    typer.echo(f"{'column':<34} {'values':>9} {'largest difference':>19} {'median size':>14}")
    for row in found.to_dict("records"):
        extra = "".join(f"  {row[name]:,} {words}" for name, words in _EXTRA.items() if row[name])
        sizes = f"{row['compared']:>9,} {row['largest_difference']:>19.3g} {row['scale']:>14.3g}"
        typer.echo(f"{_plain(row['column']):<34} {sizes}{extra}")
    far = [_plain(name) for name in found[(found["apart"] > 0) | (found["only_one"] > 0)]["column"]]
    alike = (
        f"to {SAME:g} of each value or, where that is more, {FLOOR:g} of the column's median size, which rounding leaves where "
        "terms cancel"
    )
    if missing:
        typer.echo(f"Not compared, for the new run does not have them: {', '.join(map(_plain, missing))}.")
    if new:
        typer.echo(f"Not compared, for the table does not have them: {', '.join(map(_plain, new))}.")
    if not found["compared"].sum():
        typer.echo("Nothing was compared: no score has a value in both runs.")
        return False
    if far:
        have = "has" if len(far) == 1 else "have"
        typer.echo(f"Not the same numbers ({alike}): {', '.join(far)} {have} values that differ, or that one of the two lacks.")
    elif missing or new:
        typer.echo(f"Not the same numbers: what could be compared is the same ({alike}), but scores are missing on one side.")
    else:
        typer.echo(f"The same numbers: {alike}.")
    return not (far or missing or new)
