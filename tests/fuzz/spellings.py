"""What the edit `spelling` replaces: keywords, and neighbours of an operator that a reader of a node must tell apart."""

from __future__ import annotations

#: Keywords and neighbours of a spelling: what a reader of a node must look at.
SPELLINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"\.mean\(-1, keepdim=True\)",
        (
            ".mean(-1, keepdim=True, dtype=torch.bfloat16)",
            ".mean(-1, keepdim=True, dtype=torch.float64)",
            ".mean(-2, keepdim=True)",
            ".mean((-2, -1), keepdim=True)",
            ".sum(-1, keepdim=True)",
            ".var(-1, keepdim=True, correction=0)",
            ".mean(keepdim=True)",
        ),
    ),
    (r"\.amax\(-1, keepdim=True\)", (".amax(-2, keepdim=True)", ".amax((-2, -1), keepdim=True)", ".amin(-1, keepdim=True)")),
    (r"\.amax\(\)", (".amax(0)", ".amin()", ".sum()")),
    (
        r"\.sum\(dim=1\)",
        (".sum(dim=1, dtype=torch.float32)", ".sum(dim=1, dtype=torch.float16)", ".sum(dim=0)", ".mean(dim=1)"),
    ),
    (r"\.sum\(1\)", (".sum(1, dtype=torch.float64)", ".sum(0)", ".amax(1)")),
    (
        r"^torch\.add\((\w+), ([\w.]+)\)$",
        (r"torch.add(\1, \2, alpha=2)", r"torch.add(\1, \2, alpha=0.5)", r"torch.sub(\1, \2)"),
    ),
    (r"^([\w.]+) \+ ([\w.]+)$", (r"torch.add(\1, \2, alpha=2)", r"torch.add(\2, \1, alpha=0.5)", r"\1 - \2", r"\2 + \1")),
    (r"^([\w.]+) \* ([\w.]+)$", (r"\2 * \1", r"\1 * \1", r"\1 / \2", r"\1 + \2")),
    (
        r"^([\w.]+) / ([\w.]+)$",
        (
            r"torch.div(\1, \2, rounding_mode='floor')",
            r"torch.div(\1, \2, rounding_mode='trunc')",
            r"\1 // \2",
            r"\2 / \1",
            r"\1 * (1.0 / \2)",
        ),
    ),
    (
        r"\.clamp\(-([\d.]+), ([\d.]+)\)",
        (
            r".clamp(min=-\1)",
            r".clamp(max=\2)",
            r".clamp(\2, -\1)",
            r".clamp(-\1, 0.0)",
            r".clamp(torch.tensor(-\1), torch.tensor(\2))",
            r".clamp(float('-inf'), float('inf'))",
            r".clamp(-100000.0, 100000.0)",
            r".clamp(float('nan'), \2)",
        ),
    ),
    (r"\.float\(\)", (".double()", ".bfloat16()", ".half()", ".int()", ".float().float()", ".to(torch.float32, copy=True)")),
    (
        r"\.to\(E4\)",
        (".to(E5)", ".to(torch.int8)", ".to(torch.bfloat16).to(E4)", ".half().to(E4)", ".to(torch.float8_e4m3fnuz)"),
    ),
    (r"\.to\((\w+)\.dtype\)", (".to(torch.int8)", ".float()", ".half()", r".to(torch.int8).to(\1.dtype)", ".double()", "")),
    (r"torch\.rsqrt\(([^)]*)\)", (r"torch.sqrt(\1)", r"1.0 / torch.sqrt(\1)", r"\1 ** -0.5", r"torch.reciprocal(\1)")),
    (r"\.pow\(2\)", (".pow(2.0)", ".pow(3)", ".pow(2.5)", ".square()", ".abs()")),
    (r"\.abs\(\)", ("", ".square()", ".abs().abs()", ".neg().abs()")),
    (r"F\.silu\((\w+)\)", (r"F.relu(\1)", r"\1 * torch.sigmoid(\1)", r"F.mish(\1)", r"F.hardswish(\1)", r"\1.sigmoid()")),
    (r"approximate='tanh'", ("approximate='none'",)),
    (r"\.chunk\(2, -1\)", (".chunk(2, 0)", ".chunk(2, -1)[::-1]", ".split(1, -1)[:2]")),
    (
        r"torch\.cat\(\((\w+), (\w+)\), -1\)",
        (r"torch.cat((\2, \1), -1)", r"torch.cat((\1, \2), -2)", r"torch.cat((\1, \1), -1)"),
    ),
    (r"\.unsqueeze\((\d)\)", (r".unsqueeze(-2)", r".unsqueeze(0)")),
    (r"\.transpose\(1, 2\)", ("", ".transpose(1, 2).contiguous()", ".transpose(-2, -1)", ".permute(0, 2, 1, 3)")),
    (r"\.reshape\(", (".view(", ".contiguous().view(")),
    (r"out_dtype=torch\.\w+", ("out_dtype=torch.float32", "out_dtype=torch.float16", "out_dtype=E4", "out_dtype=None")),
    (r", 0\.0\)", (", 1.0)", ", float('nan'))", ", -0.0)")),
    (r"index_put_\(\((\w+),\), (\w+)\)", (r"index_put_((\1,), \2, accumulate=True)", r"index_put_((\1,), \2[:1])")),
    (r"<=", ("<", ">=", "==", "!=")),
    (r">=", (">", "<=", "==")),
    (r" & ", (" | ", " ^ ")),
    (r"torch\.sort\((\w+)\)", (r"torch.sort(\1, descending=True)", r"torch.sort(\1, stable=True)")),
    (r"'rceil'", ("'floor'",)),
    (r", False\)$", (", True)",)),
    (r"dtype=torch\.int32", ("dtype=torch.int64", "dtype=torch.int16")),
)
