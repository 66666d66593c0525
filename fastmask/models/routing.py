"""Carrying the languages of a batch from the model's forward call down to its masked layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastmask.kept import is_capturing, never_written, sent
from fastmask.masks import checked_id
from fastmask.models.contexts import ContextLanguage, backward_pass, may_recompute, recall, remember
from fastmask.models.languages import LanguageCounts

_RECOMPUTED = (
    "the language of its forward pass is not known there. Pass language_ids in what is checkpointed, or enter "
    "`with fastmask.language(...)` inside of it (once `torch.utils.checkpoint` has seen one language from outside, "
    "and only one, it finds that by itself)"
)


class Route:
    """The languages of one forward pass, and its backward pass: one id for each example, or one for the whole batch.

    Attributes:
        present: which languages occur, so that layers pack to the widest of them. None where the ids are not known:
            while `torch.compile` traces, and for ids on a GPU without `LanguageCounts`, which nobody waits for. Layers
            then pack to the widest of all languages, and the full network (-1) does not fit.
        shared: whether all layers of the pass see this very route, and may compute for one another. A layer that is
            reached around the model's forward makes one for itself.
        tokens: (B, T) where each token has an id, and `language_ids` are those of all tokens, one after the other.
        choices: how many examples of a layer may belong to one of the batch, side by side (multiple choice).
        packs_heads: whether heads travel packed. Not into a cache of keys and values, which other languages may
            continue (`calls`); nor where tokens of a row have several languages: attention joins the same head of all.
        spread: the groups of units that stay in their slots in this pass, of those that could be packed
            (`layers.Between`); None where none may.
        model: the number of the model whose standing language, or `fastmask.language`, it comes from, if it does.
        awaits_forward: the model was called, and its forward, which comes next, is to find this route.
        waiting: outputs that layers have computed for one another (`layers.Siblings`).
    """

    def __init__(
        self,
        language_ids: Tensor | int,
        present: tuple[int, ...] | None,
        *,
        shared: bool = True,
        model: int | None = None,
        tokens: tuple[int, int] | None = None,
        choices: int = 1,
    ) -> None:
        self.language_ids, self.present, self.shared = language_ids, present, shared
        self.model, self.tokens, self.choices = model, tokens, choices
        self.packs_heads = shared and tokens is None
        self.spread: set[Any] | None = None
        self.awaits_forward = False
        tracing = is_compiling()
        self.backward_pass = -1 if tracing else backward_pass()
        self.with_grad = tracing or torch.is_grad_enabled()
        self.waiting: dict[Any, Any] = {}
        self._made: Tensor | None = None

    @classmethod
    def of(
        cls, ids: Tensor | int, n_languages: int, sizes: tuple[int, ...] | None = None, counts: Tensor | None = None
    ) -> Route:
        """The route of a call, whose tokens have some sizes.

        Ids are one for all, or int64 [B], [B, T] (one for each token) or, where a model takes [B, choices, T], [B],
        [B, choices] or [B, choices, T]. Counts are the `LanguageCounts` of ids on a GPU; anything else is ignored.
        """
        if isinstance(ids, int):
            return cls(ids, (ids,))
        present, choices = _present(ids, n_languages, counts), 1
        if sizes is not None and len(sizes) == 3:
            choices = sizes[1]
            if ids.shape in (sizes[:2], sizes):
                ids = ids.flatten(0, 1)
            sizes = (sizes[0] * choices, sizes[2])
        if ids.ndim == 1:
            # Said here, as a layer that is given flattened tokens cannot tell.
            if sizes is not None and len(sizes) == 2 and sizes[0] not in (ids.shape[0], ids.shape[0] * choices):
                raise ValueError(
                    f"expected one language id for each of the {sizes[0] // choices} examples, "
                    f"given language_ids of shape {tuple(ids.shape)}"
                )
            return cls(ids, present, choices=choices)
        if ids.ndim != 2 or (sizes is not None and ids.shape != sizes):
            raise ValueError(
                "expected a language id for each example, or for each token"
                f"{'' if sizes is None else f' of {list(sizes)}'}, given language_ids of shape {list(ids.shape)}"
            )
        if present is not None and len(present) == 1:
            return cls(present[0], present)
        return cls(ids.flatten(), present, tokens=(ids.shape[0], ids.shape[1]))

    def equals(self, other: Route) -> bool:
        """Whether both are of the same languages: one for the whole batch, or the ids of one tensor."""
        mine, theirs = self.language_ids, other.language_ids
        same = mine is theirs or (isinstance(mine, int) and isinstance(theirs, int) and mine == theirs)
        return same and self.packs_heads == other.packs_heads

    def examples(self, x: Tensor, once: bool = False) -> tuple[Tensor, Tensor]:
        """[B, T, K] -> itself and an id for each example, or, if each token has an id, [B * T, 1, K] and those.

        With `once`, x [1, T, K] may be something that all examples of a batch read, and runs the full network.
        """
        if once and self.tokens is not None:
            raise ValueError(
                "language_ids have one id for each token, but a masked layer also runs on what all tokens share "
                "(embeddings of relative positions, say): give one id for each example"
            )
        ids = self.language_ids
        if once and x.shape[0] == 1 and isinstance(ids, Tensor) and ids.shape[0] * self.choices != 1:
            return x, torch.full((1,), -1, device=x.device)
        if self.tokens is None or (x.ndim == 2 and x.shape[0] == self.tokens[0] * self.tokens[1]):
            return x, self.ids_for(x)
        if tuple(x.shape[:2]) != self.tokens or x.ndim != 3:
            raise ValueError(
                f"language_ids have one id for each token of {list(self.tokens)}, but a masked layer was given "
                f"{list(x.shape)}: layers that do not run once for each of these tokens need one id for each example"
            )
        x = x.reshape(-1, 1, x.shape[2])
        return x, self.ids_for(x)

    def joined(self, y: Tensor) -> Tensor:
        """What was computed of `examples` in the shape it came in: [B * T, 1, N] -> [B, T, N] if tokens have ids."""
        return y if self.tokens is None or y.ndim == 2 else y.reshape(*self.tokens, y.shape[-1])

    def ids_for(self, x: Tensor) -> Tensor:
        """A language id for each example of x [B, ...], on its device; one tensor for all layers of a pass.

        Models flatten examples and tokens (experts, choices): then every example has as many rows, one after the other.
        """
        made = self._made
        if made is not None and made.shape[0] == x.shape[0] and made.device == x.device:
            return made
        ids, rows = self.language_ids, x.shape[0]
        if isinstance(ids, int):
            if self.model is not None and is_compiling():
                made = torch.ops.fastmask.language_of_pass(x, ids, self.model)
            else:
                made = torch.full((rows,), ids, device=x.device)
        else:
            examples = ids.shape[0]
            if rows not in (examples, examples * self.choices) and (x.ndim != 2 or not examples or rows % examples):
                raise ValueError(
                    f"expected one language id for each of the {rows} examples, "
                    f"given language_ids of shape {tuple(ids.shape)}"
                )
            made = sent(ids.detach(), x.device)
            if examples != rows:
                made = made.repeat_interleave(rows // examples)
        self._made = never_written(made)  # what a layer makes of them serves the others
        return made


def _present(ids: Tensor, n_languages: int, counts: Tensor | None) -> tuple[int, ...] | None:
    """The languages that occur in ids, if that is known without waiting for anything; all of them are in range."""
    if is_compiling():
        return None
    if ids.device.type == "cpu":
        return tuple(checked_id(language, n_languages) for language in sorted(set(ids.flatten().tolist())))
    # Not for a CUDA graph, which is replayed for batches of other languages.
    if isinstance(counts, LanguageCounts) and counts.shape == (n_languages + 1,) and not is_capturing(ids.device):
        there = (counts.as_subclass(Tensor) > 0).to(ids.device, non_blocking=True)
        torch._assert_async(there[ids].all(), "language_ids on a GPU: there are others than in language_counts")
        return counts.present()
    inside = (ids.clamp(0, n_languages - 1) == ids).all()
    torch._assert_async(
        inside,
        f"language_ids on a GPU: expected 0 to {n_languages - 1} (-1, the full network, is asked for by ids on the "
        "CPU, those of a `fastmask.LanguageCollator`, or by `with fastmask.language(model, None)`)",
    )
    return None


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
        self.generating: dict[str, Any] = {}  # what `generate` was given, for passes inside that it does not tell


class Router:
    """Where the masked layers of one model look up the languages of the pass that they are called in.

    Where all run the full network (`full_forward`), languages say what learns, and a pass without gradients needs none.
    """

    def __init__(self, languages: tuple[str, ...], full_forward: bool = False, standing: int | None = None) -> None:
        self.languages, self.full_forward = languages, full_forward
        self.standing = standing  # what `fastmask.set_language` sets
        self.default = ContextLanguage(languages)  # what `fastmask.language` sets
        self.running = _Running()

    def rename(self, languages: tuple[str, ...]) -> None:
        """Go on with other languages, the same one standing; open blocks of `fastmask.language` keep their ids."""
        if self.standing is not None and self.standing >= 0:
            self.standing = languages.index(self.languages[self.standing])
        self.languages = self.default.names = languages

    def close(self) -> None:
        """Know no language any more: the ids of a collator would be taken for those of whatever is attached next."""
        self.standing, self.languages = None, ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles keep the standing language, and are inside of no `fastmask.language`."""
        return Router, (self.languages, self.full_forward, self.standing)

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        """Make `route` that of the running pass, and put back what was."""
        before, self.running.route = self.running.route, route
        try:
            yield
        finally:
            self.running.route = before

    @contextmanager
    def generating(self, given: dict[str, Any]) -> Iterator[None]:
        """Give the languages of a call of `generate` to the passes inside that say none (detection of a language)."""
        before, self.running.generating = self.running.generating, given
        try:
            yield
        finally:
            self.running.generating = before

    @property
    def has_default(self) -> bool:
        """Whether a call that says no language has one all the same, in this context and without gradients."""
        return self.full_forward or self.standing is not None or self.default.get() is not None

    def resolve(
        self, ids: Tensor | int | None, sizes: tuple[int, ...] | None = None, counts: Tensor | None = None
    ) -> Route:
        """The route of a forward call: of its ids, or else of `fastmask.language`, or else of `set_language`."""
        default = self.default.get()
        if ids is not None:
            if default is not None:
                raise ValueError("a language was given inside `with fastmask.language(...)`: use one of the two")
            return Route.of(ids, len(self.languages), sizes, counts)
        if default is not None:
            return self._of_default(default)
        if not is_compiling() and backward_pass() >= 0:
            then = recall(self.default.number)
            if then is None:
                raise ValueError(f"this model is called in a backward pass, and no language was given: {_RECOMPUTED}")
            return Route(then.language_ids, then.present, tokens=then.tokens, choices=then.choices)
        if self.standing is not None:
            return self._of_default(self.standing)
        if self.full_forward and not torch.is_grad_enabled():
            return Route(-1, (-1,))
        raise ValueError(
            "this model has subnetworks attached and no language was given: pass language=..., languages=[...] or "
            "language_ids=... (int64 [batch]; "
            f"{', '.join(f'{i} = {name}' for i, name in enumerate(self.languages[:10]))}"
            f"{', ...' if len(self.languages) > 10 else ''}; -1 = full network), call it inside "
            "`with fastmask.language(model, ...)`, which holds for the thread, task or generator that enters it, or "
            "say `fastmask.set_language(model, ...)`, which holds for the model"
        )

    def _of_default(self, language: int, shared: bool = True) -> Route:
        return self._remembered(Route(language, (language,), shared=shared, model=self.default.number))

    def current(self) -> Route:
        """The route of the running pass; where the model's own forward was gone around, that of a default."""
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
            return self._of_default(default, shared=False)
        if self.full_forward and not torch.is_grad_enabled():
            return Route(-1, (-1,), shared=False)
        if is_compiling() or backward_pass() < 0:
            if self.standing is not None:
                return self._of_default(self.standing, shared=False)
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
