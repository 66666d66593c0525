"""Many gradients of one model, parameter by parameter: their products need no more than one part of the model at once.

The gradients of L languages are L times the model, too much to hold. Here the forward pass of each language is cut into
parts (usually: before the first layer, each layer, after the last). The backward passes then run in lockstep: the last
part of every language, then the part before it, and so on. When a part is done, the L gradients of its parameters are
handed out and forgotten. Everything is computed once, as in L ordinary backward passes, and the gradients are exact.

Peak memory: the activations of all languages (as in one mixed batch of all of them), and the L gradients of one part.
Rows of an embedding that no language looked up are never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["gradients_in_lockstep"]

ROWS = 8192  # rows of an embedding whose gradients are held at a time


@dataclass
class _Pass:
    """One forward pass, cut into parts: what ends each part, and what the next part begins with instead."""

    vector: int  # whose gradient this adds to
    ends: list[Tensor] = field(default_factory=list)
    begins: list[Tensor] = field(default_factory=list)
    looked_up: list[tuple[nn.Embedding, Tensor, Tensor]] = field(default_factory=list)  # module, ids, leaf
    inputs: list[list[Tensor]] = field(default_factory=list)  # of each part: leaves that its end depends on
    again: list[bool] = field(default_factory=list)  # of each part: whether an earlier one goes through the same nodes
    upstream: dict[int, Tensor] = field(default_factory=dict)  # gradients that reached a leaf, by its id()


def gradients_in_lockstep(
    whole: nn.Module, cuts: Sequence[nn.Module], passes: Sequence[tuple[int, Callable[[], Tensor]]]
) -> Iterator[tuple[str, Tensor]]:
    """Gradients of several scalars with respect to every parameter, one parameter at a time.

    Args:
        whole: the module whose parameters count; in eval mode, or its passes see different dropout.
        cuts: modules at whose outputs (the first tensor of a tuple) a forward pass is cut.
        passes: pairs (vector, run): `run` runs `whole` and returns a scalar, and its gradient is added to vector number
            `vector`, from 0.

    Yields:
        (name, gradients [V, ...]) of each parameter that any scalar depends on; of an embedding as several pieces
        [V, rows, D] that hold each row with a gradient once, and some without.

    Raises:
        ValueError: a pass does not return a scalar that depends on the parameters, or passes run different modules.
    """
    names = {id(parameter): name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    n_vectors = 1 + max(vector for vector, _ in passes)
    made = [_forward(whole, cuts, vector, run, names) for vector, run in passes]
    lengths = {len(one.ends) for one in made}
    if len(lengths) > 1:
        raise ValueError(f"passes ran {sorted(lengths)} of the modules they are cut at: expected the same of each")
    # A parameter that several parts read is complete with the first of them, which comes last.
    first_part: dict[int, int] = {}
    for one in made:
        for part, inputs in enumerate(one.inputs):
            for leaf in inputs:
                first_part[id(leaf)] = min(part, first_part.get(id(leaf), part))

    held: dict[int, Tensor] = {}
    for part in reversed(range(lengths.pop())):
        for one in made:
            _backward(one, part, names, held, n_vectors)
        for key in [key for key in held if first_part[key] == part]:
            yield names[key], held.pop(key)
    yield from _embeddings(made, names, n_vectors)


def _forward(
    whole: nn.Module, cuts: Sequence[nn.Module], vector: int, run: Callable[[], Tensor], names: dict[int, str]
) -> _Pass:
    one = _Pass(vector)
    with _cut(whole, cuts, one, names), torch.enable_grad():
        loss = run()
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        raise ValueError("expected a scalar that depends on the model's parameters")
    one.ends.append(loss)
    one.begins.append(torch.ones_like(loss))
    one.upstream[id(one.begins[-1])] = one.begins[-1]
    ours = {id(leaf) for leaf in one.begins} | {id(leaf) for _, _, leaf in one.looked_up} | names.keys()
    gone_through: set[Any] = set()
    for end in one.ends:
        leaves, nodes = _graph(end)
        one.inputs.append([leaf for leaf in leaves if id(leaf) in ours])
        one.again.append(not gone_through.isdisjoint(nodes))
        gone_through |= nodes
    return one


@contextmanager
def _cut(whole: nn.Module, cuts: Sequence[nn.Module], one: _Pass, names: dict[int, str]) -> Iterator[None]:
    """Cut the graph at the outputs of `cuts`, and at those of embeddings that nothing else shares its weight with."""
    owners: dict[int, int] = {}
    for module in whole.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        end = output if isinstance(output, Tensor) else output[0]
        begin = end.detach().requires_grad_()
        one.ends.append(end)
        one.begins.append(begin)
        return begin if isinstance(output, Tensor) else (begin, *output[1:])

    def looked_up(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert isinstance(module, nn.Embedding)
        leaf = output.detach().requires_grad_()
        one.looked_up.append((module, args[0], leaf))
        return leaf

    handles = [module.register_forward_hook(cut) for module in cuts]
    for module in whole.modules():
        if type(module) is not nn.Embedding or id(module.weight) not in names or module in cuts:
            continue
        if owners[id(module.weight)] == 1 and module.max_norm is None and not module.scale_grad_by_freq:
            handles.append(module.register_forward_hook(looked_up))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _graph(end: Tensor) -> tuple[list[Tensor], set[Any]]:
    """The leaf tensors that a tensor's graph ends in, and the nodes on the way."""
    leaves: list[Tensor] = []
    ends: set[Any] = set()
    nodes: set[Any] = set()
    waiting: list[Any] = [] if end.grad_fn is None else [end.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in nodes or node in ends:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.append(variable)
        (nodes if variable is None else ends).add(node)
        waiting.extend(following for following, _ in node.next_functions if following is not None)
    return leaves, nodes


def _backward(one: _Pass, part: int, names: dict[int, str], held: dict[int, Tensor], n_vectors: int) -> None:
    """One part of one pass: gradients of parameters into `held`, others on to the part that they come from."""
    end, begin, inputs = one.ends[part], one.begins[part], one.inputs[part]
    upstream = one.upstream.pop(id(begin), None)
    if upstream is not None and inputs:
        grads = torch.autograd.grad(end, inputs, upstream, retain_graph=one.again[part])
        for leaf, grad in zip(inputs, grads, strict=True):
            if id(leaf) not in names:
                before = one.upstream.get(id(leaf))
                one.upstream[id(leaf)] = grad if before is None else before + grad
                continue
            if id(leaf) not in held:
                held[id(leaf)] = leaf.new_zeros(n_vectors, *leaf.shape)
            held[id(leaf)][one.vector] += grad
    one.ends[part] = one.begins[part] = torch.empty(0)  # what was computed here is not needed any more


def _embeddings(made: Sequence[_Pass], names: dict[int, str], n_vectors: int) -> Iterator[tuple[str, Tensor]]:
    """The gradients of embeddings, from those of what was looked up."""
    by_weight: dict[int, list[tuple[int, nn.Embedding, Tensor, Tensor]]] = {}
    for one in made:
        for module, ids, leaf in one.looked_up:
            if id(leaf) in one.upstream:
                rows = one.upstream[id(leaf)].reshape(-1, module.embedding_dim)
                by_weight.setdefault(id(module.weight), []).append((one.vector, module, ids.reshape(-1), rows))
    for key, lookups in by_weight.items():
        used = torch.cat([ids for _, _, ids, _ in lookups]).unique()
        padding = lookups[0][1].padding_idx
        if padding is not None:
            used = used[used != padding]  # never gets a gradient
        for piece in used.split(ROWS):
            grads = lookups[0][3].new_zeros(n_vectors, len(piece), lookups[0][3].shape[1])
            for vector, _, ids, rows in lookups:
                place = torch.searchsorted(piece, ids).clamp(max=len(piece) - 1)
                here = piece[place] == ids
                grads[vector].index_add_(0, place[here], rows[here])
            yield names[key], grads
