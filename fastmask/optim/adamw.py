"""`LiveAdamW`: AdamW that moves only what is live for some language of the batch.

It asks which languages gradients come from (`noticed`), and keeps moments of what may learn: of a parameter of which
languages own little, what a step reads and writes is copied out, stepped like a smaller parameter, and put back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastmask.errors import unknown
from fastmask.linear import MaskedLinear
from fastmask.live import WHOLE, Live, live_in, masked_parameters
from fastmask.masks import Mask, checked_id
from fastmask.models.attach import number_of
from fastmask.optim.noticed import Later, Note, carrier_of, names_of
from fastmask.optim.step import Update, Views, take_step, update_of_rows

# Share of a parameter above which copying out and back takes more time than all that it saves: single weights lie
# apart, and above their share their places are not kept either (`Live`), and found anew in each step.
LITTLE, LITTLE_OF_WEIGHTS = 1 / 2, 1 / 16
HELD = "held"  # in a state dict, beside the moments: which part of the parameter they are of

Languages = Tensor | Iterable[int | str] | int | str


class LiveAdamW(torch.optim.AdamW):
    """AdamW over a model with subnetworks, which leaves alone what no language of the batch owns.

    Momentum and weight decay of an ordinary AdamW move a weight in every step, also where all examples of the batch are
    of languages whose mask leaves it out. Here a step moves what is live for at least one language of the batch, and
    nothing else: elsewhere parameters and moments stay as they are to the last bit, even where the gradient holds NaN.
    Parameters without a mask, and tied ones, move as a whole, but for a sparse gradient (an embedding made with
    `sparse=True`): it moves the rows that it holds, and no others. Where all is live it is `torch.optim.AdamW`.

        model = fm.attach(model, subnets)
        optimizer = fm.LiveAdamW(model.parameters(), lr=5e-5, model=model)
        ...                                      # an ordinary loop, with `accelerate`, a `GradScaler`, a scheduler

    The languages of a step are those that its gradients came from: the masked layers of `model` are watched, and what
    arrives in `.grad` until it is set to zero counts, over accumulated batches and over all processes of
    `torch.distributed`. What cannot be watched has to be said, with `step(languages=...)` or, where somebody else calls
    `step`, with `announce` before: compiled models, gradients written by hand (Reptile), layers attached after the
    last `zero_grad`, `step` or `load_state_dict`. Language ids on a GPU are read at the step, which waits for the GPU;
    `announce` ids of the CPU to avoid that. (A set of languages that is new waits as well: its masks are read once.)
    Masks are looked up at each step, so they may change in between.

    State: `step`, `exp_avg` and `exp_avg_sq` of each parameter, as of `torch.optim.AdamW`, whose `state_dict` is loaded
    here. Where all languages of a mask together own at most half of a parameter (of a mask over single weights, a
    sixteenth), and no batch was of the full network, moments are kept of that part alone; the state dict says of which
    part under "held", and `torch.optim.AdamW` does not load it. `step`, which the bias correction reads, counts the
    steps in which the *parameter* had a gradient, as for the rows of an embedding in `torch.optim.SparseAdam`, and the
    moments of a slice decay only in the steps that move it. The price: a slice that is live for the first time late
    moves up to 6.6 times as far (default betas, constant gradient) as a new parameter would, for some tens of steps.
    Slices that were trained before the subnetworks were attached, or that any language owns from the start, do not pay
    it.

    On a GPU one Triton kernel steps what is live (float32, float16, bfloat16), on a CPU PyTorch's fused step, which
    knows no gaps (docs/limitations.md).

    Args:
        params: parameters or groups, as for `torch.optim.AdamW`; not all of them need be of `model`.
        lr, betas, eps, weight_decay, maximize: as there.
        model: the model (or a part of it, or a wrapper around it) whose `MaskedLinear` layers say what is live.
            Subnetworks may be attached to it later.

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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected the model as an nn.Module, given {type(model).__name__}")
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)
        self.model = model
        self._announced: set[int] | None = None
        # The model's modules and masked layers when they were last looked at, and the parameters that have a mask.
        self._seen: tuple[list[nn.Module], list[tuple[str, int, bool]]] = ([], [])
        self._layers: list[MaskedLinear] = []
        self._masked: dict[Tensor, MaskedLinear] = {}
        self._notes: weakref.WeakKeyDictionary[nn.Module, Note] = weakref.WeakKeyDictionary()
        self._hooked: Any = WeakIdKeyDictionary()
        # Hooks of an optimizer that is gone would run for as long as the model is trained.
        self._hooks = ExitStack()
        weakref.finalize(self, self._hooks.close).atexit = False
        # What lives for the languages and masks of the last step, as the next is often like it.
        self._live_for: tuple[set[int], list[Mask]] | None = None
        self._live: dict[Tensor, Live] = {}
        self._views: Views = {}
        # The part that a parameter's moments are of, where they are compact; and the part that moved last, and what it
        # is of that one.
        self._held: dict[Tensor, Live] = {}
        self._within: dict[Tensor, tuple[Live, Live]] = {}
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
        self._look()
        live = self._live_parts(languages)
        if any(p.grad is not None and p.grad.is_sparse for p in live):
            raise RuntimeError("LiveAdamW does not support sparse gradients of a weight that has a mask")
        for group in self.param_groups:
            updates = [self._update(p, live.get(p, WHOLE)) for p in group["params"] if p.grad is not None]
            options = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize")}
            options |= zip(("beta1", "beta2"), map(float, group["betas"]), strict=True)
            take_step(updates, options, self._views)
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
        for note in self._notes.values():
            note.arrived = []

    def _update(self, p: Tensor, part: Live) -> Update:
        """The step of a part of a parameter, whose state is made at its first step, as torch does."""
        state: dict[str, Tensor] = self.state[p]
        assert p.grad is not None
        if not state:
            layer = self._masked.get(p)
            owned = WHOLE if layer is None else live_in(layer, p, range(layer.mask.n_languages))
            if _is_little(owned):
                self._held[p] = owned
            like = owned.read(p) if _is_little(owned) else p
            state["step"] = torch.zeros((), device=_step_device(p))
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(like), torch.zeros_like(like)
        if p.grad.is_sparse:
            return update_of_rows(p, p.grad, state)
        within = self._within_held(p, state, part) if p in self._held else None
        if within is None:
            return Update(p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], part)
        held, moments = self._held[p], (state["exp_avg"], state["exp_avg_sq"])
        copy = held.read(p)
        flat = [tensor.view(1, -1) for tensor in (copy, held.read(p.grad), *moments)]
        return Update(flat[0], flat[1], flat[2], flat[3], state["step"], within, lambda: held.write(p, copy))

    def _within_held(self, p: Tensor, state: dict[str, Tensor], part: Live) -> Live | None:
        """What a part is of that which compact moments are of, and which grows by it; None once that is everything."""
        if p in self._within and self._within[p][0] is part:
            return self._within[p][1]
        held = self._held[p]
        within = part.within(held, p)
        if within is None:
            wide = held.joined(part)
            for name in ("exp_avg", "exp_avg_sq"):
                whole = torch.zeros_like(p)
                held.write(whole, state[name])
                state[name] = wide.read(whole) if _is_little(wide) else whole
            if not _is_little(wide):
                del self._held[p]
                self._within.pop(p, None)
                return None
            self._held[p], within = wide, part.within(wide, p)
            assert within is not None
        self._within[p] = part, within
        return within

    # ---- what is live

    def _look(self) -> None:
        """Find the masked layers as they are now, and hook those that are new (attached since)."""
        modules = list(self.model.modules())
        layers = [module for module in modules if isinstance(module, MaskedLinear)]
        own = [(layer.mask.kind, p) for layer in layers for p in (layer.weight, layer.bias)]
        seen = modules, [(kind, id(p), p is not None and p.requires_grad) for kind, p in own]
        if seen == self._seen:
            return
        self._seen, self._layers, self._masked = seen, layers, masked_parameters(self.model)
        self._live_for = None
        for layer in layers:
            note, carrier = self._notes.get(layer), carrier_of(layer)
            if note is None:
                note = self._notes[layer] = Note()
                self._hooks.callback(layer.register_forward_hook(note.passed_forward, with_kwargs=True).remove)
            # Layers may share a parameter: each notes what came through it.
            if carrier is not None and layer not in self._hooked.setdefault(carrier, weakref.WeakSet()):
                self._hooks.callback(carrier.register_hook(partial(note.gradient_is_coming, weakref.ref(layer))).remove)
                self._hooks.callback(carrier.register_post_accumulate_grad_hook(note.gradient_has_come).remove)
                self._hooked[carrier].add(layer)

    def _live_parts(self, languages: Languages | None) -> dict[Tensor, Live]:
        """What lives of each parameter that has a mask."""
        ids = self._announced if languages is None else self._ids(languages)
        ids = self._of_all_processes(self._arrived() if ids is None else ids)
        masks = [layer.mask for layer in self._layers]
        if self._live_for != (ids, masks):
            live = {p: live_in(layer, p, ids) for p, layer in self._masked.items()}
            for p, part in live.items():
                whole = part.shape if p is self._masked[p].weight else part.shape[:1]
                if part.kind != "whole" and tuple(p.shape) != whole:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(p.shape)} is not the whole weight {whole} that its mask is for: "
                        "with parameters in shards (FSDP, ZeRO), use torch.optim.AdamW"
                    )
            self._live_for, self._live, self._views = (ids, masks), live, {}
        return self._live

    def _arrived(self) -> set[int]:
        """The languages that the gradients of masked parameters came from."""
        ids: set[int] = set()
        for layer in self._layers:
            if all(parameter is None or parameter.grad is None for parameter in (layer.weight, layer.bias)):
                continue  # what arrived is gone
            note, now = self._notes[layer], names_of(layer)
            if any(then != now[: len(then)] for _, then in note.arrived):
                raise RuntimeError(
                    "a language was removed since the gradients came, and ids are those of others now: set them to "
                    "zero, or call step(languages=...)"
                )
            if not note.arrived:
                name = next(name for name, module in self.model.named_modules() if module is layer)
                raise RuntimeError(
                    f"the gradient of {name!r} came from no forward pass that was seen, so its languages are not "
                    "known: call step(languages=...), or announce(...) before the step"
                )
            own = {i for given, _ in note.arrived for i in (given.read() if isinstance(given, Later) else given)}
            note.arrived = [(tuple(own), now)]  # ids on a GPU are read once
            ids |= own
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
            if not self._layers:
                raise unknown("language", language, ())
            return number_of(self.model, language)
        if isinstance(language, bool) or not isinstance(language, int):
            raise ValueError(f"expected languages as names or ids, given {language!r}")
        return checked_id(language, min((layer.mask.n_languages for layer in self._layers), default=language + 1))

    def _of_all_processes(self, ids: set[int]) -> set[int]:
        """The union over the processes, which all take the same step."""
        alone = not (distributed.is_available() and distributed.is_initialized())
        if alone or not self._masked or distributed.get_world_size() == 1:
            return ids
        parameter, layer = next(iter(self._masked.items()))
        present = torch.zeros(layer.mask.n_languages + 1, dtype=torch.int32, device="cpu")
        present[[language + 1 for language in ids]] = 1
        present = present.to(parameter.device)
        distributed.all_reduce(present, distributed.ReduceOp.MAX)
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
        state_dict = super().state_dict()
        for number, p in enumerate(self._parameters()):
            if p in self._held:
                state_dict["state"][number] = {**state_dict["state"][number], HELD: self._held[p].encoded()}
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch: a state of this optimizer, or of `torch.optim.AdamW` in any of its forms.

        Raises:
            ValueError: a state with amsgrad, or of other parameters. Nothing has changed then.
        """
        for group in state_dict["param_groups"]:
            _refuse(group)
        held: dict[Tensor, Live] = {}
        states = dict(state_dict["state"])
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, self._parameters(), strict=False):  # torch says what is wrong with other numbers
            if HELD not in states.get(number, {}):
                continue
            states[number] = state = dict(states[number])
            held[p] = Live.decoded(state.pop(HELD), p.shape, p.device)
            expected = held[p].read(p).shape
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state and state[name].shape != expected:
                    raise ValueError(
                        f"{name} of parameter {number} has the shape {tuple(state[name].shape)}, "
                        f"expected {tuple(expected)}, the part of it that is held"
                    )
        super().load_state_dict({**state_dict, "state": states})
        self._held, self._within = held, {}
        for p, state in self.state.items():
            if "step" in state:  # a number in old states, and on the GPU or not by the form of torch's optimizer
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=_step_device(p))
        self._look()  # a run that resumes has attached its subnetworks just before

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a LiveAdamW belongs to its model and cannot be copied or pickled: use its state_dict")


def _is_little(part: Live) -> bool:
    return part.share <= (LITTLE_OF_WEIGHTS if part.kind == "weights" else LITTLE)


def _step_device(parameter: Tensor) -> torch.device:
    """Where the count of steps is: with a parameter on a GPU, whose kernels read it; as in torch's fused step."""
    return parameter.device if parameter.is_cuda else torch.device("cpu")


def _refuse(group: Mapping[str, Any]) -> None:
    for setting in ("amsgrad", "differentiable"):
        if group.get(setting):
            raise ValueError(f"LiveAdamW does not support {setting}=True")
