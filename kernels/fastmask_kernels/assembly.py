"""The inner loop of a compiled kernel, found in its machine code.

A disassembly (NVIDIA's SASS or AMD's assembly) becomes a list of `Instruction`, each with the instructions it may jump
to. A loop is what graph theory calls a natural loop: a jump back to an instruction that every path to the jump passes,
and all between the two. Address ranges would not do: compilers place waits of the loop behind the kernel's end and jump
back from there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Instruction", "inner_loop", "loops", "read_amdgcn", "read_sass"]


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
    dominators = _dominators(code, before)
    found: dict[int, set[int]] = {}
    for tail, instruction in enumerate(code):
        for head in instruction.following:
            if dominators[tail] >> head & 1:
                body = found.setdefault(head, {head})
                todo = [tail]
                while todo:
                    at = todo.pop()
                    if at not in body and dominators[at]:
                        body.add(at)
                        todo.extend(before[at])
    return list(found.values())


def _dominators(code: Sequence[Instruction], before: list[list[int]]) -> list[int]:
    """For each instruction the set of those that every path to it passes, as the bits of an integer.

    0 for what cannot be reached. Some thousand integers of some thousand bits: no need to work with basic blocks.
    """
    unknown = (1 << len(code)) - 1
    reached, todo = [False] * len(code), [0] if code else []
    while todo:
        at = todo.pop()
        if not reached[at]:
            reached[at] = True
            todo.extend(code[at].following)
    sets = [unknown if ok else 0 for ok in reached]
    changed = True
    while changed:
        changed = False
        for i in range(len(code)):
            if not reached[i]:
                continue
            common = 0 if i == 0 else unknown
            for j in before[i]:
                if i and reached[j]:
                    common &= sets[j]
            common |= 1 << i
            if common != sets[i]:
                sets[i], changed = common, True
    return sets


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
