"""`basin-lens models`: what the package keeps in the user's cache, and how to be rid of it."""

from typing import TYPE_CHECKING, Annotated

import typer

from basin_lens.errors import StoreError
from basin_lens.values import did_you_mean

if TYPE_CHECKING:
    from basin_lens.model import Kept


def show_models(
    name: Annotated[str | None, typer.Argument(help="With --clear: which one; all if left out.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is listed, or the one named.")] = False,
) -> None:
    """Show what is kept in the cache: the embedded model, its dequantized weights, reference banks; --clear removes it.

    Whatever is removed is fetched or made again when it is next needed.

    Examples: basin-lens models
              basin-lens models --clear
              basin-lens models --clear smollm2-135m-0123456789abcdef
    """
    from basin_lens.capture import kept_banks
    from basin_lens.model import cache_folder, kept_models, remove

    if name is not None and not clear:
        raise typer.BadParameter(f"expected --clear with a name, got {name!r} alone. Leave the name out to see what there is.")
    held = [*kept_models(), *kept_banks()]
    if name is not None:
        known = [one.name for one in held]
        held = [one for one in held if one.name == name]
        if not held:
            raise StoreError(
                f"expected the name of something in the cache ({', '.join(known) or 'it holds nothing'}), got {name!r}. "
                f"{did_you_mean(name, known)}See basin-lens models."
            )
    typer.echo(f"cache folder {cache_folder()} (BASIN_LENS_CACHE changes it)")
    for one in held:
        if clear:
            remove(one.path)
        typer.echo(_line(one, removed=clear))
    total = size_said(sum(one.size for one in held))
    typer.echo(f"{'removed ' if clear else ''}{total} in all" if held else "nothing is kept there")


def _line(one: "Kept", *, removed: bool) -> str:
    # What a folder's record says may hold anything: no control character of it reaches the terminal.
    of = "".join(character if character.isprintable() else "?" for character in one.of)
    return f"{'removed ' if removed else ''}{one.name}  {size_said(one.size)}  {one.made:%Y-%m-%d %H:%M} UTC  {of}  {one.path}"


def size_said(size: int) -> str:
    """Bytes in megabytes (10^6), as files are measured elsewhere; small ones in kilobytes.

    Example:
        >>> from basin_lens.cli.models import size_said
        >>> size_said(538_000_000), size_said(2_100)
        ('538.0 MB', '2.1 kB')
    """
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
