"""qk_norm_rope: its reference against the models' own functions, its arguments' errors, and the kernel against both."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch

from inductor_ext import jit
from inductor_ext.kernels.qk_norm_rope.op import NORMS, OP
from tests.support.equal import assert_same_bytes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MODELS = {"cast mul": "qwen3.Qwen3", "mul cast": "olmo2.Olmo2", "mul+1 cast": "gemma3.Gemma3"}


def call(q: Any, k: Any, weights: Any, cos: Any, sin: Any, norm: str, dtype: Any = None, eps: float = 1e-6, **turn: Any) -> Any:
    return torch.ops.inductor_ext.qk_norm_rope(q, k, *weights, cos, sin, eps, norm, dtype or q.dtype, **turn)


def operands(
    shape: tuple[int, int, int, int, int],
    dtype: Any = BF16,
    norm: str = "cast mul",
    *,
    weight: Any = None,
    table: Any = None,
    batched: bool = False,
    columns: int = 0,
    device: str = "cpu",
) -> list[Any]:
    """q and k as columns of one qkv buffer, weights, cos and sin, of D ``columns`` or as many as that.

    ``shape`` is B, S, H, Hkv, D.
    """
    b, s, h, kv, d = shape
    made = torch.Generator(device).manual_seed(5)
    buffer = (torch.randn(b, s, (h + 2 * kv) * d, device=device, generator=made) * 3).to(dtype)
    q, k = buffer[..., : h * d].view(b, s, h, d), buffer[..., h * d : (h + kv) * d].view(b, s, kv, d)
    weights = [(torch.rand(d, device=device, generator=made) + 0.5).to(weight or dtype) if norm else None for _ in range(2)]
    angles = torch.randn(b if batched else 1, s, columns or d, device=device, generator=made) * 9
    return [q, k, weights, angles.cos().to(table or dtype), angles.sin().to(table or dtype)]


def _in_a_model(norm: str, q: Any, k: Any, weights: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Hugging Face's modules and function, on [B, H, S, D] as there; the result as [B, S, H, D]."""
    pytest.importorskip("transformers")
    family, _, name = MODELS.get(norm, "llama.Llama").partition(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    each = []
    for x, weight in ((q, weights[0]), (k, weights[1])):
        if norm:
            layer = getattr(module, f"{name}RMSNorm")(x.shape[-1], eps=1e-6)
            layer.weight.data = weight.clone()
            x = layer(x)
        each.append(x.transpose(1, 2))
    q, k = module.apply_rotary_pos_emb(*each, cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_reference_is_the_models_function(norm: str, dtype: Any, batched: bool) -> None:
    given = operands((2, 5, 4, 2, 80), dtype, norm, batched=batched)
    for found, wanted in zip(call(*given, norm), _in_a_model(norm, *given), strict=True):
        assert found.is_contiguous()
        assert_same_bytes(found, wanted)


def test_without_k() -> None:
    q, k, weights, cos, sin = operands((2, 3, 4, 1, 64))
    both, _ = call(q, k, weights, cos, sin, "cast mul")
    alone, nothing = call(q, None, (weights[0], None), cos, sin, "cast mul")
    assert_same_bytes(alone, both)
    assert nothing.shape == (0,)


@pytest.mark.parametrize("norm", NORMS)
def test_near_the_formula_in_float64(norm: str) -> None:
    q, k, weights, cos, sin = operands((2, 5, 3, 1, 72), FP32, norm)
    for found, x, weight in zip(call(q, k, weights, cos, sin, norm), (q, k), weights, strict=True):
        y = x.double()
        if norm:
            factor = weight.double() + (1.0 if norm == "mul+1 cast" else 0.0)
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * factor
        low, high = y[..., :36], y[..., 36:]
        c, s = cos.double().unsqueeze(2), sin.double().unsqueeze(2)
        wanted = torch.cat((low * c[..., :36] - high * s[..., :36], high * c[..., 36:] + low * s[..., 36:]), -1)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_fp32_tables_make_the_rotation_fp32() -> None:
    given = operands((1, 5, 2, 1, 64), BF16, "", table=FP32)
    q, _, _, cos, sin = given
    wide, _ = call(*given, "", FP32)
    low, high = q.float().chunk(2, -1)
    wanted = q.float() * cos.unsqueeze(2) + torch.cat((-high, low), -1) * sin.unsqueeze(2)
    assert_same_bytes(wide, wanted)
    narrow, _ = call(*given, "", BF16)
    assert_same_bytes(narrow, wanted.bfloat16())


def _vllm(x: Any, cos: Any, sin: Any, pairs: bool) -> torch.Tensor:
    """``RotaryEmbedding.forward_native`` of serving frameworks, of the first columns of a head."""
    rotary, cos, sin = cos.shape[-1] * 2, cos.unsqueeze(2), sin.unsqueeze(2)
    turning, passing = x[..., :rotary], x[..., rotary:]
    a, b = (turning[..., ::2], turning[..., 1::2]) if pairs else turning.chunk(2, -1)
    one, two = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((one, two), -1).flatten(-2) if pairs else torch.cat((one, two), -1)
    return torch.cat((turned, passing), -1)


@pytest.mark.parametrize("rotary", [0, 32, 4])
@pytest.mark.parametrize("pairs", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_tables_of_half_as_many_columns(dtype: Any, pairs: bool, rotary: int) -> None:
    q, k, none, cos, sin = operands((2, 5, 4, 2, 80), dtype, "", columns=(rotary or 80) // 2)
    found = call(q, k, none, cos, sin, "", pairs=pairs, rotary=rotary)
    for each, x in zip(found, (q, k), strict=True):
        assert_same_bytes(each, _vllm(x, cos, sin, pairs))
    whole = [each.repeat_interleave(2, -1) if pairs else torch.cat((each, each), -1) for each in (cos, sin)]
    for each, other in zip(found, call(q, k, none, *whole, "", pairs=pairs, rotary=rotary), strict=True):
        assert_same_bytes(each, other)


@pytest.mark.parametrize("rotary", [0, 32, 4])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_one_table_that_has_cos_and_sin(dtype: Any, rotary: int) -> None:
    q, k, none, cos, sin = operands((2, 5, 4, 2, 80), dtype, "", columns=(rotary or 80) // 2)
    both = torch.stack((cos, sin), -1)
    found = call(q, k, none, both, both, "", pairs=True, rotary=rotary)
    for each, x in zip(found, (q, k), strict=True):
        assert_same_bytes(each, _vllm(x, cos, sin, pairs=True))


@pytest.mark.parametrize(
    ("shape", "turn"),
    [((1, 3, 32, 2), {}), ((1, 3, 32, 1), {"pairs": True}), ((1, 3, 64, 2), {"pairs": True}), ((3, 3, 32, 2), {"pairs": True})],
)
def test_a_table_that_has_not_cos_and_sin(shape: Any, turn: dict[str, Any]) -> None:
    q, k, none, *_ = operands((2, 3, 4, 2, 64), norm="")
    wanted = r"cos: wanted shape \[1 or 2, 3, 64 or 32\]" + (r", or \[1 or 2, 3, 32, 2\]" if turn else ", found")
    with pytest.raises(ValueError, match=wanted):
        call(q, k, none, torch.zeros(shape).bfloat16(), torch.zeros(shape).bfloat16(), "", **turn)


def test_columns_that_are_not_rotated_are_normalised() -> None:
    q, k, weights, cos, sin = operands((2, 5, 4, 2, 64), columns=16)
    partly, _ = call(q, k, weights, cos, sin, "cast mul", rotary=16)
    *_, whole_cos, whole_sin = operands((2, 5, 4, 2, 64))
    whole, _ = call(q, k, weights, torch.ones_like(whole_cos), torch.zeros_like(whole_sin), "cast mul")
    assert_same_bytes(partly[..., 16:], whole[..., 16:])
    assert not torch.equal(partly[..., :16], whole[..., :16])


def test_fp32_tables_of_some_columns() -> None:
    q, k, none, cos, sin = operands((1, 5, 2, 1, 64), BF16, "", table=FP32, columns=16)
    wide, _ = call(q, k, none, cos, sin, "", FP32, pairs=True, rotary=32)
    assert wide.dtype is FP32
    assert_same_bytes(wide[..., 32:], q[..., 32:].float())
    assert_same_bytes(call(q, k, none, cos, sin, "", BF16, pairs=True, rotary=32)[0], wide.bfloat16())


@pytest.mark.parametrize(
    ("turn", "columns", "message"),
    [
        ({"rotary": 66}, 66, "rotary: wanted 0 for all columns, or a multiple of 2 up to 64, found 66"),
        ({"rotary": 7}, 7, "rotary: wanted 0 for all columns, or a multiple of 2 up to 64, found 7"),
        ({"rotary": -2}, 64, "rotary: wanted 0 for all columns"),
        ({"rotary": 6, "pairs": True}, 6, "a multiple of 4 up to 64, found 6 with pairs"),
        ({"rotary": 16}, 64, r"cos: wanted shape \[1 or 2, 3, 16 or 8\], found \(1, 3, 64\)"),
        ({}, 16, r"cos: wanted shape \[1 or 2, 3, 64 or 32\], found \(1, 3, 16\)"),
    ],
)
def test_bad_columns(turn: dict[str, Any], columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*operands((2, 3, 4, 2, 64), norm="", columns=columns), "", **turn)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": lambda q: q.double()}, TypeError, "q: wanted bfloat16, float16 or float32"),
        ({"q": lambda q: q[0]}, ValueError, r"q: wanted \[B, S, H, D\]"),
        ({"q": lambda q: q[..., :63]}, ValueError, "q: wanted .* D even, 2 to 256"),
        ({"k": lambda k: k.half()}, ValueError, "k: wanted torch.bfloat16, tokens and D of q"),
        ({"k": lambda k: k[:, :2]}, ValueError, "k: wanted torch.bfloat16, tokens and D of q"),
        ({"norm": lambda _: "layer"}, ValueError, "norm: wanted one of"),
        ({"norm": lambda _: ""}, ValueError, "q_weight: wanted None"),
        ({"q_weight": lambda _: None}, ValueError, "q_weight: wanted a tensor, found None"),
        ({"k": lambda _: None}, ValueError, "k_weight: wanted None"),
        ({"k_weight": lambda w: w.float()}, TypeError, "k_weight: wanted torch.bfloat16, as q_weight"),
        ({"k_weight": lambda w: w[:5]}, ValueError, r"k_weight: wanted shape \(64,\)"),
        ({"q_weight": lambda w: w.long()}, TypeError, "q_weight: wanted bfloat16"),
        ({"cos": lambda c: c.half()}, TypeError, "cos: wanted torch.bfloat16, as q, or float32"),
        ({"sin": lambda s: s.float()}, TypeError, "sin: wanted torch.bfloat16, as q, or float32, cos and sin alike"),
        ({"cos": lambda c: c[..., :31]}, ValueError, r"cos: wanted shape \[1 or 2, 3, 64 or 32\], found \(1, 3, 31\)"),
        ({"cos": lambda c: c[:, :2]}, ValueError, "cos: wanted shape"),
        ({"cos": lambda c: c.expand(3, -1, -1)}, ValueError, "cos: wanted shape"),
        ({"cos": lambda c: c[..., :32]}, ValueError, r"sin: wanted the shape of cos, \(1, 3, 32\), found \(1, 3, 64\)"),
        ({"sin": lambda s: s.expand(2, -1, -1)}, ValueError, "sin: wanted the shape of cos"),
        ({"dtype": lambda _: torch.float64}, TypeError, "dtype: wanted that of q or of cos"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, (q_weight, k_weight), cos, sin = operands((2, 3, 4, 2, 64))
    values = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin, "norm": "cast mul"}
    values = {**values, "dtype": BF16}
    values.update({name: make(values[name]) for name, make in change.items()})
    norm, dtype = values.pop("norm"), values.pop("dtype")
    with pytest.raises(error, match=message):
        torch.ops.inductor_ext.qk_norm_rope(*values.values(), 1e-6, norm, dtype)


# ---- the fake --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 64), (1, 1, 1, 1, 2), (0, 3, 4, 2, 64), (2, 0, 4, 2, 64)])
@pytest.mark.parametrize("with_k", [True, False])
def test_fake_agrees(shape: Any, with_k: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, _, cos, sin = operands(shape, norm="")
    k = k if with_k else None
    real = call(q, k, (None, None), cos, sin, "")
    with FakeTensorMode() as mode:
        q, k, cos, sin = (None if each is None else mode.from_tensor(each) for each in (q, k, cos, sin))
        fake = call(q, k, (None, None), cos, sin, "")
    for one, two in zip(real, fake, strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.numel() == 0 or one.stride() == two.stride()


def test_opcheck() -> None:
    q, k, weights, cos, sin = operands((2, 3, 4, 2, 16))
    torch.library.opcheck(torch.ops.inductor_ext.qk_norm_rope.default, (q, k, *weights, cos, sin, 1e-6, "cast mul", BF16))


def test_out_overload_writes_what_the_function_returns() -> None:
    q, k, weights, cos, sin = operands((2, 3, 4, 2, 16))
    wanted = call(q, k, weights, cos, sin, "cast mul")
    outs = [torch.empty_like(each) for each in wanted]
    torch.ops.inductor_ext.qk_norm_rope.out(q, k, *weights, cos, sin, 1e-6, "cast mul", BF16, out0=outs[0], out1=outs[1])
    for found, each in zip(outs, wanted, strict=True):
        assert_same_bytes(found, each)


# ---- the kernel ------------------------------------------------------------------------------------------------------

HEAD_DIMS = (2, 30, 64, 72, 80, 96, 128, 136, 192, 256)


def kernels(arch: str) -> list[jit.JitSpec]:
    keys = [(d, d if norm else None, d, norm, d) for d, norm in itertools.product((BF16, FP16, FP32), NORMS)]
    keys += [(BF16, FP32, BF16, "mul+1 cast", BF16), (BF16, None, FP32, "", BF16), (BF16, None, FP32, "", FP32)]
    turned = itertools.product((BF16, FP32), ("", "cast mul"), TURNS)
    keys += [(d, d if norm else None, d, norm, d, turn) for d, norm, turn in turned]
    return [OP.spec_of_key(key, arch) for key in keys]


#: Of pairs, half tables, some columns: each once but halves of whole heads.
TURNS = [
    f"inductor_ext::Turn<{', '.join(str(each).lower() for each in flags)}>"
    for flags in (*itertools.product((False, True), repeat=3), (True, True, False, True), (True, True, True, True))
    if any(flags)
]
gpu = pytest.mark.gpu(kernels=kernels)


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Floats as integers in their order: neighbours are one apart, and both zeros are 0."""
    bits = x.view(torch.int32 if x.element_size() == 4 else torch.int16).long()
    return torch.where(bits < 0, -(bits & (2**31 - 1 if x.element_size() == 4 else 2**15 - 1)), bits)


def check(given: Any, norm: str, dtype: Any = None, eps: float = 1e-6, **turn: Any) -> None:
    """Byte for byte without a norm. With one, y may be a unit off in few places, and a result by units of its largest term."""
    q, k, weights, cos, sin = given
    found = call(*given, norm, dtype, eps, **turn)
    wanted = OP.reference(q, k, *weights, cos, sin, eps, norm, dtype or q.dtype, **turn)
    for a, b in zip(found, wanted, strict=True):
        if not norm:
            assert_same_bytes(a, b)
            continue
        assert torch.equal(a.isnan(), b.isnan())
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        a, b = a[finite], b[finite]
        if a.numel() == 0:
            continue
        unit = torch.finfo(a.dtype).eps
        apart = (a.double() - b.double()).abs()
        assert (apart <= 4 * unit * max(1.0, float(b.abs().max()))).all()
        if a.dtype is not FP32:
            units = (ordered(a) - ordered(b)).abs()
            assert int((units != 0).sum()) <= 3 + a.numel() // 50, "more than a rare rounding differs"
            assert int((units > 1).sum()) <= 1 + a.numel() // 200


@gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_every_head_dim(dtype: Any, norm: str) -> None:
    for d in HEAD_DIMS:
        for shape in ((1, 1, 16, 8, d), (3, 37, 5, 1, d), (2, 1500, 7, 3, d)):
            check(operands(shape, dtype, norm, device="cuda"), norm)


@gpu
@pytest.mark.parametrize("norm", ["", "cast mul"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_every_way_to_turn(dtype: Any, norm: str) -> None:
    for d, rotary in ((64, 0), (64, 16), (80, 32), (96, 0), (128, 64), (128, 96), (256, 64), (72, 12), (36, 8)):
        for pairs, halved in itertools.product((False, True), repeat=2):
            columns = (rotary or d) // (2 if halved else 1)
            for shape in ((1, 1, 16, 8, d), (3, 37, 5, 1, d), (2, 1500, 7, 3, d)):
                given = operands(shape, dtype, norm, columns=columns, device="cuda")
                check(given, norm, pairs=pairs, rotary=rotary)
                if pairs and halved:
                    both = torch.stack(given[3:], -1)
                    check([*given[:3], both, both], norm, pairs=True, rotary=rotary)


@gpu
def test_layouts_without_a_norm_are_eagers_bytes() -> None:
    for shape in ((2, 19, 4, 2, 128), (2, 2100, 4, 2, 128)):
        q, k, none, cos, sin = operands(shape, BF16, "", batched=True, device="cuda")
        check((q, k, none, cos, sin), "")
        check((q, None, none, cos, sin), "")
        permuted = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]  # [B, H, S, D] in memory
        check((*permuted, none, cos[:1], sin[:1]), "")
        wide = torch.randn(*shape[:2], 3, 128, device="cuda").bfloat16()
        check((q, k, none, wide[:, :, 1], wide[:, :, 2]), "")
        shifted = torch.randn(2, shape[1], 4 * 128 + 1, device="cuda").bfloat16()[..., 1:].view(2, shape[1], 4, 128)
        check((shifted, k, none, cos, sin), "")
        check((q[..., :96], k[..., :96], none, cos[..., :96], sin[..., :96]), "")
        check((q[:, ::2], k[:, ::2], none, cos[:, ::2], sin[:, ::2]), "")


@gpu
def test_fp32_tables_and_weights() -> None:
    for dtype in (BF16, FP32):
        check(operands((2, 33, 4, 2, 128), BF16, "", table=FP32, device="cuda"), "", dtype)
    check(operands((2, 33, 4, 2, 128), BF16, "mul+1 cast", weight=FP32, device="cuda"), "mul+1 cast")


@gpu
def test_extremes_and_empty_input() -> None:
    for norm in ("", "cast mul"):
        q, k, weights, cos, sin = operands((2, 33, 4, 2, 128), BF16, norm, device="cuda")
        q, k = q.clone(), k.clone()
        for at, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 9e-39, 3e38)):
            q[0, at] = value
            q[1, at, :, 5::7] = value
            k[0, at, :, 3::5] = value
        cos[:, 8::9], sin[:, 4::9] = 0.0, -0.0
        check((q, k, weights, cos, sin), norm)
        check((q, k, weights, cos * 1e-38, sin * 1e-38), norm)
        for empty in (slice(0, 0),):
            found = call(q[:, empty], k[:, empty], weights, cos[:, empty], sin[:, empty], norm)
            assert [each.shape for each in found] == [(2, 0, 4, 128), (2, 0, 2, 128)]


@gpu
def test_given_the_factor_every_byte_is_eagers() -> None:
    """Heads whose squares have an exact mean: no order of summation can tell."""
    q, k, weights, cos, sin = operands((2, 700, 16, 8, 128), BF16, "cast mul", device="cuda")
    x = torch.tensor([1.0, -1.0, 2.0, -2.0], device="cuda").repeat(32).bfloat16()
    q, k = x.expand(2, 700, 16, 128).contiguous(), -x.expand(2, 700, 8, 128).contiguous()
    found = call(q, k, weights, cos, sin, "cast mul")
    for a, b in zip(found, OP.reference(q, k, *weights, cos, sin, 1e-6, "cast mul", BF16), strict=True):
        assert_same_bytes(a, b)


@gpu
def test_another_stream_and_a_cuda_graph() -> None:
    q, k, none, cos, sin = operands((2, 19, 4, 2, 128), BF16, "", device="cuda")
    wanted = OP.reference(q, k, None, None, cos, sin, 0.0, "", BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = call(q, k, none, cos, sin, "")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(q, k, none, cos, sin, "")
    for each in captured:
        each.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(found, captured, wanted, strict=True):
        assert_same_bytes(a, c)
        assert_same_bytes(b, c)


@gpu
def test_the_kernel_names_a_bad_argument() -> None:
    q, k, _, cos, sin = operands((2, 3, 4, 2, 64), BF16, "", device="cuda")
    outs = torch.empty(2, 3, 4, 64, device="cuda", dtype=BF16), torch.full((2, 3, 2, 64), 7.0, device="cuda", dtype=BF16)
    columns = torch.empty(2, 3, 4, 128, device="cuda", dtype=BF16)[..., ::2]
    with pytest.raises(ValueError, match="q: wanted strides"):
        OP._call(columns, k, None, None, cos, sin, 0.0, "", BF16, out0=outs[0], out1=outs[1])
    with pytest.raises(ValueError, match="sin: wanted shape"):
        OP._call(q, k, None, None, cos, sin[:, :2], 0.0, "", BF16, out0=outs[0], out1=outs[1])
    torch.cuda.synchronize()
    assert (outs[1] == 7.0).all(), "nothing was written"
