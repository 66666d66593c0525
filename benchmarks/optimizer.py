"""A step of `LiveAdamW` after a one-language batch against `torch.optim.AdamW`; BERT-base shape of 4 layers, 50%.

`python -m benchmarks.optimizer` prints the ratio of times (interleaved, pairwise) to the fastest form of torch's
optimiser, which it finds first. Both sides step the same model with the same gradients, those of a batch of one
language, and the results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy

import torch

import fastmask as fm
from benchmarks.__main__ import machine
from benchmarks.encoder import Encoder
from benchmarks.measure import Side, compare
from fastmask.optim.live import live_part, masked_parameters

__all__ = ["OptimizerStep"]

TARGET = 0.7


class OptimizerStep:
    """The same model and gradients twice: one for torch's AdamW, one for ours.

    Args:
        density: share of the heads and of the neurons that every language owns.
        languages: how many languages the batch holds.
    """

    def __init__(self, density: float, languages: int) -> None:
        encoder = Encoder(8, 128, density, languages)
        self.ours_model, self.ids = encoder.masked, encoder.ids
        self.ours = fm.LiveAdamW(self.ours_model.parameters(), lr=1e-4, model=self.ours_model)
        encoder.sides()[1].run()  # the optimiser sees where the gradients come from
        self.torch_model = copy.deepcopy(encoder.dense)
        for own, other in zip(self.torch_model.parameters(), self.ours_model.parameters(), strict=True):
            own.grad = None if other.grad is None else other.grad.clone()

    def torch_side(self, form: str) -> Side:
        """`torch.optim.AdamW` in one of its forms."""
        optimizer = torch.optim.AdamW(self.torch_model.parameters(), lr=1e-4, **{form: True})
        return Side(optimizer.step)

    def our_side(self) -> Side:
        """`LiveAdamW`."""
        return Side(self.ours.step)

    def live_share(self) -> float:
        """The share of the weights that a step has to move."""
        live = total = 0
        layers = [module for module in self.ours_model.modules() if isinstance(module, fm.MaskedLinear)]
        masked = masked_parameters(self.ours_model, layers)
        for parameter in self.ours_model.parameters():
            if parameter.grad is None:
                continue
            total += parameter.numel()
            found = None
            if parameter in masked:
                layer, of_bias = masked[parameter]
                found = live_part(layer.mask, frozenset(self.ids.tolist()), of_bias)
            live += parameter.numel() if found is None else int(found.keep().expand_as(parameter).sum())
        return live / total

    def check(self) -> None:
        """Take three steps on both sides: equal where a language is live, unmoved to the last bit elsewhere.

        Raises:
            RuntimeError: they are not; nothing is timed.
        """
        before = [parameter.detach().clone() for parameter in self.ours_model.parameters()]
        dead = self._dead()
        theirs, ours = self.torch_side("fused"), self.our_side()
        for _ in range(3):
            theirs.run()
            ours.run()
        names = [name for name, _ in self.torch_model.named_parameters()]
        sides = zip(names, before, dead, self.torch_model.parameters(), self.ours_model.parameters(), strict=True)
        for name, old, unmoved, expected, found in sides:
            if not torch.equal(found[unmoved], old[unmoved]):
                raise RuntimeError(f"dead weights of {name} have moved: nothing is timed")
            if not torch.allclose(found[~unmoved], expected[~unmoved], rtol=1e-5, atol=1e-7):
                raise RuntimeError(f"live weights of {name} are not where AdamW moves them: nothing is timed")

    def _dead(self) -> list[torch.Tensor]:
        """Flags of the dead weights of each parameter, from the dense masks."""
        layers = {p: layer for layer in self.ours_model.modules() if isinstance(layer, fm.MaskedLinear)
                  for p in layer.parameters()}  # fmt: skip
        found = []
        for parameter in self.ours_model.parameters():
            dead = torch.zeros_like(parameter, dtype=torch.bool)
            layer = layers.get(parameter)
            if layer is not None:
                keep = layer.mask.to_dense()[self.ids.unique()].any(0)
                if parameter.ndim == 2:
                    dead = ~keep
                elif layer.mask.kind == "rows":
                    dead = ~keep[:, 0]
            found.append(dead)
        return found


def fastest_form(step: OptimizerStep, seconds: float) -> str:
    """The form of `torch.optim.AdamW` that is the fastest here."""
    ratio = compare(step.torch_side("foreach"), step.torch_side("fused"), seconds)
    print(f"torch.optim.AdamW: foreach {ratio.baseline_ms:.1f} ms, fused {ratio.ours_ms:.1f} ms")
    return "fused" if ratio.median > 1 else "foreach"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer", description=__doc__)
    parser.add_argument("--seconds", type=float, default=15, help="time for the ratio (default: 15)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--density", type=float, default=0.5, help="share of heads and neurons (default: 0.5)")
    parser.add_argument("--languages", type=int, default=1, help="languages in the batch (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    step = OptimizerStep(options.density, options.languages)
    step.check()
    form = fastest_form(step, options.seconds / 5)
    ratio = compare(step.torch_side(form), step.our_side(), options.seconds)
    low, median, high = (1 / value for value in (ratio.high, ratio.median, ratio.low))  # as time, not as speed
    live = step.live_share()
    print(
        f"optimiser step, heads + neurons {options.density:.0%}, {options.languages} language(s), {live:.1%} of the "
        f"weights live: {median:.3f}x the time of {form} AdamW, quartiles {low:.3f}-{high:.3f} "
        f"(target <= {TARGET:.2f}x); {ratio.baseline_ms:.2f} -> {ratio.ours_ms:.2f} ms, {ratio.pairs} pairs"
    )
    print(machine())
    return 0 if median <= TARGET else 1


if __name__ == "__main__":
    raise SystemExit(main())
