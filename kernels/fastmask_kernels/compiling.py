"""Compile one `Variant`, without having its chip, and read what the compiler made of it.

NVIDIA: registers, stack and instructions come from the binary (`cuobjdump`, in Triton's wheel), the bytes of spills and
warnings from the log of `ptxas`. AMD: all of it from the assembly and the metadata at its end.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from fastmask_kernels.chips import CHIPS, Chip
from fastmask_kernels.recorder import Variant

__all__ = ["STEPS", "Build", "build", "dots", "operand_bits", "resident", "step_flops"]


@dataclass(frozen=True)
class Build:
    """What the compiler made of one variant. Registers, stack and spills are those of one thread.

    Attributes:
        registers: 32-bit registers (AMD: vector registers, accumulation registers included).
        stack: bytes of the stack frame (AMD: scratch).
        spill_stores, spill_loads: bytes of registers written to and read back from memory, counted once for each such
            instruction in the code, however often it runs.
        spill_instructions: instructions that access the stack, in the whole kernel.
        shared: bytes of shared memory that the launch asks for.
        tensor_memory: columns of tensor memory.
        tensor: tensor-core instructions of the whole kernel by name, without their accumulator type, and how many.
        warnings: what ptxas calls a potential performance loss, as when it runs tensor-core instructions one by one.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    spill_instructions: int
    shared: int
    tensor_memory: int
    tensor: dict[str, int]
    warnings: list[str] = field(default_factory=list)


# FLOPs of one step of a kernel's inner loop, from its constexprs, by its name; kernels without dots have none.
STEPS: dict[str, Callable[[dict[str, Any]], int]] = {
    **dict.fromkeys(
        ("row_matmul_kernel", "row_matmul_t_kernel", "row_turn_grad_kernel", "row_owned_grad_kernel"),
        lambda c: 2 * c["BM"] * c["BN"] * c["BK"],
    ),
    "tile_matmul_kernel": lambda c: 2 * c["OUT_TILE"] * c["BM"] * c["BK"],
    "pair_matmul_kernel": lambda c: 4 * c["OUT_TILE"] * c["BM"] * c["BK"],
    "tile_weight_grad_kernel": lambda c: 2 * c["BN"] * c["BK"] * c["BM"],
    "pair_weight_grad_kernel": lambda c: 4 * c["BN"] * c["TK"] * c["BM"],
}


def step_flops(variant: Variant) -> int:
    """The FLOPs of one step of the inner loop; 0 without dots."""
    work = STEPS.get(variant.source.fn.__name__)
    return 0 if work is None else work(variant.constexprs)


def operand_bits(variant: Variant) -> int:
    """16 if a pointer of the variant is to a 16-bit float (its dots then have such operands), else 32."""
    return 16 if any(kind in ("*bf16", "*fp16") for kind in variant.source.signature.values()) else 32


def dots(variant: Variant) -> bool:
    """Whether it should run on tensor cores: it multiplies, and not plain float32."""
    exact = variant.constexprs.get("PRECISION") == "ieee" and operand_bits(variant) == 32
    return variant.source.fn.__name__ in STEPS and not exact


def build(variant: Variant) -> Build:
    """Compile `variant` for its chip; whatever Triton raises passes through."""
    chip = CHIPS[variant.chip]
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    gpu = GPUTarget(chip.backend, chip.arch, chip.warp_size)
    if chip.backend == "hip":
        return _read_amd(triton.compile(variant.source, target=gpu, options=options), variant, chip)
    compiled, log = _with_log(variant.source, gpu, options)
    return _read_nvidia(compiled, log, variant, chip)


def resident(made: Build, num_warps: int, chip: Chip) -> int:
    """Programs that a multiprocessor holds at a time, by registers and shared memory.

    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": 65536 registers, given to warps in
    portions of 256; a kilobyte of shared memory more for each program; 2048 threads. AMD CDNA 3 ISA: 512 registers a
    lane on each of 4 SIMDs, in portions of 8, and at most 8 waves there.
    """
    if chip.backend == "hip":
        waves, spare = 4 * min(8, 512 // (-(-made.registers // 8) * 8)), 0
    else:
        waves, spare = min(64, 65536 // (-(-made.registers * 32 // 256) * 256)), 1024
    return max(1, min(waves // num_warps, (chip.shared_memory + spare) // (made.shared + spare)))


def _with_log(source: Any, gpu: GPUTarget, options: dict[str, int]) -> tuple[Any, str]:
    """The compiled kernel and what ptxas said, which Triton's cache forgets: it is put there as a file of its own."""
    file, knobs = "ptxas.log", triton.knobs
    for always in (False, True):
        log = io.StringIO()
        with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            knobs.compilation.always_compile = always
            knobs.nvidia.dump_ptxas_log = True
            compiled = triton.compile(source, target=gpu, options=options)
        cache = get_cache_manager(compiled.hash)
        if "spill" in log.getvalue():
            cache.put(log.getvalue(), file, binary=False)
        if found := cache.get_file(file):
            return compiled, Path(found).read_text()
    raise RuntimeError(f"ptxas says nothing about spills: {log.getvalue()!r}; its format changed")


def _read_nvidia(compiled: Any, log: str, variant: Variant, chip: Chip) -> Build:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", cubin.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if usage is None or spills is None:
        raise RuntimeError(f"{variant}: cuobjdump or ptxas report no register or spill counts; their format changed")
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text))
    return Build(
        registers=int(usage[1]),
        stack=int(usage[2]),
        spill_stores=int(spills[1]),
        spill_loads=int(spills[2]),
        spill_instructions=sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] in ("STL", "LDL")),
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size or 0,
        tensor=_tensor(opcodes, chip),
        warnings=re.findall(r"Potential Performance Loss: (.*)", log),
    )


def _read_amd(compiled: Any, variant: Variant, chip: Chip) -> Build:
    text = compiled.asm["amdgcn"]

    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"{variant}: the assembly's metadata has no .{name}; its format changed")
        return int(found[1])

    opcodes = Counter(re.findall(r"^\s+([a-z]\w+)", text.split(".Lfunc_end0:")[0], re.MULTILINE))
    spilled = 4 * fact("vgpr_spill_count")
    return Build(
        registers=fact("vgpr_count"),
        stack=fact("private_segment_fixed_size"),
        spill_stores=spilled,
        spill_loads=spilled,
        spill_instructions=sum(n for opcode, n in opcodes.items() if opcode.startswith("scratch_")),
        shared=max(compiled.metadata.shared, fact("group_segment_fixed_size")),
        tensor_memory=0,
        tensor=_tensor(opcodes, chip),
    )


def _tensor(opcodes: Counter[str], chip: Chip) -> dict[str, int]:
    """The tensor-core instructions among all, without their accumulator type."""
    found = Counter[str]()
    for opcode, n in opcodes.items():
        if opcode.startswith(chip.tensor_16bit + chip.tensor_32bit):
            found[re.sub(r"\.F(16|32).*", "", opcode)] += n
    return dict(found)
