"""The explicit, ordered lists of ops and rules: the one place that names them.

Rules run in this order; structure first (sharing, larger rewrites), then what remains. Adding an op or a rule is one line here
beside its folder or file.
"""

from __future__ import annotations

import functools
import hashlib
from importlib import import_module
from pathlib import Path
from types import ModuleType

from inductor_ext import autotune, lowering
from inductor_ext.errors import SettingError
from inductor_ext.op import Op
from inductor_ext.rule import Rule
from inductor_ext.settings import Settings

OP_MODULES = (
    "fp8_downcast",
    "downcast_fp8",
    "fp8_quantize",
    "scaled_mm",
    "scaled_mm_add",
    "scaled_mm_act_mul",
    "scaled_mm_rope",
    "rms_norm_quantize",
    "norm_quantize",
    "act_mul_quantize",
    "act_quantize",
    "act_cat_quantize",
    "qk_norm_rope",
    "qk_norm_rope_store",
    "varlen_attention",
    "mxfp8_quantize",
    "mxfp8_round",
    "mxfp8_grouped_mm",
    "moe_combine",
)
RULE_MODULES = (
    "prefill_only",
    "causal_attention",
    "grouped_queries",
    "moe_combine",
    "moe_scatter",
    "moe_masks",
    "written_columns",
    "residual_rows",
    "quantize_once",
    "mxfp8_grouped_mm",
    "mxfp8_scaled_grouped_mm",
    "scaled_mm_rope",
    "scaled_mm_act_mul",
    "scaled_mm_cat",
    "scaled_mm_siblings",
    "scaled_mm_add",
    "scaled_mm",
    "rms_norm_quantize",
    "layer_norm_quantize",
    "act_mul_quantize",
    "act_quantize",
    "act_cat_quantize",
    "qk_norm_rope_store",
    "qk_norm_rope",
    "downcast_fp8",
    "fp8_quantize",
    "fp8_downcast",
)

#: Sets of ops for ``inductor-ext build --preset``. An op may have kernels of its own for a preset (``Kernel.presets``).
PRESETS = {
    "downcast": ("fp8_downcast", "downcast_fp8", "fp8_quantize"),
    # Qwen3-0.6B quantised by torchao, row-wise, tensor-wise or static, any number of tokens
    "qwen3": (
        "fp8_downcast",
        "fp8_quantize",
        "scaled_mm",
        "scaled_mm_act_mul",
        "scaled_mm_add",
        "rms_norm_quantize",
        "act_mul_quantize",
        "qk_norm_rope",
        "scaled_mm_rope",
    ),
}

_HERE = Path(__file__).parent


@functools.cache
def ops() -> tuple[Op, ...]:
    """Every op, defined in PyTorch's dispatcher on the first call."""
    found = tuple(import_module(f"inductor_ext.kernels.{name}.op").OP for name in OP_MODULES)
    for op in found:
        op.define()
    return found


def module_of(op: Op) -> ModuleType:
    """The module that declares ``op``, whose docstring says all of it."""
    return import_module(f"inductor_ext.kernels.{op.name}.op")


@functools.cache
def rules() -> tuple[Rule, ...]:
    return tuple(import_module(f"inductor_ext.patterns.{name}").RULE for name in RULE_MODULES)


def rule_named(name: str) -> Rule:
    for rule in rules():
        if rule.name == name:
            return rule
    raise SettingError(f"rules: no rule is called {name!r}; rules are {', '.join(rule.name for rule in rules())}")


def check_rules(chosen: Settings) -> None:
    """SettingError for a mode given to a rule that does not exist."""
    for name in chosen.rules:
        rule_named(name)


@functools.cache
def define_lowerings() -> None:
    """Register every op's Inductor lowering; imports Inductor, so only the backend asks for it."""
    for op in ops():
        lowering.define(op)
        if op.autotune is not None:
            autotune.register(op, source_digest())


@functools.cache
def source_digest() -> bytes:
    """A hash of every Python source and kernel of the package: a change to any of them must miss Inductor's caches."""
    digest = hashlib.sha256()
    for folder in (_HERE, (_HERE / "kernels").resolve(), (_HERE / "patterns").resolve()):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cuh", ".h", ".json") and path.is_file():
                digest.update(path.relative_to(folder).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.digest()
