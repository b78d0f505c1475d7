"""Progress over the steps of a study."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from basin_lens.values import hides_bars

Steps = Callable[[str], None]


@contextmanager
def progress_steps(name: str, count: int, progress: bool) -> Iterator[Steps]:
    """Progress over the named steps of a study: to be called as each begins."""
    with tqdm(total=count, desc=name, unit="step", disable=hides_bars(progress)) as bar:

        def step(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        yield step
