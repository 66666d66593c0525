"""Carrying the languages of a batch from the model's forward call down to its masked layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastmask.kept import never_written
from fastmask.models.contexts import ContextLanguage, backward_pass
from fastmask.models.recomputation import may_recompute, recall, remember

__all__ = ["Route", "Router"]


class Route:
    """The languages of one forward pass, and its backward pass: one id for each example, or one for the whole batch.

    Attributes:
        present: which languages occur, so that layers pack to the widest of them. None where the ids are not known:
            while `torch.compile` traces, and for ids on a GPU, which nobody waits for. Layers then pack to the widest
            of all languages, and the full network (-1) does not fit.
        shared: whether all layers of the pass see this very route, and may compute for one another. A layer that is
            reached around the model's forward makes one for itself.
        packs_heads: whether heads travel packed. Not where they may go into a cache of keys and values: what continues
            it may have other languages, so each head keeps its slot (`caches`).
        model: the number of the model whose `fastmask.language` it comes from, if it comes from there.
        waiting: outputs that layers have computed for one another (`layers.Siblings`).
    """

    def __init__(
        self,
        language_ids: Tensor | int,
        present: tuple[int, ...] | None,
        *,
        shared: bool = True,
        model: int | None = None,
    ) -> None:
        self.language_ids = language_ids
        self.present = present
        self.shared = self.packs_heads = shared
        self.model = model
        tracing = is_compiling()
        self.backward_pass = -1 if tracing else backward_pass()
        self.with_grad = tracing or torch.is_grad_enabled()
        self.waiting: dict[Any, Any] = {}
        self._made: Tensor | None = None

    @classmethod
    def of(cls, language_ids: Tensor, n_languages: int) -> Route:
        """The route of ids int64 [B].

        Raises:
            ValueError: something else, or an id out of range.
        """
        if not isinstance(language_ids, Tensor) or language_ids.dtype != torch.int64 or language_ids.ndim != 1:
            given = (
                f"{language_ids.dtype} of shape {tuple(language_ids.shape)}"
                if isinstance(language_ids, Tensor)
                else type(language_ids).__name__
            )
            raise ValueError(f"expected language_ids as an int64 tensor [batch], given {given}")
        if is_compiling():
            return cls(language_ids, None)
        if language_ids.device.type != "cpu":
            inside = (language_ids.clamp(0, n_languages - 1) == language_ids).all()
            torch._assert_async(
                inside,
                f"language_ids on a GPU: expected 0 to {n_languages - 1} (the full network, -1, is asked for by ids on "
                "the CPU or by `with fastmask.language(model, None)`)",
            )
            return cls(language_ids, None)
        present = tuple(sorted(set(language_ids.tolist())))
        for language in present:
            if not -1 <= language < n_languages:
                raise ValueError(
                    f"language id {language} is out of range: expected 0 to {n_languages - 1}, "
                    "or -1 for the full network"
                )
        return cls(language_ids, present)

    def equals(self, other: Route) -> bool:
        """Whether both are of the same languages: one for the whole batch, or the ids of one tensor."""
        mine, theirs = self.language_ids, other.language_ids
        same = mine is theirs or (isinstance(mine, int) and isinstance(theirs, int) and mine == theirs)
        return same and self.packs_heads == other.packs_heads

    def ids_for(self, x: Tensor) -> Tensor:
        """A language id for each example of x [B, ...], on its device; one tensor for all layers of a pass.

        Models flatten examples and tokens (experts, choices): then every example has as many rows, one after the other.

        Raises:
            ValueError: x has another number of examples.
        """
        made = self._made
        if made is not None and made.shape[0] == x.shape[0] and made.device == x.device:
            return made
        if isinstance(self.language_ids, int):
            made = self._ids_of_one(x, self.language_ids)
        elif x.shape[0] % max(1, self.language_ids.shape[0]) == 0:
            made = self.language_ids.detach().to(x.device, non_blocking=True)
            if x.shape[0] != made.shape[0]:
                return made.repeat_interleave(x.shape[0] // made.shape[0])
        else:
            raise ValueError(
                f"expected one language id for each of the {x.shape[0]} examples, "
                f"given language_ids of shape {tuple(self.language_ids.shape)}"
            )
        self._made = never_written(made)  # what a layer makes of them serves the others
        return made

    def _ids_of_one(self, x: Tensor, language: int) -> Tensor:
        if self.model is None or not is_compiling():
            return torch.full((x.shape[0],), language, device=x.device)
        made: Tensor = torch.ops.fastmask.language_of_pass(x, language, self.model)
        return made


@torch.library.custom_op("fastmask::language_of_pass", mutates_args=())
def _language_of_pass(x: Tensor, language: int, model: int) -> Tensor:
    """Ids of a compiled pass under `fastmask.language`: what the eager one does about checkpoints, when it is run."""
    route = Route(language, (language,))
    if backward_pass() < 0:
        if may_recompute(began_with_grad=True):
            remember(model, route)
    elif (then := recall(model)) is not None and not then.equals(route):
        raise RuntimeError(
            "a compiled model is recomputed in a backward pass, inside another `with fastmask.language(...)` than its "
            f"forward pass: {_RECOMPUTED}"
        )
    return torch.full((x.shape[0],), language, device=x.device)


@_language_of_pass.register_fake
def _(x: Tensor, language: int, number: int) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


class _Running(threading.local):
    """The pass that a thread is in: it begins and ends there, with nothing else in between, so no context is needed."""

    def __init__(self) -> None:
        self.route: Route | None = None


class Router:
    """Where the masked layers of one model look up the languages of the pass that they are called in.

    Threads may run one model at the same time, and tasks may take turns, each with languages of its own. Where all run
    the full network (`full_forward`), languages say what learns, and a pass without gradients needs none.
    """

    def __init__(self, languages: tuple[str, ...], full_forward: bool = False) -> None:
        self.languages, self.full_forward = languages, full_forward
        self.default = ContextLanguage(languages)  # what `fastmask.language` sets
        self.running = _Running()

    def rename(self, languages: tuple[str, ...]) -> None:
        """Go on with other languages; blocks of `fastmask.language` that are open keep their ids."""
        self.languages = self.default.names = languages

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles begin without a language."""
        return Router, (self.languages, self.full_forward)

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        """Make `route` that of the running pass, and put back what was."""
        before, self.running.route = self.running.route, route
        try:
            yield
        finally:
            self.running.route = before

    def resolve(self, language_ids: Tensor | None) -> Route:
        """The route of a forward call, from its `language_ids` or from `fastmask.language`.

        Raises:
            ValueError: neither is given, or both, or the ids are not such.
        """
        default = self.default.get()
        if language_ids is not None:
            if default is not None:
                raise ValueError("language_ids was given inside `with fastmask.language(...)`: use one of the two")
            return Route.of(language_ids, len(self.languages))
        if default is not None:
            return self._remembered(Route(default, (default,), model=self.default.number))
        if not is_compiling() and backward_pass() >= 0:
            then = recall(self.default.number)
            if then is None:
                raise ValueError(f"this model is called in a backward pass, and no language was given: {_RECOMPUTED}")
            return Route(then.language_ids, then.present)
        if self.full_forward and not torch.is_grad_enabled():
            return Route(-1, (-1,))
        raise ValueError(
            "this model has subnetworks attached and no language was given: pass language_ids=... (int64 [batch]; "
            f"{', '.join(f'{i} = {name}' for i, name in enumerate(self.languages[:10]))}"
            f"{', ...' if len(self.languages) > 10 else ''}; -1 = full network) or call it inside "
            "`with fastmask.language(model, ...)`, which holds for the thread, task or generator that enters it"
        )

    def current(self) -> Route:
        """The route of the running pass; where the model's own forward was gone around, that of `fastmask.language`.

        Raises:
            RuntimeError: there is neither.
        """
        route = self.running.route
        if route is not None:
            if is_compiling():
                return route
            if route.backward_pass == backward_pass():
                return self._remembered(route) if may_recompute(route.with_grad) else route
        return self._around_the_forward()

    def _around_the_forward(self) -> Route:
        default = self.default.get()
        if default is not None:
            return self._remembered(Route(default, (default,), shared=False, model=self.default.number))
        if self.full_forward and not torch.is_grad_enabled():
            return Route(-1, (-1,), shared=False)
        if is_compiling() or backward_pass() < 0:
            raise RuntimeError(
                "a masked layer was called outside the forward pass of the model it is attached to, and outside "
                "`with fastmask.language(model, ...)`"
            )
        then: Route | None = recall(self.default.number)
        if then is None:
            raise RuntimeError(f"a masked layer is called in a backward pass, and no language was given: {_RECOMPUTED}")
        return then

    def _remembered(self, route: Route) -> Route:
        """The route, left with the checkpoint that may run what now runs again."""
        if not is_compiling() and may_recompute(began_with_grad=True):
            remember(self.default.number, route)
        return route


_RECOMPUTED = (
    "the language of its forward pass is not known there. Pass language_ids in what is checkpointed, or enter "
    "`with fastmask.language(...)` inside of it (once `torch.utils.checkpoint` has seen one language from outside, "
    "and only one, it finds that by itself)"
)
