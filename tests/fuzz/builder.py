"""What families write programs with: one operator a line, so that an edit can get in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.program import Program

Draw = Callable[[Any], Any]


class Builder:
    """Collects inputs and statements; `let` names a result, `pick` draws one of several."""

    def __init__(self, draw: Draw, family: str, cuda: bool = False) -> None:
        self._draw, self.family, self.cuda = draw, family, cuda
        self._inputs: list[tuple[str, str]] = []
        self._lines: list[str] = []
        self._count = 0
        self.outputs: list[str] = []
        self.rules: dict[str, str] = {}
        self.options: dict[str, Any] = {}

    def pick(self, *choices: Any) -> Any:
        return self._draw(st.sampled_from(choices))

    def chance(self, percent: int) -> bool:
        """True in so many of a hundred programs; a minimised one has False."""
        return bool(self._draw(st.integers(0, 99)) >= 100 - percent)

    def number(self, low: int, high: int) -> int:
        return int(self._draw(st.integers(low, high)))

    def given(self, name: str, expression: str) -> str:
        self._inputs.append((name, expression))
        return name

    def let(self, expression: str, name: str = "") -> str:
        if not name:
            self._count += 1
            name = f"t{self._count}"
        self._lines.append(f"{name} = {expression}")
        return name

    def several(self, expression: str, *names: str) -> tuple[str, ...]:
        self._lines.append(f"{', '.join(names)}{',' if len(names) == 1 else ''} = {expression}")
        return names

    def do(self, statement: str) -> None:
        self._lines.append(statement)

    def give(self, *names: str) -> None:
        self.outputs.extend(names)

    def force(self, *rules: str, percent: int = 50) -> None:
        """Modes "always", which a share of the programs has; what its guard asks for besides profit is then all that counts."""
        if self.chance(percent):
            self.rules.update(dict.fromkeys(rules, "always"))

    # ---- what several families have ---------------------------------------------------------------------------------

    def dtype(self) -> str:
        return str(self.pick("bfloat16", "bfloat16", "float16", "float32"))

    def normal(self, *shape: int, dtype: str = "bfloat16", by: float = 1.0) -> str:
        size = ", ".join(map(str, shape))
        scaled = f" * {by}" if by != 1.0 else ""
        made = f"torch.randn({size})" if shape else "torch.randn(())"
        return f"({made}{scaled}).to(torch.{dtype})"

    def activation(self, name: str, *shape: int, dtype: str = "bfloat16", by: float = 3.0) -> str:
        """An input; a tenth have special values."""
        made = self.normal(*shape, dtype=dtype, by=by)
        return self.given(name, f"special({made})" if self.chance(10) else made)

    def scale(self, name: str = "s") -> str:
        """A scale of one element, an input."""
        return self.given(name, str(self.pick("torch.tensor(0.25)", "torch.tensor([[0.05]])", "torch.tensor(0.3)")))

    def static(self, y: str, scale: str, kind: str = "") -> str:
        """``y`` quantised with a scale that is known; the cast's name."""
        limit, drawn = self.pick((448.0, "E4"), (448.0, "E4"), (448.0, "E4"), (57344.0, "E5"), (240.0, "E4"))
        kind = kind or drawn
        up = self.let(f"{y}.float()") if self.chance(80) else y
        how = self.pick("div", "div", "reciprocal", "one_over", "mul")
        how = "one_over" if how == "reciprocal" and not scale.isidentifier() else how  # a number
        if how == "div":
            z = self.let(f"{up} / {scale}")
        elif how == "mul":
            z = self.let(f"{up} * {scale}")
        else:
            r = self.let(f"torch.reciprocal({scale})" if how == "reciprocal" else f"1.0 / {scale}")
            z = self.let(f"{up} * {r}")
        c = self.let(f"{z}.clamp(-{limit}, {limit})") if self.chance(90) else z
        return self.let(f"{c}.to({kind})")

    def dynamic(self, y: str, over: str = "-1") -> tuple[str, str]:
        """``y`` quantised with a scale made of it; the cast's and the scale's name."""
        a = self.let(f"{y}.abs()")
        if over == "all":
            m = self.let(self.pick(f"{a}.amax()", f"{a}.max()", f"torch.amax({a}, (0, 1), keepdim=True)"))
        elif self.chance(20):
            low, high = (self.let(f"{y}.{end}({over}, keepdim=True).abs()") for end in ("amin", "amax"))
            m = self.let(f"torch.maximum({low}, {high})")
        else:
            m = self.let(f"{a}.amax({over}, keepdim=True)")
        how = self.pick("torchao", "fp32", "fp32_clamped", "reciprocal", "multiplied", "other")
        if how == "other":
            return self._other_dynamic(y, m)
        if how == "torchao":
            d = self.let(f"{m} / 448.0")
            s = self.let(f"{d}.float()")
        elif how == "multiplied":
            f = self.let(f"{m}.float()")
            s = self.let(f"{f} * 0.002232142857142857")
        else:
            f = self.let(f"{m}.float()")
            if how != "fp32":
                f = self.let(f"{f}.clamp(min=1e-12)")
            s = self.let(f"448.0 / {f}" if how == "reciprocal" else f"{f} / 448.0")
        up = self.let(f"{y}.float()")
        z = self.let(f"{up} * {s}" if how == "reciprocal" else f"{up} / {s}")
        c = self.let(f"{z}.clamp(-448.0, 448.0)")
        return self.let(f"{c}.to(E4)"), s

    def _other_dynamic(self, y: str, m: str) -> tuple[str, str]:
        """`dynamic` where the scale is made in more steps, and any of them is read elsewhere."""
        made = [m]
        if self.chance(30):
            d = self.let(f"{m}.double()")
            e = self.let(f"{d}.clamp(min=1e-12)")
            f = self.let(f"448.0 / {e}")
            g = self.let(f"{f}.float()")
            made.append(self.let(f"{g}.reciprocal()"))
        else:
            made.append(self.let(f"{m}.float()"))
        for step in ("{0} + 1e-6", "torch.where({0} > 0, {0}, 1.0)", "{0} / 448.0", "{0}.clamp(1e-6, 50.0)"):
            if self.chance(60):
                made.append(self.let(step.format(made[-1])))
        if self.chance(40):
            for step in ("torch.log2({0})", "torch.ceil({0})", "torch.exp2({0})"):
                made.append(self.let(step.format(made[-1])))
        s, up = made[-1], self.let(f"{y}.float()")
        if self.chance(50):
            r = self.let(self.pick(f"{s}.reciprocal()", f"1.0 / {s}", f"448.0 / {s}"))
            made.append(r)
            z = self.let(f"{up} * {r}")
        else:
            z = self.let(f"{up} / {s}")
        c = self.let(f"{z}.clamp(-448.0, 448.0)")
        if self.chance(50):
            self.give(self.pick(*made))
        return self.let(f"{c}.to(E4)"), s if self.chance(70) else self.pick(*made)

    def norm(self, x: str, w: str, size: int) -> str:
        """RMSNorm in one of models' spellings."""
        how = self.pick("llama", "gemma", "torch", "fp32", "own_dtype", "llama")
        if how == "torch":
            return self.let(f"F.rms_norm({x}, ({size},), {w}, 1e-6)")
        h = self.let(f"{x}.float()")
        p = self.let(f"{h}.pow(2)" if self.chance(50) else f"{h} * {h}")
        m = self.let(f"{p}.mean(-1, keepdim=True)")
        e = self.let(f"{m} + 1e-6")
        r = self.let(f"torch.rsqrt({e})")
        n = self.let(f"{h} * {r}")
        if how == "llama":
            b = self.let(f"{n}.to({x}.dtype)")
            return self.let(f"{w} * {b}")
        if how == "gemma":
            v = self.let(f"{w}.float()")
            o = self.let(f"torch.add({v}, 1.0)" if self.chance(40) else f"1.0 + {v}")
        elif how == "own_dtype":
            o = self.let(f"torch.add({w}, 1.0)" if self.chance(40) else f"1.0 + {w}")
        else:
            o = self.let(f"{w}.float()")
        z = self.let(f"{n} * {o}")
        return self.let(f"{z}.to({x}.dtype)")

    def program(self) -> Program:
        return Program(
            self.family,
            tuple(self._inputs),
            tuple(self._lines),
            tuple(self.outputs),
            tuple(self.rules.items()),
            tuple(self.options.items()),
        )
