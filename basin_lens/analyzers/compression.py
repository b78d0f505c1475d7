"""The headline: contraction of a neighborhood that neither its place nor its directions explain."""

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role
from basin_lens.analyzers.crossed_table import Crossing, Displaced, PartnersFrom
from basin_lens.errors import NeighborError
from basin_lens.values import Whole, whole_or_none

_NULLS: tuple[Displaced, ...] = ("random_sets", "isotropic")


@dataclass(frozen=True)
class Compression(CloudScore):
    """Contraction of a token's neighborhood at home, beyond what its place does to other neighborhoods and other places to it.

    c(p, q) = log [ V(mu_p +- s D_q) / V(F_p(mu_p +- s D_q)) ], for the tokens p, q of a group
    compression = c(i, i) - compression_place - compression_directions + mean over p != q of c(p, q)
    compression_place = mean over q of c(i, q); compression_directions = mean over p of c(p, i); p, q: the others of i's group

    F_p: the block at token p; mu_p: the centroid of its k nearest neighbors; D_q: the displacements of q's neighbors from their
    own, with both signs; V: total variance over the layer's ordinary dimensions (left out: those whose variance in the bank is
    above 20 times the median, before or behind the block). It is the interaction of a two-way table, and so 0 for every token, to
    rounding, for the identity, any isometry, scaling, projection or other affine map, any context vector, any factor of the
    place. Positive: differences between the neighbors are drawn together more at home than elsewhere (a basin of this place).
    Negative: the block tells apart what is near home. Unit: nats. Range: all real numbers.

    `compression_random_sets` and `compression_isotropic` are the same over the same groups for other displacements, the nulls:
    those of random sets of the bank (of rows whose squared distance from the bank's median state is at most 20 times the median
    row's: an attention sink is most of the variance of a set that holds it, and nobody's near neighbor; provenance counts who is
    left out as `far_out`), each around its own centroid, and random directions with the neighbors' lengths around the
    neighbors' centroid. `compression_above_random_sets` is compression less that of the random sets: what a finding is of.
    `compression_at_home` (with `contractions`) is c(i, i), and `compression_at_home_random_sets`, `compression_at_home_isotropic`
    the same for the displacements of the nulls: what grows with the scale in it is what the block's linear part does not do.

    Groups are tokens of nearly equal log V_in, from different documents (or texts of different values of the label that `exclude`
    names), with no neighbor in common, matched among the tokens asked for; who finds no group is NaN: of prompts of one template,
    whose tokens at one place have the same neighbors, most may. With `partners="bank"` each token has partners of its own, from
    another capture: all are scored, and no text's score depends on the other texts. Intervals then are given this bank: all tokens
    draw their partners from it, and the error of that draw, shared by all, is not in them. Of one long text cut into
    sequences, or fewer documents than a group has tokens, they are from different sequences. Where the tokens asked for are of
    fewer documents than a group has tokens (a single prompt) and the bank is another capture, a token's partners are tokens
    of the bank, each in its own context: those of 512 drawn with the seed that are nearest in log V_in. Provenance has, by layer,
    whose the partners are (`"texts"` or `"bank"`), the groups' number and spread, the dimensions left out, the median V_in of
    neighbors over that of random sets, and the reliability (Spearman-Brown) over halves of the displacements and over halves of
    the partners.

    A token costs 2 k group rows through the block (with partners from the bank 2 k group^2), and as many for each null.

    Args:
        k: neighbors.
        context: `"patched"` (the neighbor in the query's place), `"native"` (its own cached output), `"solo"` (alone at position
            0), `"attn"` (patched, up to `resid_mid`), `"mlp"` (from `resid_mid` on; neighbors and variances in `resid_mid`),
            `"affine"` (a global affine fit of the block, the linear null). Here not `"native"`, where a displaced state has no
            image.
        blocks: through how many blocks in a row, in the same context; NaN where fewer are left.
        metric: how neighbors are chosen: `"l2"` or `"cosine"`. V stays Euclidean.
        exclude: tokens never taken as neighbors: those of the same `"sequence"`, `"document"`, label, or only `"self"`.
        same_token: whether neighbors may (`"any"`), must (`"only"`) or must not (`"exclude"`) have the query's token id.
        position_0: whether tokens at position 0 may be neighbors (and random points of the nulls, unless they are far out): mostly
            attention sinks, whose states can be 1,000 times the others. Never queries.
        choice: the `"nearest"`; as controls `"random"` points, or `"radius_matched"` ones (the neighbors of another token
            whose neighborhood is just as tight). Or a rule of your own, a function (distances, tokens, positions) -> rows: see
            `basin_lens.neighbors.own_sets`.
        name: of the first column, in place of `compression`; the other columns have it in front.
        group: tokens in a group.
        scale: s, the factor on the displacements.
        queries: at most so many tokens per layer, a seeded sample; None: all.
        per_sequence: with `queries`, so many tokens of one sequence before the next is taken, sequences in a seeded order, one of
            each document before a second one: what is correlated within a text needs several tokens of it. Which tokens, is drawn
            from the sequence alone; they are those that `Erasure` draws. None: a sample of all tokens alike.
        nulls: pass the displacements of the nulls, too: True for both, False for none, or the names of some, as `("random_sets",)`;
            without them there are no columns for them.
        partners: other tokens of the `"texts"`, or `"bank"`, which must be another capture (or `"reference"`).
        contractions: also the contraction at home.

    Shapes: crossed tables `[q / group, group, group]` -> `[q]`.

    Raises:
        NeighborError: a group below 3, a scale that is not positive, fewer queries than a group has tokens, no token per sequence,
            k below 4 or above the bank, an unknown option, texts that are their own bank and fewer documents than a group has
            tokens, or `context="native"`.

    Source: design of basin_lens; the interaction of a two-way table is Fisher's.

    Example:
        >>> import basin_lens as bl
        >>> [column.name for column in bl.analyzers.Compression(nulls=False).columns]
        ['compression', 'compression_place', 'compression_directions']
    """

    role: ClassVar[Role] = "score"
    group: Whole = 4
    scale: float | int = 1.0
    queries: Whole | None = None
    per_sequence: Whole | None = None
    nulls: bool | tuple[Displaced, ...] = True
    contractions: bool = False
    partners: PartnersFrom = "texts"
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "crossed", "halves"})

    @property
    def max_queries(self) -> int | None:
        """Tokens measured per layer."""
        return None if self.queries is None else int(self.queries)

    @property
    def max_per_sequence(self) -> int | None:
        """Tokens of a sequence before the next is taken."""
        return None if self.per_sequence is None else int(self.per_sequence)

    @property
    def crossing(self) -> Crossing:
        """Groups, scale, and whose displacements are passed."""
        return Crossing(int(self.group), float(self.scale), ("neighbors", *self._nulls), self.partners)

    @property
    def _nulls(self) -> tuple[Displaced, ...]:
        return (_NULLS if self.nulls else ()) if isinstance(self.nulls, bool) else self.nulls

    @property
    def columns(self) -> tuple[Column, ...]:
        first = self.name or "compression"
        names = [first, *(f"{first}_{part}" for part in ("place", "directions", *self._nulls))]
        if "random_sets" in self._nulls:
            names.append(f"{first}_above_random_sets")
        if self.contractions:
            names += [f"{first}_at_home", *(f"{first}_at_home_{kind}" for kind in self._nulls)]
        return tuple(Column(name, "nats") for name in names)

    def check(self) -> None:
        super().check()
        kind = type(self).__name__
        if self.context == "native":
            raise NeighborError(
                f'expected a context that passes states for {kind}, got "native": neighbors displaced to another place are no '
                'tokens of the bank, and have no cached output. Use context="patched".'
            )
        if self.k < 4:
            raise NeighborError(f"expected k of at least 4 for {kind}, whose reliability is over halves of them, got {self.k!r}.")
        if (whole_or_none(self.group) or 0) < 3:
            raise NeighborError(f"expected group of at least 3 for {kind} (a token and two partners), got {self.group!r}.")
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not 0 < self.scale < math.inf:
            raise NeighborError(f"expected a positive scale for {kind}, got {self.scale!r}.")
        if self.queries is not None and (whole_or_none(self.queries) or 0) < self.group:
            raise NeighborError(f"expected queries of at least {self.group} for {kind}, one group, got {self.queries!r}.")
        if self.per_sequence is not None and (self.queries is None or (whole_or_none(self.per_sequence) or 0) < 1):
            raise NeighborError(
                f"expected per_sequence of at least 1, together with queries, for {kind}, got {self.per_sequence!r} with queries="
                f"{self.queries!r}."
            )
        known = isinstance(self.nulls, bool) or (isinstance(self.nulls, tuple) and set(self.nulls) <= set(_NULLS))
        if not known or len(set(self._nulls)) < len(self._nulls):
            raise NeighborError(f"expected nulls True, False or some of {_NULLS} for {kind}, each once, got {self.nulls!r}.")
        if not isinstance(self.contractions, bool):
            raise NeighborError(f"expected contractions True or False for {kind}, got {self.contractions!r}.")
        if self.partners not in get_args(PartnersFrom):
            raise NeighborError(f'expected partners "texts" or "bank" for {kind}, got {self.partners!r}.')

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        assert neighborhoods.crossed is not None
        kinds = self.crossing.displaced
        parts = {kind: neighborhoods.crossed[kind].parts() for kind in kinds}
        values = [*parts["neighbors"], *(parts[kind].interaction for kind in kinds[1:])]
        if "random_sets" in kinds:
            values.append(parts["neighbors"].interaction - parts["random_sets"].interaction)
        if self.contractions:
            values += [neighborhoods.crossed[kind].at_home for kind in kinds]
        return {column.name: value.flatten() for column, value in zip(self.columns, values, strict=True)}
