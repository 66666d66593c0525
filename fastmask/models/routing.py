"""Carrying the languages of a batch from the model's forward call down to its masked layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Route", "Router", "carried_through_checkpointing"]


class Route:
    """The languages of one forward pass, and its backward pass: one id for each example, or one for the whole batch.

    Attributes:
        present: which languages occur, so that layers pack to the widest of them. None where the ids are not known:
            while `torch.compile` traces, and for ids on a GPU, which nobody waits for. Layers then pack to the widest
            of all languages, and the full network (-1) does not fit.
        waiting: outputs that layers have computed for one another (`layers.Siblings`).
    """

    def __init__(self, language_ids: Tensor | int, present: tuple[int, ...] | None) -> None:
        self._language_ids = language_ids
        self.present = present
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
        if torch.compiler.is_compiling():
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

    def ids_for(self, x: Tensor) -> Tensor:
        """A language id for each example of x [B, ...], on its device; one tensor for all layers of a pass.

        Raises:
            ValueError: x has another number of examples.
        """
        made = self._made
        if made is not None and made.shape[0] == x.shape[0] and made.device == x.device:
            return made
        if isinstance(self._language_ids, int):
            made = torch.full((x.shape[0],), self._language_ids, device=x.device)
        elif self._language_ids.shape[0] == x.shape[0]:
            made = self._language_ids.detach().to(x.device, non_blocking=True)
        else:
            raise ValueError(
                f"expected one language id for each of the {x.shape[0]} examples, "
                f"given language_ids of shape {tuple(self._language_ids.shape)}"
            )
        made._fastmask_of_one_pass = {}  # type: ignore[attr-defined]  # what layers make of it, for one another
        self._made = made
        return made


class Router(threading.local):
    """Where the masked layers of one model look up the current batch's languages.

    Every thread has a state of its own, which begins empty: threads may run one model at the same time, each with
    languages of its own.
    """

    def __init__(self, languages: tuple[str, ...]) -> None:
        self.languages = languages
        self.route: Route | None = None
        self.default: int | None = None  # set by `fastmask.language`; -1 is the full network

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles begin empty, too."""
        return Router, (self.languages,)

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        """Make `route` current, and put back what was."""
        before, self.route = self.route, route
        try:
            yield
        finally:
            self.route = before

    def resolve(self, language_ids: Tensor | None) -> Route:
        """The route of a forward call, from its `language_ids` or from `fastmask.language`."""
        if language_ids is not None:
            if self.default is not None:
                raise ValueError("language_ids was given inside `with fastmask.language(...)`: use one of the two")
            return Route.of(language_ids, len(self.languages))
        if self.default is None:
            raise ValueError(
                "this model has subnetworks attached and no language was given: pass language_ids=... (int64 [batch]; "
                f"{', '.join(f'{i} = {name}' for i, name in enumerate(self.languages[:10]))}"
                f"{', ...' if len(self.languages) > 10 else ''}; -1 = full network) or call it inside "
                "`with fastmask.language(model, ...)`, which holds for the thread that enters it"
            )
        return Route(self.default, (self.default,))

    def current(self) -> Route:
        """The route of the forward call that is running."""
        if self.route is None:
            raise RuntimeError("a masked layer was called outside the forward pass of the model it is attached to")
        return self.route


@contextmanager
def carried_through_checkpointing(model: nn.Module, router: Router, route: Route) -> Iterator[None]:
    """Let layers that are recomputed in the backward pass see the route of their own forward pass.

    Gradient checkpointing runs a layer's forward again long after the model's forward has returned, perhaps after
    that of another batch, so the route must travel with the checkpointed function.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    wrapped: list[tuple[nn.Module, Callable[..., Any]]] = []

    def carrying(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def routed(*inner_args: Any, **inner_kwargs: Any) -> Any:
                with router.using(route):
                    return function(*inner_args, **inner_kwargs)

            return checkpoint(routed, *args, **kwargs)

        return run

    for layer in layers:
        if (checkpoint := getattr(layer, "_gradient_checkpointing_func", None)) is not None:
            wrapped.append((layer, checkpoint))
            layer._gradient_checkpointing_func = carrying(checkpoint)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, checkpoint in wrapped:
            layer._gradient_checkpointing_func = checkpoint  # type: ignore[assignment]
