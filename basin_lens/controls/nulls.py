"""Capture -> Capture with structure destroyed. The capture given is not changed."""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from basin_lens.capture import Capture, border_states, borders, with_states, with_tokens
from basin_lens.errors import CaptureError
from basin_lens.model import HookedModel
from basin_lens.values import hides_bars, whole_numbers

_CHUNK_VALUES = 1 << 24  # random weights held at once: 64 MiB in float32


@whole_numbers(CaptureError)
def shuffled_tokens(
    model: HookedModel, capture: Capture, *, block: int | None = None, seed: int = 0, progress: bool = True
) -> Capture:
    """The tokens of each sequence in random order, read again by the model: what word order does.

    Position 0 always stays, be it a BOS token or not: it is never scored, and attention sinks sit there. With `block=n` the tokens
    after it are cut into blocks of n (the last may be shorter); blocks change places and keep the order within. Sequences of one
    block stay as they are. Layers, documents and labels are the capture's; there is no text any more, so passages are gone,
    character offsets are -1 and spans are empty. The states are the model's own. They are held in memory.

    Args:
        model: the model that made the capture.
        capture: in memory or on disk.
        block: consecutive tokens that stay together; None: every token by itself.
        seed: of the order.
        progress: show a progress bar.

    Raises:
        CaptureError: another model; a block below 1, or so long that nothing moves; states that are not the model's own.

    Source: design of basin_lens; for shuffles of several sizes, Khandelwal et al. 2018, "Sharp nearby, fuzzy far away".

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> capture = bl.Capture.from_texts(model, "The cat sat on the mat.", layers=[0], progress=False)
        >>> shuffled = bl.controls.shuffled_tokens(model, capture, seed=0, progress=False)
        >>> sorted(shuffled.row_strings()) == sorted(capture.row_strings())
        True
    """
    size = 1 if block is None else block
    if size < 1:
        raise CaptureError(f"expected a block of at least 1 token, got {block}.")
    if not capture.settings.get("states_of_model", True):
        raise CaptureError(
            f"expected a capture of the model's own states, got a control ({capture.settings['controls'][-1]['name']}): its states "
            "would be replaced. Shuffle the tokens of the original capture."
        )
    if int(capture.lengths.max()) - 1 <= size:
        raise CaptureError(
            f"expected sequences of more than one block beyond position 0, got at most {int(capture.lengths.max()) - 1} tokens "
            f"and block={size}: nothing would move. Use a shorter block."
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = []
    for sequence in capture.sequences:
        rest = sequence.tokens[1:]
        pieces = [rest[first : first + size] for first in range(0, len(rest), size)]
        order = torch.randperm(len(pieces), generator=generator, device="cpu").tolist()
        tokens.append([sequence.tokens[0], *(token for index in order for token in pieces[index])])
    return with_tokens(model, capture, tokens, {"name": "shuffled_tokens", "seed": seed, "block": size}, progress=progress)


@whole_numbers(CaptureError)
def gaussian_states(capture: Capture, *, seed: int = 0, progress: bool = True) -> Capture:
    """States drawn from a Gaussian with the capture's own means and covariances: all that second moments say, and no more.

    y_b = mean_b + sum_n w_n (x_bn - mean_b) / sqrt(N), with independent standard normal w_n, the same at every border b

    x_bn is the state of token n, of N beyond position 0, at border b. The y of one token are jointly Gaussian over all captured
    borders, with exactly the capture's covariance within each border and between every two, consecutive or not. So a layer's
    output still follows from its input as well as linear regression can tell, while clusters, curvature and every other
    finer structure of neighborhoods are gone, as is any relation to the token. States at position 0 stay as they are and enter no
    moment.
    With N below twice the width, N tokens fix the sample covariance of input and output so far that the output follows from the
    input exactly: use more tokens than that to read anything into native contraction.

    The states are not the model's own: only contexts that do not run the block make sense (`"native"`, `"affine"`), and token
    analyzers are limited to those that read states. As the bank of the capture they were drawn from, they can be neighbors of its
    tokens in their own contexts (`"patched"`), too: what a score gives there it owes to second moments. Who may be whose neighbor
    is decided by tokens, as for the capture. For borders without relation: `permuted_layers(gaussian_states(capture))`. States are
    held in memory. Cost: N^2 d per border, as much as one exact neighbor search.

    Args:
        capture: in memory or on disk.
        seed: of the draw.
        progress: show a progress bar.

    Raises:
        CaptureError: fewer than two tokens beyond position 0.

    Source: design of basin_lens (the population covariance as a weighted sum of the points needs no matrix of d x d, and
    no full rank).

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> capture = bl.Capture.from_texts(model, "The cat sat on the mat.", layers=[0], progress=False)
        >>> bl.controls.gaussian_states(capture, seed=0, progress=False).settings["states_of_model"]
        False
    """
    rows = _beyond_first(capture)
    count = len(rows)
    made: dict[int, Tensor] = {}
    with tqdm(
        total=len(borders(capture)) * count, desc="drawing Gaussian states", unit="state", disable=hides_bars(progress)
    ) as bar:
        for border in borders(capture):
            states = border_states(capture, border).clone()
            mean = states[rows].double().mean(0)
            centered = (states[rows] - mean).float() / count**0.5
            # The same weights at every border make the draw joint; drawn again each time, because all N^2 would not fit.
            generator = torch.Generator("cpu").manual_seed(seed)
            for part in rows.split(max(1, _CHUNK_VALUES // count)):
                weights = torch.randn(len(part), count, generator=generator, dtype=torch.float32, device="cpu")
                states[part] = (weights @ centered + mean).float()
                bar.update(len(part))
            made[border] = states
    return with_states(capture, made, {"name": "gaussian_states", "seed": seed})


@whole_numbers(CaptureError)
def permuted_layers(capture: Capture, *, seed: int = 0) -> Capture:
    """The states of each border dealt out anew among the tokens beyond position 0: the clouds stay, their correspondence goes.

    Each border has its own permutation (that of a border does not depend on which others were captured), so the overlap of
    neighbors between layers is at chance and no state belongs to its token. Equal states are no longer known by
    their tokens: at layer 0 of models with rotary positions, where tokens of one id have one state, variances of neighborhoods
    are understated. The states are not the model's own: see `gaussian_states`. They are held in memory.

    Args:
        capture: in memory or on disk.
        seed: of the permutations.

    Raises:
        CaptureError: fewer than two tokens beyond position 0.

    Source: design of basin_lens.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> capture = bl.Capture.from_texts(model, "The cat sat on the mat.", layers=[0], progress=False)
        >>> bl.controls.permuted_layers(capture, seed=0).settings["controls"]
        [{'name': 'permuted_layers', 'seed': 0}]
    """
    rows = _beyond_first(capture)
    made: dict[int, Tensor] = {}
    for border in borders(capture):
        states = border_states(capture, border).clone()
        generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + border) % 2**63)
        states[rows] = states[rows[torch.randperm(len(rows), generator=generator, device="cpu")]]
        made[border] = states
    return with_states(capture, made, {"name": "permuted_layers", "seed": seed})


def _beyond_first(capture: Capture) -> Tensor:
    rows = torch.nonzero(capture.row_pos > 0).squeeze(1)
    if len(rows) < 2:
        raise CaptureError(f"expected at least two tokens beyond position 0, got {len(rows)}. Capture more text.")
    return rows
