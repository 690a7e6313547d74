"""What a kernel's machine code costs per iteration of its loops, read from the SASS of an NVIDIA cubin without a GPU.

`cuobjdump -sass` prints each instruction with its 128-bit encoding. Bits 105 to 108 are its stall count: the cycles
that the compiler makes a warp wait before its next instruction. Their sum over a loop is a time that no GPU can beat
for one warp. (Waiting for memory, barriers and tensor cores is decided at run time and comes on top.)

A loop is what lies between a backward branch and its target. Loops with matrix products do a kernel's work, so the
figures are theirs. bars.json, beside the committed report, has each figure's bar for the main path; a change may lower
any bar, but must say why if it raises one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

PRODUCTS = ("HGMMA", "HMMA", "UTCHMMA")
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/\n\s+/\* 0x([0-9a-f]{16}) \*/", re.MULTILINE
)
_GUARD = re.compile(r"^@!?U?P[T\d]+\s+")


class Instruction(NamedTuple):
    """`opcode`: with its modifiers, as LDGSTS.E.BYPASS.128; `target`: where a branch goes."""

    address: int
    opcode: str
    stall: int
    target: int | None

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def narrow_copy(self) -> bool:
        """A copy from global to shared memory of four bytes a thread, where sixteen would fit."""
        return self.name == "LDGSTS" and self.opcode.rpartition(".")[2] not in ("64", "128")


class Span(NamedTuple):
    """The instructions of one loop: indices of the first and of the last, which is the branch back."""

    first: int
    last: int

    def holds(self, other: Span) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


@dataclass
class Code:
    """The loops of a kernel.

    `instructions`, `stalls`: of one iteration of each innermost loop with products, in program order. `step`: stall
    cycles of one iteration of the outermost loop around them, with every loop inside counted once; 0 if there is none.
    The counts that follow are of instructions in any loop: copies of four bytes, special functions, checks of a
    division's operands and calls (the slow path of a division), and loads and stores of spilled registers. `waits`: for
    each loop with products that waits for copies, how many later groups of copies may still be in flight then; 0
    exposes the full latency of memory.
    """

    instructions: list[int] = field(default_factory=list)
    stalls: list[int] = field(default_factory=list)
    step: int = 0
    narrow: int = 0
    mufu: int = 0
    fchk: int = 0
    calls: int = 0
    reloads: int = 0
    waits: list[int] = field(default_factory=list)


def measure(sass: str) -> Code:
    """The figures of one kernel, except `waits`, from the output of `cuobjdump -sass`."""
    code = parse(sass)
    spans = loops(code)
    multiplying = [span for span in spans if any(x.name in PRODUCTS for x in _body(code, span))]
    inner = [span for span in multiplying if not any(span.holds(other) for other in multiplying)]
    outer = [span for span in multiplying if any(span.holds(other) for other in inner)]
    looping = {i for span in spans for i in range(span.first, span.last + 1)}
    counts = Counter(code[i].name for i in looping)
    return Code(
        instructions=[len(_body(code, span)) for span in inner],
        stalls=[_stalls(code, span) for span in inner],
        step=max((_stalls(code, span) for span in outer), default=0),
        narrow=sum(code[i].narrow_copy for i in looping),
        mufu=counts["MUFU"],
        fchk=counts["FCHK"],
        calls=counts["CALL"],
        reloads=counts["LDL"] + counts["STL"],
    )


def parse(sass: str) -> list[Instruction]:
    found = []
    for address, text, high in _INSTRUCTION.findall(sass):
        text = _GUARD.sub("", text)
        opcode, _, operands = text.partition(" ")
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        stall = int(high, 16) >> (105 - 64) & 15
        found.append(Instruction(int(address, 16), opcode, stall, int(target[1], 16) if target else None))
    return found


def loops(code: list[Instruction]) -> list[Span]:
    """All loops in program order, outer loops first. (A branch to itself, the padding at the end, is not a loop.)"""
    index = {x.address: i for i, x in enumerate(code)}
    ends: dict[int, int] = {}
    for i, x in enumerate(code):
        if x.target is not None and x.target < x.address:
            ends[index[x.target]] = i  # several branches to one target, as from `continue`, are one loop
    return [Span(first, last) for first, last in sorted(ends.items())]


def _body(code: list[Instruction], span: Span) -> list[Instruction]:
    return code[span.first : span.last + 1]


def _stalls(code: list[Instruction], span: Span) -> int:
    return sum(x.stall for x in _body(code, span))


def waits(ttgir: str) -> list[int]:
    """`Code.waits` from a kernel's TTGIR, Triton's last form before LLVM: the least `num` of each loop's waits."""
    found: list[int] = []
    stack: list[tuple[str, list[int], bool]] = []  # of open loops: indentation, `num` of waits, products
    for line in ttgir.splitlines():
        indent, words = line[: len(line) - len(line.lstrip())], line.strip()
        if "= scf.for " in words or words.startswith("scf.for "):
            stack.append((indent, [], False))
        elif stack and words.startswith("}") and indent == stack[-1][0]:
            _, nums, multiplies = stack.pop()
            if multiplies and nums:
                found.append(min(nums))
        elif stack:
            indent, nums, multiplies = stack[-1]
            if number := re.search(r"ttg\.async_wait .*\{num = (\d+)", words):
                nums.append(int(number[1]))
            stack[-1] = indent, nums, multiplies or "dot" in words
    return found


# --- bars ------------------------------------------------------------------------------------------------------------

ADVICE = "a change that must raise a bar edits docs/results/aot/bars.json and says why in its commit"


def figures(code: Mapping[str, Any], registers: int, spills: int) -> dict[str, Any]:
    """The figures of a build that have bars: its `Code` as a dictionary, and the kernel's registers and spills."""
    return {**code, "registers": registers, "spills": spills}


def broken_bars(stage: str, got: Mapping[str, Any], bars: Mapping[str, Any]) -> list[str]:
    """The figures of a build that are worse than their bars, one line each: higher or, for `waits`, lower."""
    lines = []
    for name, bar in bars.items():
        figure, limit = _list(got[name]), _list(bar)
        worse = [x < y if name == "waits" else x > y for x, y in zip(figure, limit)]
        if any(worse) or len(figure) != len(limit):
            lines.append(f"{stage}: {name} {got[name]}, the bar is {bar}; {ADVICE}")
    return lines


def _list(x: Any) -> list[Any]:
    return list(x) if isinstance(x, Iterable) else [x]


def cells(code: Code) -> list[str]:
    """A row's cells for `COLUMNS`."""
    row = asdict(code)
    return [" + ".join(map(str, x)) if isinstance(x, list) else str(x or "") for x in row.values()]


COLUMNS = ("instructions", "stalls", "step", "LDGSTS.32", "MUFU", "FCHK", "CALL", "LDL/STL in loops", "waits")
