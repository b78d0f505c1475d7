"""Passages by name: built in, of NLTK, of the Hugging Face Hub, or of a local folder or file."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import cast

from basin_lens.errors import TextError
from basin_lens.texts.corpora import read_corpus
from basin_lens.texts.passages import Passage, reference_passages
from basin_lens.texts.readers import has_rows, read_texts
from basin_lens.texts.records import check_keys, is_blank, passage_of
from basin_lens.values import check_alike, whole

_FULL_NAMES = {"wikitext": "Salesforce/wikitext"}
_CONFIGS = {"Salesforce/wikitext": "wikitext-2-raw-v1"}
_RENAME = " Load it yourself, rename_column, and pass it."
_ARTICLE = re.compile(r"^ = [^=].* = $")
_INSTEAD = "or use texts without a network: files of your own, or the built-in passages (--dataset built-in)"


def read_dataset(
    name: str, *, config: str | None = None, split: str | None = None, max_passages: int | None = None
) -> list[Passage]:
    """Passages of a data set, by name.

    | name | passages |
    | --- | --- |
    | `built-in` | the reference passages |
    | `nltk:treebank`, `nltk:brown` | one for each file, with their own words and parts of speech (`TaggedPassage`) |
    | `nltk:genesis`, `nltk:inaugural`, ... | one for each file of a plain-text corpus of NLTK; of genesis only the English files |
    | `wikitext`, or any that ends so | one for each article, all its lines, its document named after the title |
    | a data set of the Hugging Face Hub, or a local folder of one | one for each row with text in its column `text` |
    | a local file | as `read_texts`: those of its rows, or the whole file |

    Of the Hub, no more is read than is needed. Documents: the file, the article, the row, or what a column `doc` (or `document`)
    says; other columns with plain values become labels, but for articles. Treebank and Brown are rebuilt from their words as they
    would be printed: traces left out, spaces and quotes as usual, a stop once after an abbreviation, and once the marks that
    Brown's coders wrote twice (`? ?`). Brown has the label `category`, and a blank line between paragraphs.

    Args:
        name: see above.
        config: configuration of a data set of the Hub (`wikitext`: "wikitext-2-raw-v1" unless given); for NLTK the start of file
            names, or a category: `"french"`, `"news"`.
        split: of a data set of the Hub or a local folder ("test" unless given); others have none, and none may be given (see
            `has_splits`).
        max_passages: as many from the start; None: all.

    Raises:
        TextError: an unknown name, configuration or split, no network, data that is not installed, no column `text`, no text.

    Source: Marcus, Marcinkiewicz and Santorini 1993 (Penn Treebank); Francis and Kucera 1979 (Brown); Merity et al. 2016
    (WikiText).

    Example:
        >>> from basin_lens.texts import read_dataset
        >>> read_dataset("nltk:brown", config="news", max_passages=1)[0].doc
        'brown/ca01'
    """
    if max_passages is not None:
        max_passages = whole(max_passages, "max_passages", least=1, error=TextError, cure="Leave it out for all.")
    if split is not None and not has_splits(name):
        raise TextError(f"expected no split for {name!r}, which has none, got split {split!r}. Leave it out.")
    source, _, corpus = name.partition(":")
    if source == "nltk":
        return read_corpus(corpus, files=config, max_passages=max_passages)
    if not name:
        raise TextError("expected the name of a data set, got an empty one. Such as built-in, nltk:treebank or wikitext.")
    path = _local(name)
    if config is not None and (name == "built-in" or path.is_file()):
        raise TextError(f"expected no configuration for {name!r}, which has none, got {config!r}. Leave it out.")
    if name == "built-in":
        return list(reference_passages()[:max_passages])
    if path.is_file():
        return read_texts(path)[:max_passages]
    name, split = _FULL_NAMES.get(name, name), split or "test"
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or path.suffix.lower() == ".txt" or has_rows(path)):
        raise TextError(f"expected a data set, got {name!r}, which does not exist. Check the path.")
    with _reading(name, config, split):
        rows = _rows(path if path.exists() else name, config, split)
        found = _articles(rows) if name.lower().endswith("wikitext") else _one_each(rows, f"{name}/{split}")
        passages = list(islice(found, max_passages))
    if not passages:
        raise TextError(f"expected text in {name!r}, split {split!r}, got empty rows only. Choose another split or data set.")
    check_alike([passage.labels for passage in passages])
    return passages


def has_splits(name: str) -> bool:
    """Whether a data set of this name has splits.

    Those of the Hub and local folders do; corpora of NLTK, files and the built-in passages have none.

    Example:
        >>> from basin_lens.texts import has_splits
        >>> has_splits("wikitext"), has_splits("nltk:brown")
        (True, False)
    """
    return name != "built-in" and not name.startswith("nltk:") and not _local(name).is_file()


def _local(name: str) -> Path:
    path = Path(_FULL_NAMES.get(name, name)).expanduser()
    try:
        path.is_file()
    except OSError as error:
        raise TextError(
            f"expected the name of a data set or a path, got {name[:40]!r}...: {error.strerror}. Check the name."
        ) from error
    return path


@contextmanager
def _reading(name: str, config: str | None, split: str) -> Iterator[None]:
    """One error for all the ways in which a data set cannot be read."""
    try:
        yield
    except TextError:
        raise
    except (ConnectionError, TimeoutError) as error:
        raise TextError(
            f"expected to reach {name!r} on the Hugging Face Hub, got no answer ({_said(error)}). Check the network and "
            f"HF_HUB_OFFLINE, {_INSTEAD}."
        ) from error
    except FileNotFoundError as error:
        raise TextError(
            f"expected a data set that can be read, got {name!r} ({_said(error)}). Check the name; log in if it asks for that; "
            f"{_INSTEAD}."
        ) from error
    except ValueError as error:
        raise TextError(
            f"expected a data set, configuration and split that exist, got {name!r}, {config!r}, {split!r}: {_said(error)} "
            f"Choose among those, {_INSTEAD}."
        ) from error
    except Exception as error:  # Whatever a reader of foreign files raises, it is about these files.
        raise TextError(
            f"expected a data set that can be read, got {name!r}: {_said(error)}. Choose another, {_INSTEAD}."
        ) from error


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def _rows(source: str | Path, config: str | None, split: str) -> Iterator[Mapping[str, object]]:
    import datasets

    if isinstance(source, Path):
        data = datasets.load_dataset(str(source), config, split=split, streaming=True)
    else:
        _reach(source)
        data = datasets.load_dataset(source, config or _CONFIGS.get(source), split=split, streaming=True)
    for row in data:
        try:
            check_keys(row, _RENAME)
        except TextError as error:
            raise TextError(f"{source}: {error}") from error
        yield row


def _reach(name: str) -> None:
    """One short question to the Hub: without a network, `datasets` would ask again and again, for half a minute or several."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    # Without the network on purpose: what is in the cache can still be read.
    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, ValueError):
        # An answer, or a name that cannot be asked for: `datasets` says what is wrong.
        return
    except Exception as error:
        raise ConnectionError(_said(error)) from error


def _one_each(rows: Iterable[Mapping[str, object]], name: str) -> Iterator[Passage]:
    for index, row in enumerate(rows):
        # Empty rows are separators, not texts.
        if not is_blank(row["text"]):
            yield passage_of(row, f"{name}/{index}", f"{name}/{index}")


def _articles(rows: Iterable[Mapping[str, object]]) -> Iterator[Passage]:
    """WikiText's rows are lines: all those of an article together, from its heading to the next."""
    title, seen = "untitled", set[str]()
    lines: list[str] = []
    for row in rows:
        line = cast("str", row["text"] or "").rstrip("\n")
        if _ARTICLE.match(line):
            yield from _article(title, lines, seen)
            title, lines = line.strip(" ").removeprefix("=").removesuffix("=").strip(), []
        lines.append(line)
    yield from _article(title, lines, seen)


def _article(title: str, lines: list[str], seen: set[str]) -> Iterator[Passage]:
    text = "\n".join(lines).strip()
    if not text:
        return
    doc, times = title, 1
    while doc in seen:
        times += 1
        doc = f"{title} ({times})"
    seen.add(doc)
    yield Passage(text, doc=doc)
