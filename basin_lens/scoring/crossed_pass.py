"""Tokens in groups, and every cloud of a group through the map at every place of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.analyzers import CrossedTable, Displaced
from basin_lens.capture import Capture
from basin_lens.errors import NeighborError
from basin_lens.neighbors.grouping import matched_groups, nearest_partners
from basin_lens.scoring.clouds import Clouds
from basin_lens.scoring.plan import Plan
from basin_lens.scoring.token_rows import documents_of_both, joined, row_groups, texts_of_both
from basin_lens.transport import chunk_places, rows_per_call
from basin_lens.values import Facts

_PARTS = ("places", "before", "after")  # of what is passed at some places of groups
_NO_LABELS = ("self", "sequence", "document", "nothing")  # values of `exclude` that name no label


@dataclass(frozen=True)
class Crossed:
    """Groups, and their tables by whose displacements were passed.

    `units`: what the tokens of a group differ in, `"document"`, `"sequence"` or a label. `far_out`: rows of the bank that are in
    no random set; None where none were drawn.
    `rows`: of the capture, `[groups, g]`; with partners from the bank, the first is of the capture and the others of the bank.
    `without`: rows that could be measured and found no group.
    """

    rows: Int[Tensor, "groups g"]
    tables: dict[Displaced, CrossedTable]
    without: int
    units: str
    from_bank: bool = False
    far_out: int | None = None

    @property
    def scored(self) -> Int[Tensor, "groups scored"]:
        """The groups' tokens that are scored: rows of the capture."""
        return self.rows[:, :1] if self.from_bank else self.rows

    def facts(self) -> Facts:
        """What provenance says of the groups.

        `units`: what the tokens of a group differ in. `partners`: where a token's partners come from, `"texts"` or `"bank"`;
        `intervals`: of the bank's, what they leave out.
        `spread_within_groups`: median over groups of the largest difference of log V_in. `local`: median V_in of the neighbors
        over that of random sets, by which a reader sees how local a neighborhood is. `far_out`: rows of the bank in no random set,
        their squared distance from the median state being over 20 times the median row's.
        """
        partners = "bank" if self.from_bank else "texts"
        known: Facts = {"groups": len(self.rows), "without_group": self.without, "units": self.units, "partners": partners}
        if self.from_bank:
            known["intervals"] = "given this bank: the error of its own draw of partners is not in them"
        if self.far_out is not None:
            known["far_out"] = self.far_out
        if len(self.rows):
            before = self.tables["neighbors"].log_before
            known["spread_within_groups"] = float((before.amax(1) - before.amin(1)).median())
            if "random_sets" in self.tables:
                ratio = (before - self.tables["random_sets"].log_before).exp()[:, : self.scored.shape[1]]
                known["local"] = float(ratio.nanmedian())
        return known


