"""Whether a checkpoint's weights are the model's: what the loader found, refused where it had to make weights up."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

from basin_lens.errors import ModelError
from basin_lens.model.protocol import HookedModel

_NAMED = 4  # names in a message
_NOTED = 20  # names in provenance
# What wrappers put into the names of the weights that they hold.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "module.": "DataParallel or a trainer",
}

_unused: "WeakKeyDictionary[HookedModel, tuple[str, ...]]" = WeakKeyDictionary()


class LoadingInfo(TypedDict):
    """What transformers gives with `output_loading_info=True`."""

    missing_keys: Collection[str]
    unexpected_keys: Collection[str]
    mismatched_keys: Collection[tuple[str, Iterable[int], Iterable[int]]]


@dataclass(frozen=True)
class Found:
    """What a loader says of a checkpoint beside a model: names of weights, and of each in another shape both shapes."""

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()  # name, in the checkpoint, in the model

    @classmethod
    def from_info(cls, info: LoadingInfo) -> "Found":
        """From what transformers tells."""
        shapes = sorted((str(name), tuple(held), tuple(own)) for name, held, own in info["mismatched_keys"])
        return cls(frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), tuple(shapes))

    @classmethod
    def compared(cls, held: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> "Found":
        """From the shapes in the checkpoint and those of the model."""
        both = sorted(held.keys() & own.keys())
        return cls(
            frozenset(own.keys() - held.keys()),
            frozenset(held.keys() - own.keys()),
            tuple((name, held[name], own[name]) for name in both if held[name] != own[name]),
        )

    def misfit(self) -> str | None:
        """What is wrong and what to do, in words; None where every weight of the model is in the checkpoint."""
        if not self.missing and not self.mismatched:
            return None
        said = []
        if self.missing:
            others = f", but with others: {some(self.unexpected)}" if self.unexpected else ""
            said.append(f"one without {some(self.missing)}{others}")
        if self.mismatched:
            name, held, own = self.mismatched[0]
            more = f" and {len(self.mismatched) - 1} more" if len(self.mismatched) > 1 else ""
            said.append(f"{name} of shape {list(held)} for {list(own)}{more}")
        return f"{'; '.join(said)}. {self._cure()}"

    def _cure(self) -> str:
        wrapper = next((w for w in _WRAPPERS if any(w in u and u.replace(w, "") in self.missing for u in self.unexpected)), None)
        if wrapper is not None:
            return (
                f"Its names bear {wrapper!r}, which {_WRAPPERS[wrapper]} puts there: save the model inside, or rename the weights "
                f"with name.replace({wrapper!r}, '')."
            )
        if prefix := _prefix(self.unexpected, self.missing):
            return f"Its names bear the prefix {prefix!r}: rename the weights with name.removeprefix({prefix!r})."
        if prefix := _prefix(self.missing, self.unexpected):
            return f"Its names lack the prefix {prefix!r}: rename the weights with {prefix!r} + name."
        if self.missing == {"lm_head.weight"}:
            return (
                'Is it a model without its output layer? Where that is the embedding itself, set "tie_word_embeddings": true in '
                "config.json; else save the causal language model."
            )
        return (
            "Do config.json and the weights belong together, and are all files there? Save the model again, or get the files again."
        )


def some(names: Collection[str]) -> str:
    """The first four names, and how many more."""
    listed = sorted(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return f"{', '.join(listed[:_NAMED])}{more}"


def _prefix(longer: Collection[str], shorter: Collection[str]) -> str | None:
    """What most of the longer names have before a shorter one."""
    known, counts = set(shorter), Counter[str]()
    for name in longer:
        parts = name.split(".")
        counts.update(".".join(parts[:cut]) + "." for cut in range(1, len(parts)) if ".".join(parts[cut:]) in known)
    prefix, count = next(iter(counts.most_common(1)), ("", 0))
    return prefix if 2 * count > len(known) else None


def check_fit(found: Found, where: str) -> None:
    """Refuse a checkpoint that does not hold all of the model's weights.

    Raises:
        ModelError: weights that are missing, or of another shape: the loader would make them up at random.
    """
    if (words := found.misfit()) is not None:
        raise ModelError(f"expected a checkpoint with all weights of the model at {where!r}, got {words}")


@contextmanager
def listening() -> Iterator[list[Found]]:
    """What transformers finds where TransformerLens calls it: it tells on request, and TransformerLens does not ask."""
    from transformers import PreTrainedModel

    found: list[Found] = []
    loader: Any = PreTrainedModel
    plain = loader.__dict__["from_pretrained"]

    def asked(cls: type, /, *args: object, **options: object) -> object:
        wanted = options.pop("output_loading_info", False)
        # Other shapes are told too, and named; otherwise the error points at a log that TransformerLens switches off.
        options["ignore_mismatched_sizes"] = True
        model, info = plain.__get__(None, cls)(*args, output_loading_info=True, **options)
        found.append(Found.from_info(info))
        return (model, info) if wanted else model

    loader.from_pretrained = classmethod(asked)
    try:
        yield found
    finally:
        loader.from_pretrained = plain


def note_unused(model: HookedModel, names: Collection[str]) -> None:
    """Keep which weights of the checkpoint the model has no place for."""
    if names:
        _unused[model] = tuple(sorted(names))


def unused_weights(model: HookedModel) -> tuple[str, ...]:
    """Names of the checkpoint's weights that the model has no place for; empty where every one was used."""
    return _unused.get(model, ())


def unused_facts(model: HookedModel) -> dict[str, list[str]]:
    """The same for provenance: at most 20 names and the number of the others; nothing where there are none."""
    names = unused_weights(model)
    more = [f"and {len(names) - _NOTED} more"] if len(names) > _NOTED else []
    return {"unused_weights": [*names[:_NOTED], *more]} if names else {}
