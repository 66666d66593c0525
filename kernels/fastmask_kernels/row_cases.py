"""The row kernels as the compiler takes them without a GPU: every entry of the tables of `row_configs`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastmask_kernels.configs import Case, Config
from fastmask_kernels.row_configs import Table

__all__ = ["table_cases"]

# What each argument points to: the kernels name them alike. "act" and "weight" stand for the types of a case.
POINTERS = {
    **dict.fromkeys(["x", "x0", "x1", "x2", "y", "y0", "y1", "y2", "dy0", "dy1", "dy2"], "act"),
    **dict.fromkeys(["w0", "w1", "w2", "b0", "b1", "b2", "bias"], "weight"),
    **dict.fromkeys(["dw0", "dw1", "dw2", "db0", "db1", "db2"], "fp32"),
    **dict.fromkeys(["index0", "index1", "index2", "counts0", "counts1", "counts2"], "i64"),
    **dict.fromkeys(["token_rows", "tiles", "starts", "present", "turns"], "i32"),
}
TYPES = {"half": ("bf16", "bf16"), "master": ("bf16", "fp32"), "tf32": ("fp32", "fp32"), "ieee": ("fp32", "fp32")}


def table_cases(
    kernel: Any, table: Table, operands: tuple[str, str], even: str, constexprs: dict[str, Any], variant: str = ""
) -> list[Case]:
    """A case for each entry of a table, and variants of the first entry of each list.

    Args:
        kernel: a triton JITFunction.
        table: its configs.
        operands: the two block sizes of each tile that a step reads, activation and weight: ("BM BK", "BN BK").
        even: its constexpr that leaves out the masks at the edges.
        constexprs: the others that are not block sizes and not in this: G, HAS_BIAS or WITH_BIAS, PRECISION.
        variant: added to the names.
    """
    found = []
    for (chip, kind), configs in table.items():
        for config, name, changes, is_aligned, types in _variants(kind, configs):
            act, weight = types
            fixed = (
                {"G": 3, "PRECISION": "ieee", "HAS_BIAS": True, "WITH_BIAS": True, even: True} | constexprs | changes
            )
            if kind == "tf32":
                fixed["PRECISION"] = "tf32"
            fixed = {key: value for key, value in fixed.items() if key in kernel.arg_names} | dict(config.blocks)
            found.append(
                _case(
                    kernel,
                    f"{kernel.__name__}, {kind}{variant}{name}",
                    config,
                    act,
                    weight,
                    fixed,
                    is_aligned,
                    chip,
                    operands,
                )
            )
    return found


def _variants(kind: str, configs: list[Config]) -> Iterator[tuple[Config, str, dict[str, Any], bool, tuple[str, str]]]:
    """(config, name, constexprs, whether sizes are multiples of 16, types) of every variant that can be launched."""
    types = TYPES[kind]
    for config in configs[:-1] or configs:
        yield config, "", {}, True, types
        yield config, ", one weight", {"G": 1, "HAS_BIAS": False, "WITH_BIAS": False}, True, types
        yield config, ", edges", {"EVEN": False, "EVEN_K": False}, True, types
    if kind == "half":
        yield configs[0], ", fp16", {}, True, ("fp16", "fp16")
    yield configs[-1], ", unaligned", {"EVEN": False, "EVEN_K": False}, False, types


def _case(
    kernel: Any, name: str, config: Config, act: str, weight: str, fixed: dict[str, Any], is_aligned: bool, chip: str,
    operands: tuple[str, str],
) -> Case:  # fmt: skip
    signature = {}
    for argument in kernel.arg_names:
        if argument in fixed:
            continue
        pointer = POINTERS.get(argument)
        if pointer is None:
            signature[argument] = "i32"
        else:
            signature[argument] = "*" + {"act": act, "weight": weight}.get(pointer, pointer)
    unhinted = {kernel.arg_names[i] for i in _not_specialised(kernel)}
    hinted = tuple(
        argument for argument in signature if argument not in unhinted and (is_aligned or argument in POINTERS)
    )
    sizes = {"act": 2 if act != "fp32" else 4, "weight": 2 if weight != "fp32" else 4}
    read = 0
    for which, blocks in zip(("act", "weight"), operands, strict=True):
        first, second = blocks.split()
        read += sizes[which] * config[first] * config[second]
    return Case(
        kernel=kernel,
        name=name,
        config=config,
        signature=signature,
        constexprs=fixed,
        aligned=hinted,
        flops=2 * config["BM"] * config["BN"] * config["BK"],
        bytes=read,
        tensor_cores=act != "fp32" or fixed["PRECISION"] == "tf32",
        targets=(chip,),
    )


def _not_specialised(kernel: Any) -> list[int]:
    return [parameter.num for parameter in kernel.params if parameter.do_not_specialize]
