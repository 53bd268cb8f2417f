"""Which uniform registers NVIDIA's machine code may read before it has written them: a mistake of its assembler.

ptxas 12.8 was seen to work out the operands of the products of two loops ahead of the first one only, behind the branch that
skips it. The kernel then multiplies what lies anywhere, where the first loop has nothing to do.
"""

import re

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_WRITERS = ("R2UR", "S2UR")


def reads_unwritten(text):
    """Return (address, instruction, registers) of every read that some path reaches before a write, of a disassembly.

    What is written under a condition counts for what is read under one, since those of one copy, the thread that begins
    it, are kept in several predicates.
    """
    code, labels = [], {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _LINE.search(line):
            code.append(found.groups())
    effects = [_effects(name, operands) for _, _, name, operands in code]
    known = [None] * len(code)  # what is written on every path to here
    known[0] = frozenset()
    work = [0]
    while work:
        at = work.pop()
        _, predicate, name, operands = code[at]
        written = effects[at][0]
        after = known[at] | (
            {~number for number in written} if predicate else written | {~number for number in written}
        )
        following = [at + 1] if predicate or name.split(".")[0] not in ("BRA", "EXIT") else []
        if name.startswith("BRA"):
            following.append(labels[re.search(r"\((\.L_x_\d+)\)", operands)[1]])
        for place in following:
            if place < len(code):
                new = after if known[place] is None else known[place] & after
                if new != known[place]:
                    known[place] = new
                    work.append(place)
    return [
        (address, f"{name} {operands}".strip(), sorted(missing))
        for (address, predicate, name, operands), (_, read), before in zip(code, effects, known, strict=True)
        if before is not None
        and (missing := {number for number in read if (~number if predicate else number) not in before})
    ]


def _effects(name, operands):
    """Return the uniform registers that an instruction writes and those that it reads."""
    written, read = set(), set()
    base = name.split(".")[0]
    wide = ".64" in name or ".WIDE" in name
    for place, operand in enumerate(operands.split(",")):
        for number in map(int, re.findall(r"\bUR(\d+)\b", operand)):
            if place == 0 and (base.startswith("U") or base in _WRITERS):
                written |= {number, number + 1} if wide else {number}
            elif "gdesc" in operand:  # one place in shared memory, or two where the first operand lies there as well
                first = operands.split(",")[1].strip()
                read |= set(range(number, number + (2 if re.match(r"R\d", first) else 4)))
            else:
                read |= {number, number + 1} if ".64" in name and base.startswith("U") else {number}
    return written, read
