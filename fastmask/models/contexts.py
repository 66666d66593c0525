"""What is around a pass: the language of `fastmask.language`, a checkpoint that recomputes it, evaluation mode.

What gradient checkpointing recomputes inside the backward pass no longer runs under the languages of then: `with
fastmask.language(...)` may have been left, and a layer is called without its model. Only the checkpoint itself is there
both times: `torch.utils.checkpoint` has an object for each, reentrant or not, and so has every checkpoint that is
written as an `autograd.Function`. It is found on the stack, and carries the languages from the forward pass to the
recomputation, whatever thread that runs in.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

backward_pass: Callable[[], int] = torch._C._current_graph_task_id  # of this thread, a number; -1 outside of any


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; every module is afterwards in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---- `fastmask.language`: the language of one model, in the task, thread or generator that enters it

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_RUNNERS = ("contextlib", "_pytest.fixtures")  # they run a generator for what it opens, not for its items

_numbers = itertools.count()
_context: ContextVar[Any] = ContextVar("fastmask.language")  # one for all models: contexts never let go of a variable


class _Entries:
    """The entries of a context: an attribute for each model that has any.

    `here` are those of the current context, or these if it has none. A property made of a builtin function is what
    `torch.compile` takes for an attribute: it reads it while it traces, and compares it before every call of what it
    compiled. It cannot trace `ContextVar.get`.
    """

    here = property(_context.get)

    def __init__(self, entries: dict[str, _Entry]) -> None:
        vars(self).update(entries)

    def but(self, model: str, entry: _Entry | None) -> _Entries:
        """The same with another entry of one model, or none."""
        others = {name: of_another for name, of_another in vars(self).items() if name != model}
        return _Entries(others if entry is None else {**others, model: entry})


_none = _Entries({})


class _Entry:
    """One `with fastmask.language(...)` of one model."""

    def __init__(self, language: int, before: _Entry | None, generator: FrameType | None) -> None:
        self.language = language
        self.before = before  # the entry that is in force again when this one is left
        self.generator = generator  # whose it is, if it is one's
        self.backward_pass = backward_pass()
        self.left = False  # out of turn, or in another context: contexts may still hold it

    def in_force(self) -> bool:
        """Whether the calling code is inside.

        While a generator is suspended, whoever resumes it is not inside what it opened. What was opened outside of a
        backward pass does not hold inside: there, models run again what they ran under the languages of then.
        """
        if self.left or (self.generator is not None and not _is_running(self.generator)):
            return False
        return torch.compiler.is_compiling() or self.backward_pass == backward_pass()


class _Traced(threading.local):
    """Entered by code that `torch.compile` traces, which knows no contexts; it is left before that code ends."""

    def __init__(self) -> None:
        self.language: int | None = None


class ContextLanguage:
    """A language id of one model, or none, for each context."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.number = next(_numbers)
        self._model = f"model_{self.number}"
        self._none, self._traced = _none, _Traced()

    def get(self) -> int | None:
        """The language id that the calling code is inside of; -1 is the full network."""
        traced = self._traced.language
        if traced is not None:
            return traced
        entry: _Entry | None = getattr(self._none.here, self._model, None)
        while entry is not None:
            if entry.in_force():
                return entry.language
            entry = entry.before
        return None

    @contextmanager
    def entered(self, language: int) -> Iterator[None]:
        """Set the language id for what runs inside; it must be left before those that were entered earlier."""
        if torch.compiler.is_compiling():
            before, self._traced.language = self._traced.language, language
            try:
                yield
            finally:
                self._traced.language = before
            return
        before, traced = _none.here, self._traced.language
        entry = _Entry(language, self._last_of(before), _iterated_generator())
        mine = before.but(self._model, entry)
        token, self._traced.language = _context.set(mine), None
        try:
            yield
        finally:
            self._traced.language = traced
            later = self._leave(entry, mine, token)
        if later is not None:
            raise RuntimeError(
                f"`with fastmask.language(model, {self._name(language)})` is left while {self._name(later.language)}, "
                "entered after it, is still open: leave the last one entered first"
            )

    def _leave(self, entry: _Entry, mine: _Entries, token: Token[Any]) -> _Entry | None:
        """Take an entry out of the context; returns the one that was entered after it and is still open, if any."""
        now, later = _none.here, None
        last = self._last_of(now)
        try:
            _context.reset(token)
        except ValueError:  # left in another context than it was entered in: a generator that someone else closes
            entry.left = True
        else:
            if last is not entry:
                entry.left, later = True, last
                _context.set(now)
            elif now is not mine:  # other models' entries have come or gone since
                _context.set(now.but(self._model, entry.before))
        own = entry.generator is not None or (later is not None and later.generator is not None)
        if entry.generator is not None:
            entry.left, entry.generator = True, None  # contexts that were copied meanwhile need not hold its frame
        now = _none.here
        last = self._last_of(now)
        if last is not getattr(now, self._model, None):
            _context.set(now.but(self._model, last))
        return None if own else later  # generators take turns

    def _last_of(self, entries: _Entries) -> _Entry | None:
        """The last entry of this model that was not left."""
        entry: _Entry | None = getattr(entries, self._model, None)
        while entry is not None and entry.left:
            entry = entry.before
        return entry

    def _name(self, language: int) -> str:
        return "None" if language < 0 else repr(self.names[language])


