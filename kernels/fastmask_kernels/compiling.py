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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from fastmask_kernels.assembly import Instruction, inner_loop, read_amdgcn, read_sass
from fastmask_kernels.limits import CHIPS, Chip
from fastmask_kernels.recorder import Variant

__all__ = ["STEPS", "Build", "Step", "build", "dots", "operand_bits", "resident", "step_of"]


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
        tensor: tensor-core instructions of the inner loop by name, without their accumulator type.
        async_copies, loads: loads from global memory in the inner loop by their bits for one thread (or "tile" for a
            copy engine's): those that go straight to shared memory, and those that pass through registers.
        loop: every instruction of the inner loop, by the first part of its name.
        steps: steps of the kernel's inner loop that one round of the compiled loop does, from the shape in the names of
            the tensor-core instructions; None where the names do not tell.
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
    async_copies: dict[str, int]
    loads: dict[str, int]
    loop: dict[str, int]
    steps: float | None
    warnings: list[str] = field(default_factory=list)


# ---- one step of a kernel's inner loop, as its source says


@dataclass(frozen=True)
class Step:
    """Multiply-adds times two, and bytes read from outside the multiprocessor, of one step of one program."""

    flops: int
    bytes: int


def _product(rows: int, columns: int, depth: int, row_bytes: int, column_bytes: int) -> Step:
    return Step(2 * rows * columns * depth, (rows * row_bytes + columns * column_bytes) * depth)


# By the kernel's name, from its constexprs and the bytes of an element by argument; kernels without dots have none.
STEPS: dict[str, Callable[[dict[str, Any], dict[str, int]], Step]] = {
    "row_matmul_kernel": lambda c, size: _product(c["BM"], c["BN"], c["BK"], size["x"], size["w0"]),
    "row_matmul_t_kernel": lambda c, size: _product(c["BM"], c["BK"], c["BN"], size["x0"], size["w0"]),
    "row_turn_grad_kernel": lambda c, size: _product(c["BN"], c["BK"], c["BM"], size["dy0"], size["x"]),
    "row_owned_grad_kernel": lambda c, size: _product(c["BN"], c["BK"], c["BM"], size["dy0"], size["x"]),
    "tile_matmul_kernel": lambda c, size: _product(c["OUT_TILE"], c["BM"], c["BK"], size["weight"], size["x"]),
    "pair_matmul_kernel": lambda c, size: _product(2 * c["OUT_TILE"], c["BM"], c["BK"], size["weight"], size["x"]),
    "tile_weight_grad_kernel": lambda c, size: _product(c["BN"], c["BK"], c["BM"], size["dy"], size["x"]),
    "pair_weight_grad_kernel": lambda c, size: _product(c["BN"], 2 * c["TK"], c["BM"], size["dy"], size["x"]),
}
_SIZES = {"*bf16": 2, "*fp16": 2, "*fp32": 4}


def step_of(variant: Variant) -> Step:
    """The work of one step; a mask's bits, at most a sixteenth of the weight's bytes, are not counted."""
    work = STEPS.get(variant.source.fn.__name__)
    sizes = {name: _SIZES[kind] for name, kind in variant.source.signature.items() if kind in _SIZES}
    return Step(0, 0) if work is None else work(variant.constexprs, sizes)


def operand_bits(variant: Variant) -> int:
    """16 if a pointer of the variant is to a 16-bit float (its dots then have such operands), else 32."""
    return 16 if any(kind in ("*bf16", "*fp16") for kind in variant.source.signature.values()) else 32


def dots(variant: Variant) -> bool:
    """Whether the inner loop should run on tensor cores: it multiplies, and not plain float32."""
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
    code = read_sass(text)
    names, copies, loads = chip.tensor_16bit + chip.tensor_32bit, Counter[str](), Counter[str]()
    body = inner_loop(code, names)
    for instruction in body:
        name = instruction.opcode.split(".")[0]
        width = re.search(r"\.(64|128|256)$", instruction.opcode)
        if name in ("UTMALDG", "UBLKCP"):
            copies["tile"] += 1
        elif name in ("LDGSTS", "LDG"):
            (copies if name == "LDGSTS" else loads)[width[1] if width else _narrow(instruction.opcode)] += 1
    return Build(
        registers=int(usage[1]),
        stack=int(usage[2]),
        spill_stores=int(spills[1]),
        spill_loads=int(spills[2]),
        spill_instructions=sum(i.opcode.split(".")[0] in ("STL", "LDL") for i in code),
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size or 0,
        async_copies=dict(copies),
        loads=dict(loads),
        warnings=re.findall(r"Potential Performance Loss: (.*)", log),
        **_loop_facts(body, names, variant, chip),
    )


def _narrow(opcode: str) -> str:
    """Bits of a load that does not name 64 or more."""
    return next((bits for bits in ("8", "16") if re.search(rf"\.[US]{bits}\b", opcode)), "32")


def _read_amd(compiled: Any, variant: Variant, chip: Chip) -> Build:
    text = compiled.asm["amdgcn"]

    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"{variant}: the assembly's metadata has no .{name}; its format changed")
        return int(found[1])

    code = read_amdgcn(text)
    names, copies, loads = chip.tensor_16bit + chip.tensor_32bit, Counter[str](), Counter[str]()
    body = inner_loop(code, names)
    for instruction in body:
        if instruction.opcode.startswith(("global_load_", "buffer_load_")):
            words = re.search(r"dword(?:x(\d))?", instruction.opcode)
            bits = 32 * int(words[1] or 1) if words else 8 if "byte" in instruction.opcode else 16
            straight = re.search(r"\blds\b", instruction.opcode.replace("_", " ") + " " + instruction.operands)
            (copies if straight else loads)[str(bits)] += 1
    spilled = 4 * fact("vgpr_spill_count")
    return Build(
        registers=fact("vgpr_count"),
        stack=fact("private_segment_fixed_size"),
        spill_stores=spilled,
        spill_loads=spilled,
        spill_instructions=sum(i.opcode.startswith("scratch_") for i in code),
        shared=max(compiled.metadata.shared, fact("group_segment_fixed_size")),
        tensor_memory=0,
        async_copies=dict(copies),
        loads=dict(loads),
        **_loop_facts(body, names, variant, chip),
    )


def _loop_facts(body: Sequence[Instruction], names: tuple[str, ...], variant: Variant, chip: Chip) -> dict[str, Any]:
    tensor = [i.opcode for i in body if i.opcode.startswith(names)]
    flops = [_flops(opcode) for opcode in tensor]
    # A warp group, four warps, works on one HGMMA together; one warp on any other.
    groups = variant.num_warps / (4 if chip.target == "sm_90" and tensor and tensor[0].startswith("HGMMA") else 1)
    known = bool(tensor) and step_of(variant).flops > 0 and None not in flops
    return {
        "tensor": dict(Counter(re.sub(r"\.F(16|32).*", "", opcode) for opcode in tensor)),
        "loop": dict(Counter(i.opcode.split(".")[0] for i in body)),
        "steps": sum(f for f in flops if f) * groups / step_of(variant).flops if known else None,
    }


def _flops(opcode: str) -> int | None:
    """FLOPs of one tensor-core instruction, from its name; None where that does not tell."""
    if shape := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)|v_mfma_\w*?_(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = (int(size) for size in shape.groups() if size)
        return 2 * m * n * k
    shapes = {"HMMA.16816": 16 * 8 * 16, "HMMA.1688": 16 * 8 * 8, "HMMA.1684": 16 * 8 * 4}
    return next((2 * size for name, size in shapes.items() if opcode.startswith(name + ".")), None)
