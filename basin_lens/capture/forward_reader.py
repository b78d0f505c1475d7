"""One forward pass over a batch that collects what a `PassSchedule` asks for."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.capture.batches import TokenBatch, TokenMeasure, measured_values
from basin_lens.capture.passes import Passes, target_values
from basin_lens.capture.schedule import PassSchedule
from basin_lens.model import HookedModel, device_of, forward_pass, measuring, output_weight, pass_until, point_name


class ForwardReader:
    """Reads one batch: states at block borders, and the values of token analyzers.

    What an analyzer reads is dropped as soon as it has run, so that attention patterns are never held for more than one layer.

    Args:
        model: a hooked model.
        schedule: what to collect.
        tokens: token ids, padded on the right.
        valid: which of them are real.
        keep: called with each analyzer, layer and its values.
        refuse_nonfinite: called with each kept border and its states; raises if they are not finite.
    """

    def __init__(
        self,
        model: HookedModel,
        schedule: PassSchedule,
        tokens: Int[Tensor, "batch pos"],
        valid: Bool[Tensor, "batch pos"],
        keep: Callable[[TokenMeasure, int, Mapping[str, Tensor]], None],
        refuse_nonfinite: Callable[[int, Tensor], None],
    ) -> None:
        self.model, self.schedule, self.keep, self.refuse_nonfinite = model, schedule, keep, refuse_nonfinite
        device = device_of(model)
        with torch.inference_mode(False):  # tensors made under a caller's inference_mode cannot take part in a backward pass
            self.tokens, self.valid = tokens.clone().to(device), valid.clone().to(device)
        self._passes = Passes(model, self.tokens, self.valid)
        self._memories: dict[str, dict[str, Tensor]] = {a.key: {} for a in schedule.analyzers}
        self._held: dict[int, dict[str, Tensor]] = {layer: {} for layer in schedule.visited}
        self._live: dict[int, Tensor] = {}  # states that gradients are taken with respect to, by layer
        self._states: dict[int, Tensor] = {}

    def read(self) -> dict[int, Float[Tensor, "rows d"]]:
        """Run the model once, and once backwards for each target; to be called once.

        Returns:
            states of the real tokens by border, float32, on the CPU.
        """
        schedule = self.schedule
        gradients = bool(schedule.of_gradients)
        with measuring(self.model, gradients=gradients):
            shown: dict[str, Tensor] = {}
            if schedule.ends_early:
                readers = self._readers()
                pass_until(self.model, self.tokens, readers, self._point_of(schedule.read_borders[-1]))
            else:
                logits = forward_pass(self.model, self.tokens, self._readers(), gradients=gradients)
                shown["logits"] = logits.detach().float() if schedule.needs_logits else logits.detach()
                self._run_gradients(logits, shown["logits"])
                del logits
            self._live.clear()
            for analyzer in schedule.at_end:
                for layer in schedule.looks[analyzer.key]:
                    self._run(analyzer, layer, **shown)
        return self._states

    def _readers(self) -> dict[str, Callable[[Tensor], Tensor | None]]:
        readers: dict[str, Callable[[Tensor], Tensor | None]] = {}
        for border in self.schedule.read_borders:
            readers[self._point_of(border)] = partial(self._read_state, border)
        for need, layer in self.schedule.read_points:
            readers[point_name(need, layer)] = partial(self._read_point, need, layer)
        return readers

    def _point_of(self, border: int) -> str:
        """Where a border is read: at the start of the block behind it, and behind the last one at its end."""
        count = self.schedule.n_layers
        return point_name("resid_pre", border) if border < count else point_name("resid_post", count - 1)

    def _read_point(self, need: str, layer: int, value: Tensor) -> None:
        self._held[layer][need] = value.detach().float()

    def _read_state(self, border: int, state: Tensor) -> None:
        if border in self.schedule.borders:
            self._states[border] = state.detach()[self.valid].float().cpu()
            self.refuse_nonfinite(border, self._states[border])
        if border in self._held:
            if self.schedule.wants("gradient", border, self.schedule.analyzers):
                self._live[border] = state
            if self.schedule.wants("resid_pre", border, self.schedule.analyzers):
                self._held[border]["resid_pre"] = state.detach().float()
        # The state leaving a block closes it: all that its analyzers need has been read by then.
        if border - 1 in self._held:
            self._close(border - 1, state)

    def _close(self, layer: int, state: Tensor) -> None:
        """Run the analyzers of a layer whose block the state has just left, and drop what no other analyzer needs."""
        schedule = self.schedule
        if schedule.wants("resid_post", layer, schedule.analyzers):
            self._held[layer]["resid_post"] = state.detach().float()
        for analyzer in schedule.at_layer:
            if layer in schedule.looks[analyzer.key]:
                self._run(analyzer, layer)
        self._held[layer] = {need: value for need, value in self._held[layer].items() if schedule.wanted_later(need, layer)}

    def _run_gradients(self, logits: Float[Tensor, "batch pos vocab"], shown: Float[Tensor, "batch pos vocab"]) -> None:
        """One backward pass for each target, and the analyzers of its gradients."""
        targets = self.schedule.targets
        for left, target in enumerate(reversed(targets)):
            total = target_values(logits, self.tokens, self.valid, target).sum()
            slopes = torch.autograd.grad(total, list(self._live.values()), retain_graph=left + 1 < len(targets))
            for layer, slope in zip(self._live, slopes, strict=True):
                for analyzer in self.schedule.of_gradients:
                    if analyzer.target == target and layer in self.schedule.looks[analyzer.key]:
                        self._run(analyzer, layer, gradient=slope.float(), logits=shown)

    def _run(self, analyzer: TokenMeasure, layer: int, **more: Tensor) -> None:
        """Let an analyzer look at a layer, and keep its values if the layer was asked for."""
        schedule = self.schedule
        values = {need: value for need, value in {**self._held[layer], **more}.items() if need in analyzer.needs}
        if "output_weight" in analyzer.needs:
            values["output_weight"] = output_weight(self.model, layer)
        passes = self._passes if "passes" in analyzer.needs else None
        memory = self._memories[analyzer.key]
        with torch.no_grad():
            batch = TokenBatch(layer, schedule.n_layers, self.tokens, self.valid, values, memory, passes)
            measured = measured_values(analyzer, batch)
        if layer in schedule.layers:
            self.keep(analyzer, layer, measured)
