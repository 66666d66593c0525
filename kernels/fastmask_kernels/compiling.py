"""Compile one `Variant`, without having its chip, and read what the compiler made of it.

NVIDIA: registers, stack and instructions come from the binary (`cuobjdump`, in Triton's wheel), the bytes of spills and
warnings from the log of `ptxas`. AMD: all of it from the assembly and the metadata at its end.

The inner loop is found in the machine code, a list of `Instruction`, each with the instructions it may jump to. A loop
is what graph theory calls a natural loop: a jump back to an instruction that every path to the jump passes, and all
between the two. Address ranges would not do: compilers place waits of the loop behind the kernel's end and jump back
from there.
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

from fastmask_kernels.chips import CHIPS, Chip
from fastmask_kernels.recorder import Variant

__all__ = [
    "STEPS", "Build", "Instruction", "build", "dots", "inner_loop", "loops", "operand_bits", "read_amdgcn", "read_sass",
    "resident", "step_flops",
]  # fmt: skip


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
    steps: float | None
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
    known = bool(tensor) and step_flops(variant) > 0 and None not in flops
    return {
        "tensor": dict(Counter(re.sub(r"\.F(16|32).*", "", opcode) for opcode in tensor)),
        "steps": sum(f for f in flops if f) * groups / step_flops(variant) if known else None,
    }


def _flops(opcode: str) -> int | None:
    """FLOPs of one tensor-core instruction, from its name; None where that does not tell."""
    if shape := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)|v_mfma_\w*?_(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = (int(size) for size in shape.groups() if size)
        return 2 * m * n * k
    shapes = {"HMMA.16816": 16 * 8 * 16, "HMMA.1688": 16 * 8 * 8, "HMMA.1684": 16 * 8 * 4}
    return next((2 * size for name, size in shapes.items() if opcode.startswith(name + ".")), None)


# ---- the inner loop


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name with modifiers, what it works on, and the positions of those that may come next."""

    opcode: str
    operands: str
    following: tuple[int, ...]


def read_sass(text: str) -> list[Instruction]:
    """Instructions of the one function in the output of `cuobjdump -sass`."""
    pattern = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z]\w*[\w.]*)\s*([^;]*);")
    lines = [match.groups() for match in map(pattern.search, text.splitlines()) if match]
    position = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    if len(position) != len(lines):
        raise ValueError("the disassembly holds more than one function; a kernel that calls others cannot be read")
    instructions = []
    rejoins: dict[str, int] = {}  # barrier register -> where the last BSSY said that divergent threads meet
    for i, (_, guard, opcode, operands) in enumerate(lines):
        name, operands = opcode.split(".")[0], operands.strip()
        address = re.search(r"0x([0-9a-f]+)\)?$", operands)
        jump = position.get(int(address[1], 16)) if address else None
        conditional = guard is not None
        following = [i + 1]
        if name == "BSSY" and jump is not None:
            rejoins[operands.split(",")[0]] = jump
        elif name == "BSYNC":
            following = [i + 1, rejoins.get(operands, i + 1)]
        elif name == "BRA" and jump is not None:
            # `BRA.U UP0, 0x10` and `BRA P0, 0x10` have their condition among the operands.
            following = [jump, i + 1] if conditional or "," in operands else [jump]
        elif name in ("EXIT", "RET", "BRX", "JMX", "BPT") and not conditional:
            following = []
        instructions.append((opcode, operands, following))
    return _instructions(instructions)


def read_amdgcn(text: str) -> list[Instruction]:
    """Instructions of the kernel in AMD assembly, the first function of the text."""
    body = text.split(".Lfunc_end0:")[0]
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in body.splitlines():
        line = line.split(";")[0].rstrip()
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+([a-z]\w+)(?:\s+(.*))?$", line):
            lines.append((found[1], (found[2] or "").strip()))
    instructions = []
    for i, (opcode, operands) in enumerate(lines):
        following = [i + 1]
        if opcode == "s_branch":
            following = [labels[operands]]
        elif opcode.startswith("s_cbranch"):
            following = [labels[operands], i + 1]
        elif opcode in ("s_endpgm", "s_setpc_b64"):
            following = []
        instructions.append((opcode, operands, following))
    return _instructions(instructions)


def _instructions(found: list[tuple[str, str, list[int]]]) -> list[Instruction]:
    """Without jumps past the end, and each that follows named once."""
    inside = range(len(found))
    return [Instruction(op, args, tuple(j for j in dict.fromkeys(after) if j in inside)) for op, args, after in found]


def loops(code: Sequence[Instruction]) -> list[set[int]]:
    """The natural loops of `code`, as sets of positions; jumps back to one instruction make one loop."""
    before: list[list[int]] = [[] for _ in code]
    for i, instruction in enumerate(code):
        for j in instruction.following:
            before[j].append(i)
    # What is reached, and whether the way there from the first instruction still goes on: a jump to one of those is a
    # jump back. (Of code from compilers, whose loops are entered at one place.)
    on_path = {0: True} if code else {}
    path = [(0, iter(code[0].following))] if code else []
    jumps = []
    while path:
        at, after = path[-1]
        for j in after:
            if j not in on_path:
                on_path[j] = True
                path.append((j, iter(code[j].following)))
                break
            if on_path[j]:
                jumps.append((at, j))
        else:
            on_path[at] = False
            path.pop()
    found: dict[int, set[int]] = {}
    for tail, head in jumps:
        body, todo = found.setdefault(head, {head}), [tail]
        while todo:
            at = todo.pop()
            if at not in body and at in on_path:
                body.add(at)
                todo.extend(before[at])
    return list(found.values())


def inner_loop(code: Sequence[Instruction], wanted: tuple[str, ...]) -> list[Instruction]:
    """The body of the innermost loop with the most instructions whose names begin with one of `wanted`.

    Of equals the longest; where no loop has any, the longest innermost loop; where there is no loop, all of the code.
    """
    found = loops(code)
    weights = [sum(code[i].opcode.startswith(wanted) for i in body) for body in found]
    if any(weights):
        found = [body for body, weight in zip(found, weights, strict=True) if weight]
    innermost = [body for body in found if not any(other < body for other in found)]
    if not innermost:
        return list(code)
    best = max(innermost, key=lambda body: (sum(code[i].opcode.startswith(wanted) for i in body), len(body)))
    return [code[i] for i in sorted(best)]