class CrossedPass:
    """The crossed tables of one map at one layer.

    Args:
        own: the capture's tokens with their clouds.
        partners: the bank's tokens with theirs, from which each token gets partners of its own; None: tokens of the capture are
            one another's partners.
        groups: the groups of another run on the same texts, taken as they are; None: tokens are matched.
    """

    def __init__(self, own: Clouds, partners: Clouds | None = None, groups: Int[Tensor, "groups g"] | None = None) -> None:
        self.own, self.partners, self.groups = own, partners, groups
        self.k, self.size, self.device = own.k, own.crossing.group, own.searches.device
        self.layer = own.layer

    def __call__(self, able: Bool[Tensor, " rows"]) -> Crossed:
        """Cross the rows that are able to be measured: those with k neighbors, and in the sample if there is one."""
        groups = self.grouped(able)
        return self.crossed(groups, [self.some(groups)], int(able.sum()), self.far_out)

    def grouped(self, able: Bool[Tensor, " rows"]) -> Int[Tensor, "groups g"]:
        """The rows that are able to be measured, put into groups."""
        if self.groups is not None:
            return self.groups
        rows = torch.nonzero(able).squeeze(1)
        values = self.own.log_variance(rows)
        there = ~values.isnan()
        return self._partnered(rows[there], values[there]) if self.partners else self._grouped(rows[there], values[there])

    @property
    def far_out(self) -> int | None:
        """How many rows of the bank are in no random set; None where none is drawn."""
        return int(self.own.far_out.sum()) if "random_sets" in self.own.crossing.displaced else None

    def crossed(
        self, groups: Int[Tensor, "groups g"], parts: Sequence[Mapping[str, Tensor]], able: int, far_out: int | None
    ) -> Crossed:
        """Groups and their tables, from shares of the places that were passed. `able`: how many rows could be grouped."""
        tables = {kind: self._table(groups, kind, parts) for kind in self.own.crossing.displaced}
        found = Crossed(groups, tables, 0, self._units[1], self.partners is not None, far_out)
        return replace(found, without=able - found.scored.numel())

    def _grouped(self, rows: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> Int[Tensor, "groups g"]:
        """Groups of nearly equal log V_in, from different units, with no neighbor in common."""
        own, at = self.own, rows.cpu()
        groups = matched_groups(
            values.double().cpu().numpy(),
            self._units[0][at].numpy(),
            own.neighbor_keys(rows).cpu().numpy(),
            own.keys_of(rows).numpy(),
            size=self.size,
            seed=own.searches.seed * 1_000_003 + self.layer,
        )
        return rows[torch.from_numpy(groups).to(rows.device)]

    @cached_property
    def _units(self) -> tuple[Int[Tensor, " rows"], str]:
        """What a group's tokens differ in. Partners from the bank are of other documents, however the texts are cut."""
        searches, exclude = self.own.searches, self.own.options.exclude
        return grouping_units(searches.capture, exclude, 1 if self.partners else self.size, searches.asked)

    def _partnered(self, rows: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> Int[Tensor, "groups g"]:
        """Each row with some of the bank near in log V_in, all from different units, with no neighbor in common.

        The nearest ones, if the texts are too few to be partners; drawn among the near ones by the token's key, if many have
        partners from the bank: prompts of one template, with the same neighbors, would have the same nearest partners.
        """
        assert self.partners is not None
        own, bank = self.own, self.partners
        among = torch.nonzero(bank.found.near.rows[:, self.k - 1] >= 0).squeeze(1)
        theirs = bank.log_variance(among)
        among, theirs = among[~theirs.isnan()], theirs[~theirs.isnan()]
        units = units_of_both(own.searches.capture, bank.searches.capture, own.options.exclude)
        sides = zip((rows, among), (values, theirs), units, (own, bank), strict=True)
        given = [
            (each.double().cpu().numpy(), unit[at.cpu()].numpy(), clouds.neighbor_keys(at).cpu().numpy())
            for at, each, unit, clouds in sides
        ]
        seeds = [[own.searches.seed, self.layer, key] for key in own.keys_of(rows).tolist()]
        draws = seeds if own.crossing.partners == "bank" else None
        chosen = torch.from_numpy(nearest_partners(*given, count=self.size - 1, draws=draws)).to(rows.device)
        full = (chosen >= 0).all(1)
        return torch.cat([rows[full, None], among[chosen[full]]], dim=1)

    @property
    def _sides(self) -> list[tuple[Clouds, range]]:
        """Whose clouds are at which places of a group."""
        if self.partners is None:
            return [(self.own, range(self.size))]
        return [(self.own, range(1)), (self.partners, range(1, self.size))]

    def some(self, groups: Int[Tensor, "n g"], shard: int = 0, shards: int = 1) -> dict[str, Tensor]:
        """All clouds of the groups at some of their places: one of so many shares of the block calls, which are the same however
        many shares there are.

        Returns:
            by the kind of displacements: the places (group * g + place in it), log V of the place's own cloud before, and of all
            clouds of its group behind the map, for all displacements and either half.
        """
        n, g = groups.shape
        known: dict[str, list[Tensor]] = {f"{kind} {part}": [] for kind in self.own.crossing.displaced for part in _PARTS}
        for kind in self.own.crossing.displaced:
            for side, slots in self._sides:
                at, there = groups[:, slots.start : slots.stop].flatten(), side.searches.capture
                rows = rows_per_call(side.passage.bank_before, int(there.lengths.max()))
                calls = list(chunk_places(there, at, 2 * self.k * g, rows)) if n else []
                for part in share_of(calls, shard, shards):
                    group, slot = part // len(slots), slots.start + part % len(slots)
                    moves = torch.cat([self._moves(each, groups[group, s.start : s.stop], kind) for each, s in self._sides], dim=1)
                    log_before = side.log_before(moves[torch.arange(len(part), device=self.device), slot])
                    found = group * g + slot, torch.stack(log_before), torch.stack(side.log_after(kind, at[part], moves))
                    for name, value in zip(_PARTS, found, strict=True):
                        known[f"{kind} {name}"].append(value)
        return {name: torch.cat(held, dim=0 if name.endswith("places") else 1) for name, held in known.items() if held}

    def _table(self, groups: Int[Tensor, "n g"], kind: Displaced, parts: Sequence[Mapping[str, Tensor]]) -> CrossedTable:
        """The table of one kind of displacements, from its parts."""
        n, g = groups.shape
        before = torch.full((3, n * g), torch.nan, dtype=torch.float32, device=self.device)
        after = torch.full((3, n * g, g), torch.nan, dtype=torch.float32, device=self.device)
        for part in parts:
            if f"{kind} places" in part:
                places, log_before, log_after = (part[f"{kind} {name}"].to(self.device) for name in _PARTS)
                before[:, places], after[:, places] = log_before, log_after
        scored = 1 if self.partners else None
        tables = zip(before.view(3, n, g), after.view(3, n, g, g), strict=True)
        whole, *halves = (CrossedTable(b, a, scored=scored) for b, a in tables)
        return replace(whole, halves=tuple(halves))

    @staticmethod
    def _moves(side: Clouds, rows: Int[Tensor, "n s"], kind: Displaced) -> Float[Tensor, "n s k d"]:
        """Displacements of these tokens' clouds."""
        moves = side.of(kind, rows.flatten())[1]
        return moves.view(*rows.shape, *moves.shape[1:])


def share_of(calls: Sequence[Tensor], shard: int, shards: int) -> Sequence[Tensor]:
    """One of so many shares of block calls, those of a share one after the other."""
    return calls[shard * len(calls) // shards : (shard + 1) * len(calls) // shards]


def unit_of_rows(capture: Capture, exclude: str) -> Int[Tensor, " rows"]:
    """What tokens of one group must differ in: the document, or the label that `exclude` names, where a text has it.

    Copies of a text are one unit, whatever documents they are of.
    """
    if exclude not in _NO_LABELS:
        row_groups(capture, capture, exclude)  # refuses a label that no text has
    return units_of_both(capture, capture, exclude)[0]


def grouping_units(capture: Capture, exclude: str, size: int, asked: Bool[Tensor, " rows"]) -> tuple[Int[Tensor, " rows"], str]:
    """What the tokens of one group must differ in, as numbers of rows and in a word.

    Documents or values of a label; sequences, where the tokens asked for are of fewer documents than a group has tokens (one long
    text cut into many) and neighbors may be of the same document.
    """
    units, kind = unit_of_rows(capture, exclude), "document" if exclude in _NO_LABELS else exclude
    there = asked.cpu() & (capture.row_pos > 0)
    if exclude in ("self", "sequence") and len(units[there].unique()) < size:
        by_text = torch.tensor(texts_of_both(capture, capture)[0], device="cpu")
        if len(by_text[capture.row_seq][there].unique()) >= size:
            return by_text[capture.row_seq], "sequence"
    return units, kind


def units_of_both(capture: Capture, bank: Capture, exclude: str) -> tuple[Int[Tensor, " rows"], Int[Tensor, " bank"]]:
    """The same of a capture and a bank, in one numbering. A text that is in both is one unit."""
    names: list[object] = []
    for source, docs in zip((capture, bank), documents_of_both(capture, bank), strict=True):
        for labels, doc in zip(source.labels, docs, strict=True):
            label = None if exclude in _NO_LABELS else labels.get(exclude)
            names.append(("document", doc) if label is None else ("label", label))
    units = torch.tensor(joined(names, [text for side in texts_of_both(capture, bank) for text in side]), device="cpu")
    own, other = units.split([len(capture.sequences), len(bank.sequences)])
    return own[capture.row_seq], other[bank.row_seq]


def need_partners(capture: Capture, bank: Capture, plan: Plan, asked: Bool[Tensor, " rows"]) -> frozenset[str]:
    """Keys of the analyzers whose tokens' partners come from the bank: it was asked for, or documents are too few for a group.

    Raises:
        NeighborError: before any work, partners from the bank or fewer documents than a group has tokens, and a bank that is the
            texts themselves, or has too few documents of its own.
    """
    keys = set()
    for a in plan.of_neighbors:
        if a.crossing is not None:
            there = asked & (capture.row_pos > 0)
            documents = len(unit_of_rows(capture, a.exclude)[there].unique())
            named = a.crossing.partners == "bank"
            if not bool(there.any()) or (documents >= a.crossing.group and not named):
                continue  # that nobody was asked for is refused elsewhere
            if named and bank is capture:
                raise NeighborError(
                    f'expected another bank for {type(a).__name__} with partners="bank", got the texts themselves. Pass '
                    'bank="reference" or another capture, or partners="texts".'
                )
            kind = a.exclude if a.exclude not in ("self", "sequence", "nothing") else "document"
            if bank is capture:
                if len(grouping_units(capture, a.exclude, a.crossing.group, asked)[0][there].unique()) >= a.crossing.group:
                    continue
                raise NeighborError(
                    f"expected tokens of at least {a.crossing.group} different values of {kind!r} for {type(a).__name__}, whose "
                    f"groups of {a.crossing.group} hold one of each, got {documents} (copies of a text count once). Add texts, ask "
                    'for tokens of more of them, or pass bank="reference" or another capture, whose tokens then are the partners.'
                )
            own, other = units_of_both(capture, bank, a.exclude)
            mine, theirs = set(own[asked & (capture.row_pos > 0)].tolist()), set(other[bank.row_pos > 0].tolist())
            most = max((len(theirs - {unit}) for unit in mine), default=a.crossing.group)
            if most < a.crossing.group - 1:
                raise NeighborError(
                    f"expected a bank of at least {a.crossing.group - 1} different values of {kind!r} beside the tokens' own for "
                    f"{type(a).__name__}, whose tokens have partners from it, got {most} (copies of a text count once). Pass "
                    'bank="reference" or a capture of more texts.'
                )
            keys.add(a.key)
    return frozenset(keys)