# ---- generators, which share the context of whoever resumes them


def _iterated_generator() -> FrameType | None:
    """The generator that is entering a language, unless it is run as a context manager."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_back
        if not _runs_generators(frame):
            if not frame.f_code.co_flags & _GENERATOR:
                return None
            if caller is None or not _runs_generators(caller):
                return frame
        frame = caller
    return None


def _runs_generators(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") in _RUNNERS


def _is_running(generator: FrameType) -> bool:
    """Whether a generator's frame is on this thread's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not generator:
        frame = frame.f_back
    return frame is generator


# What `torch.compiler.disable` does, without loading the compiler for everyone.
_is_running._torchdynamo_disable = True  # type: ignore[attr-defined]
_is_running._torchdynamo_disable_msg = None  # type: ignore[attr-defined]


# ---- gradient checkpointing

_FILE = inspect.unwrap(checkpoint).__code__.co_filename
_NAME = "_fastmask_routes"
_COMPILED = "torch._functorch._aot_autograd.runtime_wrappers"  # the function that `torch.compile` makes of a program

# What autograd would save goes through these functions, if there are any: those of a checkpoint, for one.
_saving_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


def may_recompute(began_with_grad: bool) -> bool:
    """Whether the code that runs may be inside a checkpoint: cheap to ask, and true whenever it is.

    A checkpoint catches what autograd would save, or turns gradients off and computes everything again.
    """
    return _saving_hooks(False) is not None or (began_with_grad and not torch.is_grad_enabled())


def remember(number: int, route: Any) -> None:
    """Leave a route of model `number` with the checkpoint that the calling code is inside of, if it is inside one."""
    found = _checkpoint()
    if found is None:
        return
    routes = vars(found).setdefault(_NAME, {})
    known = routes.setdefault(number, route)
    if known is not route and (known is None or not known.equals(route)):
        routes[number] = None  # several: which one a recomputed call had is not known


def recall(number: int) -> Any:
    """The route that was left with the checkpoint whose recomputation is running; None if there is none, or several."""
    routes: dict[int, Any] = getattr(_checkpoint(), _NAME, {})
    return routes.get(number)


def _checkpoint() -> Any:
    """The object of the innermost checkpoint on the stack; the same one in the forward pass and when recomputed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code, found = frame.f_code, None
        if code.co_name in ("forward", "backward"):
            if code.co_varnames[:1] == ("ctx",) and frame.f_globals.get("__name__") != _COMPILED:
                found = frame.f_locals["ctx"]
        elif code.co_filename == _FILE:
            if code.co_name == "checkpoint" and (run := frame.f_locals.get("gen")) is not None:
                found = run.gi_frame.f_locals.get("new_frame")
            elif code.co_name == "unpack_hook":
                found = frame.f_locals.get("frame")
        elif code.co_name == "_engine_run_backward":
            return None  # a backward pass lies between: whatever began it does not recompute what runs here
        if found is not None:
            return found
        frame = frame.f_back
    return None
