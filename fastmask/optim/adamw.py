"""`LiveAdamW`: AdamW that moves only what is live for some language of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from fastmask.errors import unknown
from fastmask.linear import MaskedLinear
from fastmask.live import WHOLE, Live, live_in, masked_parameters
from fastmask.masks import FULL, Mask
from fastmask.models.attach import attached
from fastmask.optim.arrivals import Arrivals
from fastmask.optim.compact import CompactState
from fastmask.optim.rows import RowUpdate
from fastmask.optim.step import Views, take_step

__all__ = ["LiveAdamW"]

Languages = Tensor | Iterable[int | str] | int | str


class LiveAdamW(torch.optim.AdamW):
    """AdamW over a model with subnetworks, which leaves alone what no language of the batch owns.

    Momentum and weight decay of an ordinary AdamW move a weight in every step, also where all examples of the batch are
    of languages whose mask leaves it out. Here a step moves the slices that are live for at least one language of the
    batch, and nothing else: elsewhere parameters and moments stay as they are to the last bit, even where the gradient
    holds NaN. Parameters without a mask, and tied ones, move as a whole, but for a sparse gradient (an embedding made
    with `sparse=True`): it moves the rows that it holds, and no others. Where all is live it is `torch.optim.AdamW`.

        model = fm.attach(model, subnets)
        optimizer = fm.LiveAdamW(model.parameters(), lr=5e-5, model=model)
        ...                                      # an ordinary loop, with `accelerate`, a `GradScaler`, a scheduler

    The languages of a step are those that its gradients came from: the masked layers of `model` are watched, and what
    arrives in `.grad` until it is set to zero counts, over accumulated batches and over all processes of
    `torch.distributed`. What cannot be watched has to be said, with `step(languages=...)` or, where somebody else calls
    `step`, with `announce` before: compiled models, gradients written by hand (Reptile), layers attached after the
    last `zero_grad`, `step` or `load_state_dict`. Language ids on a GPU are read at the step, which waits for the GPU;
    `announce` ids of the CPU to avoid that. Masks are looked up at each step, so they may change in between.

    State: as `torch.optim.AdamW`: `step`, `exp_avg` and `exp_avg_sq` of each parameter, and its `state_dict` is loaded
    here. Where all languages of a mask together own at most half of a parameter (of a mask over single weights, a
    sixteenth), and no batch was of the full network, moments are kept of that part alone; the state dict says of which
    part under "held", and `torch.optim.AdamW` does not load it. `step`, which the bias correction reads, counts the
    steps in which the *parameter* had a gradient, not those in which a slice was live: all slices of a parameter share
    one correction, as the rows of an embedding do in `torch.optim.SparseAdam`. The moments of a slice decay only in the
    steps that move it. The price: moments that are still zero after many steps are corrected too little, so a slice
    that is live for the first time late moves up to 6.6 times as far (default betas, constant gradient) as a new
    parameter would, for some tens of steps. Slices that were trained before the subnetworks were attached, or that any
    language owns from the start, do not pay it.

    On a GPU one Triton kernel steps what is live (float32, float16, bfloat16). On a CPU PyTorch's fused step does,
    which knows no gaps: where half of the heads and neurons live, it takes two to three times as long as where all do,
    and half as long where one language owns a tenth of them.

    Args:
        params: parameters or groups, as for `torch.optim.AdamW`; not all of them need be of `model`.
        lr, betas, eps, weight_decay, maximize: as there.
        model: the model (or a part of it, or a wrapper around it) whose `MaskedLinear` layers say what is live.
            Subnetworks may be attached to it later.
        process_group: of the processes that share their gradients; None: all.

    Raises:
        TypeError: `model` is no module, or a parameter keeps its numbers in other tensors (sharded by FSDP, quantised).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        model: nn.Module,
        maximize: bool = False,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected the model as an nn.Module, given {type(model).__name__}")
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)
        self.model, self.process_group = model, process_group
        self._announced: set[int] | None = None
        self._arrivals = Arrivals()
        # The model's modules and masked layers when they were last looked at, and the parameters that have a mask.
        self._seen: tuple[list[nn.Module], list[tuple[str, int, bool]]] = ([], [])
        self._layers: list[MaskedLinear] = []
        self._masked: dict[Tensor, MaskedLinear] = {}
        # What lives of those for the languages and masks of the last step, as the next is often like it.
        self._live_for: tuple[set[int], list[Mask], dict[Tensor, Live]] = (set(), [], {})
        self._views: Views = {}
        self._compact = CompactState()
        self._look()

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, languages: Languages | None = None) -> Any:
        """Take a step, and return what the closure returned.

        Args:
            closure: computes the loss and the gradients again, before the step.
            languages: of the batch (of all accumulated batches): names, or ids as ints or an int64 tensor, -1 for the
                full network. None: those that were announced, or that the gradients came from.

        Raises:
            RuntimeError: a masked layer has a gradient that came from nowhere, or from before a language was removed,
                and no languages are given; a parameter is a shard of a weight.
            KeyError, ValueError: an unknown name, an id out of range. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [[(p, p.grad) for p in group["params"] if p.grad is not None] for group in self.param_groups]
        self._look()
        live = self._live(languages)
        if any(gradient.is_sparse and p in live for of_group in moved for p, gradient in of_group):
            raise RuntimeError("LiveAdamW does not support sparse gradients of a weight that has a mask")
        for p, part in live.items():
            whole = part.shape if p is self._masked[p].weight else part.shape[:1]
            if part.kind != "whole" and tuple(p.shape) != whole:
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} is not the whole weight {whole} that its mask is for: "
                    "with parameters in shards (FSDP, ZeRO), use torch.optim.AdamW"
                )
        for group, of_group in zip(self.param_groups, moved, strict=True):
            dense = [(p, gradient) for p, gradient in of_group if not gradient.is_sparse]
            updates = [
                self._compact.update(p, gradient, self._state_of(p), live.get(p, WHOLE)) for p, gradient in dense
            ]
            by_rows = [RowUpdate(p, gradient, self._state_of(p)) for p, gradient in of_group if gradient.is_sparse]
            options = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize")}
            options |= zip(("beta1", "beta2"), map(float, group["betas"]), strict=True)
            take_step([*updates, *(rows.update for rows in by_rows)], options, self._views)
            for (p, _), update in zip(dense, updates, strict=True):
                self._compact.put_back(p, update, self.state[p])
            for rows in by_rows:
                rows.put_back()
        self._announced = None
        return loss

    def announce(self, languages: Languages) -> None:
        """Say which languages the next step is about, in place of those noticed or announced before.

        For loops that call `step` without arguments, as `accelerate` and `transformers.Trainer` do.

        Args, raises: as `languages` of `step`.
        """
        self._announced = self._ids(languages)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; gradients that are zero come from no language."""
        super().zero_grad(set_to_none)
        self._look()
        self._arrivals.forget()

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, which is made at its first step, as torch does."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=_step_device(parameter))
            layer = self._masked.get(parameter)
            owned = WHOLE if layer is None else live_in(layer, parameter, range(layer.mask.n_languages))
            state["exp_avg"], state["exp_avg_sq"] = (self._compact.begin(parameter, owned) for _ in range(2))
        return state

    # ---- what is live

    def _look(self) -> None:
        """Find the masked layers as they are now, and watch those that are new."""
        modules = list(self.model.modules())
        layers = [module for module in modules if isinstance(module, MaskedLinear)]
        own = [(layer.mask.kind, p) for layer in layers for p in (layer.weight, layer.bias)]
        seen = modules, [(kind, id(p), p is not None and p.requires_grad) for kind, p in own]
        if seen != self._seen:
            self._seen, self._layers, self._masked = seen, layers, masked_parameters(self.model)
            self._live_for = (set(), [], {})
            self._arrivals.watch(layers)

    def _live(self, languages: Languages | None) -> dict[Tensor, Live]:
        """What lives of each parameter that has a mask."""
        ids = self._announced if languages is None else self._ids(languages)
        ids = self._of_all_processes(self._arrived() if ids is None else ids)
        masks = [layer.mask for layer in self._layers]
        if self._live_for[:2] != (ids, masks):
            self._live_for = (ids, masks, {p: live_in(layer, p, ids) for p, layer in self._masked.items()})
            self._views.clear()
        return self._live_for[2]

    def _arrived(self) -> set[int]:
        """The languages that the gradients of masked parameters came from."""
        ids: set[int] = set()
        for layer in self._layers:
            if all(parameter is None or parameter.grad is None for parameter in (layer.weight, layer.bias)):
                continue  # what arrived is gone
            arrived = self._arrivals.languages(layer)
            if not arrived:
                name = next(name for name, module in self.model.named_modules() if module is layer)
                raise RuntimeError(
                    f"the gradient of {name!r} came from no forward pass that was seen, so its languages are not "
                    "known: call step(languages=...), or announce(...) before the step"
                )
            ids |= arrived
        return ids

    def _ids(self, languages: Languages) -> set[int]:
        """Language ids of names, ids or a tensor of ids."""
        if isinstance(languages, Tensor):
            if languages.dtype != torch.int64:
                raise ValueError(f"expected languages as an int64 tensor, given {languages.dtype}")
            languages = languages.flatten().tolist()
        ids = {self._id(i) for i in ([languages] if isinstance(languages, (int, str)) else languages)}
        if not ids:
            raise ValueError("expected at least one language, given none (-1 is the full network)")
        return ids

    def _id(self, language: int | str) -> int:
        if isinstance(language, str):
            owners = [module for module in self.model.modules() if "_fastmask" in vars(module)]
            names = {attached(owner).subnets.languages for owner in owners}
            if len(names) > 1:
                raise ValueError(
                    "parts of the model have subnetworks of different languages attached: give ids, not names"
                )
            known = next(iter(names), ())
            if language not in known:
                raise unknown("language", language, known)
            return known.index(language)
        if isinstance(language, bool) or not isinstance(language, int):
            raise ValueError(f"expected languages as names or ids, given {language!r}")
        limit = min((layer.mask.n_languages for layer in self._layers), default=language + 1)
        if not FULL <= language < limit:
            raise ValueError(
                f"language id {language} is out of range: expected 0 to {limit - 1}, or -1 for the full network"
            )
        return language

    def _of_all_processes(self, ids: set[int]) -> set[int]:
        """The union over the processes, which all take the same step."""
        alone = not (distributed.is_available() and distributed.is_initialized())
        if alone or not self._masked or distributed.get_world_size(self.process_group) == 1:
            return ids
        parameter, layer = next(iter(self._masked.items()))
        present = torch.zeros(layer.mask.n_languages + 1, dtype=torch.int32)
        present[[language + 1 for language in ids]] = 1
        present = present.to(parameter.device)
        distributed.all_reduce(present, distributed.ReduceOp.MAX, group=self.process_group)
        return {place - 1 for place in present.nonzero().flatten().tolist()}

    # ---- settings and checkpoints

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.

        Raises:
            TypeError: a parameter that keeps its numbers in other tensors (sharded by FSDP, quantised).
            ValueError: the group asks for what this optimizer does not do.
        """
        _refuse(param_group)
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:  # torch has made a list of whatever was given
            if hasattr(p, "__tensor_flatten__"):
                self.param_groups.pop()
                raise TypeError(
                    f"LiveAdamW takes plain tensors, given a {type(p).__name__} of shape {tuple(p.shape)}: with "
                    "parameters in shards (FSDP), use torch.optim.AdamW"
                )

    def state_dict(self) -> dict[str, Any]:
        """As in torch; where only a part of a parameter has moments, "held" says which one."""
        return self._compact.saved(super().state_dict(), self._parameters())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch: a state of this optimizer, or of `torch.optim.AdamW` in any of its forms.

        Raises:
            ValueError: a state with amsgrad, or of other parameters. Nothing has changed then.
        """
        for group in state_dict["param_groups"]:
            _refuse(group)
        before = self._compact
        self._compact = CompactState()
        try:
            super().load_state_dict(self._compact.loaded(state_dict, self._parameters()))
        except BaseException:
            self._compact = before
            raise
        for p, state in self.state.items():
            if "step" in state:  # a number in old states, and on the GPU or not by the form of torch's optimizer
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=_step_device(p))
        self._look()  # a run that resumes has attached its subnetworks just before

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a LiveAdamW belongs to its model and cannot be copied or pickled: use its state_dict")


def _step_device(parameter: Tensor) -> torch.device:
    """Where the count of steps is: with a parameter on a GPU, whose kernels read it; as in torch's fused step."""
    return parameter.device if parameter.is_cuda else torch.device("cpu")


def _refuse(group: Mapping[str, Any]) -> None:
    for setting in ("amsgrad", "differentiable"):
        if group.get(setting):
            raise ValueError(f"LiveAdamW does not support {setting}=True")
