"""Make a failing program smaller, as text: fewer outputs, statements, forced rules and inputs, for as long as it still fails.

Hypothesis has taken back what it drew, edits above all; the statements of a family's own program it cannot leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.fuzz.program import Program, expression, names_in, pruned, renamed, targets


def reduced(program: Program, fails: Callable[[Program], bool], attempts: int = 200) -> Program:
    """The smallest program found that ``fails`` still is true of; every question costs a compile."""
    left = attempts
    seen = {program}
    while True:
        for candidate in _smaller(program):
            if candidate in seen:
                continue
            seen.add(candidate)
            left -= 1
            if left < 0:
                return program
            if fails(candidate):
                program = candidate
                break
        else:
            return program


def _smaller(program: Program) -> Iterator[Program]:
    yield from _without_flags(program)
    if len(program.outputs) > 1:
        for index in range(len(program.outputs)):
            kept = program.outputs[:index] + program.outputs[index + 1 :]
            yield _clean(program.replace(outputs=kept))
        for output in program.outputs:
            yield _clean(program.replace(outputs=(output,)))
    for index in reversed(range(len(program.lines))):
        yield from _without_line(program, index)
    for index, output in enumerate(program.outputs):  # an intermediate in place of what is made of it
        for name in names_in(output, {name for line in program.lines for name in targets(line)}):
            if name != output:
                yield _clean(program.replace(outputs=(*program.outputs[:index], name, *program.outputs[index + 1 :])))


def _without_flags(program: Program) -> Iterator[Program]:
    if program.dynamic or program.backward:
        yield program.replace(dynamic=False, backward=False)
    for rule in program.rules:
        yield program.replace(rules=tuple(each for each in program.rules if each != rule))
    if _clean(program) != program:
        yield _clean(program)
    for index, (name, made) in enumerate(program.inputs):
        if made.startswith("special("):
            plain = made.removeprefix("special(").removesuffix(")")
            yield program.replace(inputs=(*program.inputs[:index], (name, plain), *program.inputs[index + 1 :]))


def _without_line(program: Program, index: int) -> Iterator[Program]:
    """Drop a statement; where its result is read, read its operands instead."""
    line = program.lines[index]
    rest = program.lines[:index] + program.lines[index + 1 :]
    bound = targets(line)
    if not bound:
        yield _clean(program.replace(lines=rest))
        return
    known = {name for name, _ in program.inputs} | {name for each in program.lines[:index] for name in targets(each)}
    for operand in dict.fromkeys(names_in(expression(line), known)):
        changes = dict.fromkeys(bound, operand)
        if operand in bound:
            yield _clean(program.replace(lines=rest))
            continue
        after = tuple(_renamed_line(each, changes) for each in rest[index:])
        outputs = tuple(renamed(output, changes) for output in program.outputs)
        yield _clean(program.replace(lines=(*rest[:index], *after), outputs=outputs))


def _renamed_line(line: str, changes: dict[str, str]) -> str:
    text = expression(line)
    return line[: len(line) - len(text)] + renamed(text, changes)


def _clean(program: Program) -> Program:
    """Without statements nobody reads and inputs nobody names."""
    program = pruned(program)
    text = " ".join((*program.lines, *program.outputs))
    used = set(names_in(text, {name for name, _ in program.inputs}))
    while True:  # an input may be a view of another one
        more = {n for name, made in program.inputs if name in used for n in names_in(made, {i for i, _ in program.inputs})}
        if more <= used:
            break
        used |= more
    return program.replace(inputs=tuple(each for each in program.inputs if each[0] in used))
