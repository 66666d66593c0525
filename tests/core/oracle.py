"""What the core tests share: masks of every kind, and comparison with float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import Mask, masked_linear
from fastmask.torch_path.naive import masked_linear_naive

KINDS = ("rows", "columns", "blocks", "weights")


def random_mask(
    kind: str, L: int, N: int, K: int, density: float = 0.5, unit: int = 1, seed: int = 0, extremes: bool = True
) -> Mask:
    """A random mask; with `extremes` and from three languages on the second owns nothing and the third everything."""
    generator = torch.Generator().manual_seed(seed)

    def keep(*shape: int) -> Tensor:
        flags = torch.rand(L, *shape, generator=generator) < density
        if extremes and L >= 3:
            flags[1], flags[2] = False, True
        return flags

    if kind == "rows":
        return Mask.rows(keep(N // unit).repeat_interleave(unit, 1), K)
    if kind == "columns":
        return Mask.columns(keep(K // unit).repeat_interleave(unit, 1), N)
    if kind == "blocks":
        return Mask.blocks(keep(N // unit, K // unit), (unit, unit))
    return Mask.weights(keep(N, K))


def assert_close(name: str, result: Tensor, truth: Tensor, plain: Tensor) -> None:
    """`result` may be at most twice as far from the float64 `truth` as plain PyTorch in the same dtype is."""
    assert result.shape == truth.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    assert result.dtype == plain.dtype, f"{name}: dtype {result.dtype}, expected {plain.dtype}"
    if truth.numel() == 0:
        return
    # The norm of all errors, not the worst one: the worst of a few numbers is itself a matter of luck. Where plain
    # PyTorch happens to be exact, half a rounding of every element is still allowed.
    error = (result.double() - truth).norm()
    half_rounding = torch.finfo(plain.dtype).eps / 2 * truth.norm()
    allowed = 2 * torch.maximum((plain.double() - truth).norm(), half_rounding)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def gradients(function, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, *arguments):  # type: ignore[no-untyped-def]
    """(y, dx, dW, db) of `function` at fresh leaves with upstream gradient `dy`."""
    leaves = [t.detach().clone().requires_grad_() if t is not None else None for t in (x, weight, bias)]
    y = function(leaves[0], leaves[1], *arguments, leaves[2])
    y.backward(dy.to(y.dtype))
    return y.detach(), *(leaf.grad if leaf is not None else None for leaf in leaves)


def gathered(full: Tensor, mask: Mask, ids: Tensor, width: int) -> Tensor:
    """[B, T, size] -> [B, T, width]: each example's live units to the front, zeros behind."""
    packed, counts = full.new_zeros(*full.shape[:-1], width), mask.live_counts()
    for b, language in enumerate(ids.tolist()):
        live = full[b] if language < 0 else full[b].index_select(-1, mask.index[language, : counts[language]])
        packed[b, :, : live.shape[-1]] = live
    return packed


def spread(packed: Tensor, mask: Mask, ids: Tensor, size: int) -> Tensor:
    """[B, T, width] -> [B, T, size]: undoes `gathered`, zeros where an example owns nothing."""
    full, counts = packed.new_zeros(*packed.shape[:-1], size), mask.live_counts()
    for b, language in enumerate(ids.tolist()):
        live = slice(size) if language < 0 else mask.index[language, : counts[language]]
        full[b, :, live] = packed[b, :, : size if language < 0 else counts[language]]
    return full


def check(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask, ids: Tensor) -> None:
    """`masked_linear` against the oracle: y and every gradient."""
    dy = torch.randn(*x.shape[:-1], mask.out_features)
    dy64 = dy.to(x.dtype).double()
    bias64 = None if bias is None else bias.double()
    truth = gradients(masked_linear_naive, x.double(), weight.double(), bias64, dy64, mask, ids)
    plain = gradients(masked_linear_naive, x, weight, bias, dy, mask, ids)
    result = gradients(masked_linear, x, weight, bias, dy, mask, ids)
    for name, ours, exact, reference in zip(("y", "dx", "dW", "db"), result, truth, plain, strict=True):
        if exact is None:
            assert ours is None or not ours.any(), name
        else:
            assert_close(name, ours, exact, reference)
