"""What is done to a family's own program: small changes to its text, each of which may turn a match into a near miss.

An edit knows no rule and no shapes: most give programs that run, eager throws the others out. Each takes a way to draw and a
program, and returns another program, or None where there is nothing to change.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from hypothesis import strategies as st

from tests.fuzz.builder import Draw
from tests.fuzz.program import NAME, Program, defined_before, expression, names_in, renamed, targets
from tests.fuzz.spellings import SPELLINGS

Edit = Callable[[Draw, Program], "Program | None"]

DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool", "complex64", "float8_e4m3fn")


def _position(draw: Draw, program: Program, least: int = 0) -> int:
    return int(draw(st.integers(least, len(program.lines))))


def _of(draw: Draw, choices: object) -> str:
    return draw(st.sampled_from(list(choices)))  # type: ignore[call-overload,no-any-return]


def _inserted(program: Program, position: int, *lines: str) -> Program:
    return program.replace(lines=(*program.lines[:position], *lines, *program.lines[position:]))


def _changed(program: Program, position: int, line: str) -> Program:
    return program.replace(lines=(*program.lines[:position], line, *program.lines[position + 1 :]))


def _fresh(program: Program, stem: str) -> str:
    text = "\n".join((*program.lines, *(name for name, _ in program.inputs)))
    return next(name for i in range(100) if (name := f"{stem}{i or ''}") not in text)


def second_user(draw: Draw, program: Program) -> Program | None:
    """Return an intermediate, or something made of it."""
    name = _of(draw, defined_before(program, len(program.lines)))
    form = _of(draw, ("{}", "{} * 2", "{}.float().sum()", "{}.clone()", "{}[:1]", "{}.reshape(-1)", "{}.detach()"))
    at = draw(st.integers(0, len(program.outputs)))
    outputs = [*program.outputs[:at], form.format(name), *program.outputs[at:]]
    return program.replace(outputs=tuple(outputs))


def view_of_output(draw: Draw, program: Program) -> Program | None:
    """Return a view of a result in place of it, or beside it."""
    if not program.outputs:
        return None
    at = draw(st.integers(0, len(program.outputs) - 1))
    forms = (
        "{}[1:]",
        "{}.view(torch.uint8)",
        "{}.t()",
        "{}[..., ::2]",
        "{}.reshape(-1)",
        "{}[0]",
        "{}.chunk(2, -1)[1]",
        "{}[None]",
    )
    form = _of(draw, (*forms, "{}.unbind(0)", "{}.expand(2, *{}.shape)", "{}.transpose(0, -1)", "{}[:-1]", "{}.squeeze()"))
    made = form.replace("{}", program.outputs[at])
    kept = [program.outputs[at]] if draw(st.booleans()) else []
    return program.replace(outputs=(*program.outputs[:at], *kept, made, *program.outputs[at + 1 :]))


def snapshot(draw: Draw, program: Program) -> Program | None:
    """Copy an input between two statements, and return the copy or use it in place of what a later one reads."""
    position = _position(draw, program)
    name = _of(draw, [name for name, _ in program.inputs])
    copy = _fresh(program, "old")
    form = _of(
        draw, ("{}.clone()", "{}[:4].clone()", "{}.view(-1).clone()", "{}.float()", "{} + 0", "torch.empty_like({}).copy_({})")
    )
    changed = _inserted(program, position, f"{copy} = {form.replace('{}', name)}")
    if draw(st.booleans()):
        for later in range(position + 1, len(changed.lines)):
            line = changed.lines[later]
            if name in names_in(expression(line), {name}) and targets(line):
                bound = line.partition(" = ")[0]
                return _changed(changed, later, f"{bound} = {renamed(expression(line), {name: copy})}")
    return changed.replace(outputs=(*changed.outputs, copy))


def write(draw: Draw, program: Program) -> Program | None:
    """Write in place between two statements."""
    position = _position(draw, program)
    name = _of(draw, defined_before(program, position))
    form = _of(
        draw,
        ("{}.mul_(2)", "{}.zero_()", "{}[:1] = 0", "{}.copy_({}.flip(0))", "{}.add_(1)", "{}.neg_()", "{}[..., :1].fill_(1)"),
    )
    return _inserted(program, position, form.replace("{}", name))


def convert(draw: Draw, program: Program) -> Program | None:
    """Another dtype in the middle, for good or there and back."""
    position = _position(draw, program)
    name = _of(draw, defined_before(program, position))
    dtype = _of(draw, DTYPES)
    back = f".to({name}.dtype)" if draw(st.booleans()) else ""
    return _inserted(program, position, f"{name} = {name}.to(torch.{dtype}){back}")


def step(draw: Draw, program: Program) -> Program | None:
    """One more operator in the middle: some change nothing, some the layout, some the values."""
    position = _position(draw, program)
    name = _of(draw, defined_before(program, position))
    same = (
        "{}.contiguous()",
        "{}.clone()",
        "{} + 0",
        "{} * 1",
        "{}.view({}.shape)",
        "{}[..., :]",
        "{}.detach()",
        "{}.view_as({})",
    )
    layout = ("transposed({})", "strided({})", "padded({})", "offset({})", "{}.t().contiguous().t()", "{}.expand({}.shape)")
    other = (
        "{}.abs()",
        "-{}",
        "torch.sin({})",
        "{}.flip(-1)",
        "{} * 2",
        "{}.roll(1, 0)",
        "{}.relu()",
        "{}.sort(-1)[0]",
        "{}[:1]",
    )
    shape = (
        "{}.unsqueeze(0)",
        "{}[None].squeeze(0)",
        "{}.reshape(-1)",
        "{}.mT",
        "{}.broadcast_to(2, *{}.shape)",
        "{}.nan_to_num()",
    )
    form = _of(draw, (*same, *layout, *other, *shape))
    return _inserted(program, position, f"{name} = {form.replace('{}', name)}")


def spelling(draw: Draw, program: Program) -> Program | None:
    """A keyword, or a neighbouring operator."""
    found = []
    for position, line in enumerate(program.lines):
        text = expression(line)
        for pattern, instead in SPELLINGS:
            if re.search(pattern, text):
                found.append((position, pattern, instead))
    if not found:
        return None
    position, pattern, instead = found[draw(st.integers(0, len(found) - 1))]
    line = program.lines[position]
    bound, text = line[: len(line) - len(expression(line))], expression(line)
    return _changed(program, position, bound + re.sub(pattern, _of(draw, instead), text, count=1))


_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])")


def number(draw: Draw, program: Program) -> Program | None:
    """Another number: a bound, an axis, an end of a slice, an epsilon."""
    found = [(p, m) for p, line in enumerate(program.lines) for m in _NUMBER.finditer(expression(line))]
    if not found:
        return None
    position, match = found[draw(st.integers(0, len(found) - 1))]
    text = match.group()
    if "." in text or "e" in text:
        made = _of(
            draw, ("0.0", "1.0", str(float(text) * 2), str(-float(text)), "1e-12", "float('inf')", str(float(text) + 0.1))
        )
    else:
        made = _of(draw, (str(int(text) + 1), str(max(0, int(text) - 1)), "0", "-1", str(int(text) * 2), f"-{text}"))
    line = program.lines[position]
    bound, rest = line[: len(line) - len(expression(line))], expression(line)
    return _changed(program, position, bound + rest[: match.start()] + made + rest[match.end() :])


def operand(draw: Draw, program: Program) -> Program | None:
    """Another tensor in one place of one statement."""
    position = _position(draw, program, 1) - 1
    line = program.lines[position]
    known = defined_before(program, position)
    places = [m for m in NAME.finditer(expression(line)) if m.group() in known]
    if not places:
        return None
    match = places[draw(st.integers(0, len(places) - 1))]
    bound, text = line[: len(line) - len(expression(line))], expression(line)
    return _changed(program, position, bound + text[: match.start()] + _of(draw, known) + text[match.end() :])


def again(draw: Draw, program: Program) -> Program | None:
    """Compute one of the results a second time, and return that too, or a view of it."""
    if not program.outputs or not program.lines:
        return None
    start = _position(draw, program, 1) - 1
    changes: dict[str, str] = {}
    lines = []
    for line in program.lines[start:]:
        bound = targets(line)
        if not bound:
            continue
        text = renamed(expression(line), changes)
        changes.update({name: f"{name}_again" for name in bound})
        lines.append(
            f"{', '.join(changes[name] for name in bound)}{',' if len(bound) == 1 and ', ' in line[:3] else ''} = {text}"
        )
    outputs = [renamed(output, changes) for output in program.outputs]
    new = [output for output in outputs if output not in program.outputs]
    if not new:
        return None
    made = _of(draw, new)
    form = _of(draw, ("{}", "{}[1:]", "{}.float()", "{}.reshape(-1)", "{}.view(torch.uint8)"))
    return program.replace(lines=(*program.lines, *lines), outputs=(*program.outputs, form.format(made)))


def one_input(draw: Draw, program: Program) -> Program | None:
    """Another dtype, layout, size or other values of an input; or a view of another input."""
    declared = ("at", "n", "kc", "vc") if dict(program.options).get("prefill_only") else ()  # positions from 0, an empty cache
    choices = [at for at, (name, _) in enumerate(program.inputs) if name not in declared]
    if not choices:
        return None
    at = choices[draw(st.integers(0, len(choices) - 1))]
    name, made = program.inputs[at]
    forms = ["strided({})", "transposed({})", "padded({})", "offset({})", "special({})", "{}[:1]", "{}[..., :1]", "{}[:0]"]
    forms += [
        "({} * 1e30)",
        "({} * 1e-30)",
        "({} * 0)",
        "-{}",
        "{}.expand(2, *{}.shape)[0]",
        "{}[..., None]",
        "{}.to(torch.{dtype})",
    ]
    forms += ["{}.to(torch.{dtype})"]
    earlier = [other for other, _ in program.inputs[:at]]
    if earlier:
        forms += ["{other}", "{other}[:]", "{other}.view({}.shape)"]
    form = _of(draw, forms)
    if "{dtype}" in form:
        form = form.replace("{dtype}", _of(draw, DTYPES))
    if "{other}" in form:
        form = form.replace("{other}", _of(draw, earlier))
    inputs = (*program.inputs[:at], (name, form.replace("{}", made)), *program.inputs[at + 1 :])
    return program.replace(inputs=inputs)


def rows(draw: Draw, program: Program) -> Program | None:
    """Other indices, the last of them out of range, negative, or twice the same."""
    at = [i for i, (name, _) in enumerate(program.inputs) if name in ("i", "ids", "inverse")]
    if not at:
        return None
    index = at[draw(st.integers(0, len(at) - 1))]
    name, made = program.inputs[index]
    form = _of(
        draw,
        ("{} + 64", "{} - 65", "{} * 1000", "{} - 1", "{} * 0", "{}.to(torch.int32)", "-{}", "{} > 3", "{}.flip(0)", "{} - 40"),
    )
    return program.replace(
        inputs=(*program.inputs[:index], (name, f"({form.replace('{}', made)})"), *program.inputs[index + 1 :])
    )


def order(draw: Draw, program: Program) -> Program | None:
    """Two statements exchanged."""
    if len(program.lines) < 2:
        return None
    one = draw(st.integers(0, len(program.lines) - 1))
    two = draw(st.integers(0, len(program.lines) - 1))
    lines = list(program.lines)
    lines.insert(two, lines.pop(one))
    return program.replace(lines=tuple(lines))


def repeated_store(draw: Draw, program: Program) -> Program | None:
    """A statement a second time, later: a store twice into the same rows, say."""
    position = _position(draw, program, 1) - 1
    later = draw(st.integers(position + 1, len(program.lines)))
    return _inserted(program, later, program.lines[position])


EDITS: tuple[Edit, ...] = (
    second_user,
    view_of_output,
    snapshot,
    write,
    convert,
    step,
    *[spelling] * 5,  # what readers of nodes overlook: a dozen patterns, several answers each
    number,
    operand,
    again,
    one_input,
    rows,
    order,
    repeated_store,
)


def edited(draw: Draw, program: Program, count: int) -> Program:
    done = []
    for _ in range(count):
        edit = EDITS[draw(st.integers(0, len(EDITS) - 1))]
        if not program.lines:
            break
        made = edit(draw, program)
        if made is not None and made != program:
            program = made
            done.append(edit.__name__)
    return program.replace(edits=tuple(done))
