"""varlen_attention: its reference, its arguments' errors, how libraries are chosen and called, and each of them on a GPU."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from inductor_ext import jit
from inductor_ext.kernels.varlen_attention import implementations
from inductor_ext.kernels.varlen_attention import op as varlen
from inductor_ext.kernels.varlen_attention.implementations import Problem
from inductor_ext.kernels.varlen_attention.op import OP

BF16, FP16 = torch.bfloat16, torch.float16


def call(
    q: Any, k: Any, v: Any, ends: Any = None, longest: int = 0, left: int = -1, right: int = 0, softcap: float = 0.0,
    padded: bool = True, implementation: str = "", scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.inductor_ext.varlen_attention(q, k, v, ends, longest, scale, left, right, softcap, padded, implementation)


def operands(
    *sizes: int, heads: int = 4, kv_heads: int = 2, width: int = 16, dtype: Any = torch.float32, device: str = "cpu"
) -> Any:
    made = torch.Generator(device).manual_seed(7)
    shapes = [(*sizes, each, width) for each in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device=device, generator=made).to(dtype) for shape in shapes]


def ends_of(*lengths: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(-1, 0), (-1, -1), (3, 0), (2, 5), (0, 0)], ids=str)
def test_the_reference_is_pytorchs_attention(bounds: tuple[int, int]) -> None:
    q, k, v = operands(2, 19)
    apart = torch.arange(19)[None, :] - torch.arange(19)[:, None]
    left, right = bounds
    allowed = ((apart >= -left) | (left < 0)) & ((apart <= right) | (right < 0))
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=allowed, enable_gqa=True, scale=0.3)
    found = call(q, k, v, left=left, right=right, scale=0.3)
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_packed_sequences_see_themselves_only() -> None:
    q, k, v = operands(23)
    ends = ends_of(5, 1, 0, 9)
    found = call(q, k, v, ends, 9)
    for start, end in ((0, 5), (5, 6), (6, 15)):
        alone = call(*(x[None, start:end] for x in (q, k, v)))
        torch.testing.assert_close(found[start:end], alone[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[15:], torch.zeros_like(found[15:])), "rows past the last end are finite"


def test_softcap_is_gemmas() -> None:
    q, k, v = operands(1, 12, heads=2)
    scores = torch.einsum("bihd,bjhd->bhij", q * 4, k) * 0.25
    weights = torch.softmax(2.0 * torch.tanh(scores / 2.0), -1)
    wanted = torch.einsum("bhij,bjhd->bihd", weights, v)
    torch.testing.assert_close(call(q * 4, k, v, right=-1, softcap=2.0), wanted, rtol=1e-5, atol=1e-6)


def test_16_bits_are_computed_in_fp32() -> None:
    wide = operands(2, 33)
    narrow = [x.bfloat16() for x in wide]
    assert torch.equal(call(*narrow), call(*(x.float() for x in narrow)).bfloat16())


@pytest.mark.parametrize("packed", [False, True])
def test_fake_agrees_with_real(packed: bool) -> None:
    q, k, v = operands(24) if packed else operands(2, 12)
    ends = ends_of(20) if packed else None
    wide = torch.cat([q, k, v], -2)
    q, k, v = wide.split([4, 2, 2], -2)  # views of one qkv buffer
    real = call(q, k, v, ends, 20)
    with FakeTensorMode() as mode:
        fake = call(*(None if x is None else mode.from_tensor(x) for x in (q, k, v, ends)), 20)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_opcheck() -> None:
    args = (*operands(20), ends_of(7, 9), 9, 0.25, -1, 0, 0.0, True, "")
    torch.library.opcheck(OP.overload, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_out_is_written_in_place() -> None:
    q, k, v = operands(2, 9)
    out = torch.empty_like(q)
    torch.ops.inductor_ext.varlen_attention.out(q, k, v, None, 0, 0.25, -1, 0, 0.0, False, "", out=out)
    assert torch.equal(out, call(q, k, v))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 9, 4, 16).int()}, TypeError, "q: wanted bfloat16, float16 or float32, found torch.int32"),
        ({"q": torch.ones(9, 4, 16)}, ValueError, r"q: wanted \[B, S, H, D\], found shape \(9, 4, 16\)"),
        ({"ends": ends_of(9)}, ValueError, r"q: wanted \[T, H, D\] beside cu_seqlens, found shape \(2, 9, 4, 16\)"),
        ({"k": torch.ones(2, 9, 2, 16).bfloat16()}, TypeError, "k: wanted torch.float32 on cpu, as q, found torch.bfloat16"),
        ({"k": torch.ones(2, 8, 2, 16)}, ValueError, r"k: wanted q's shape \(2, 9, 4, 16\) but for the heads"),
        ({"v": torch.ones(2, 9, 2, 8)}, ValueError, r"v: wanted q's shape .* found shape \(2, 9, 2, 8\)"),
        ({"v": torch.ones(2, 9, 4, 16)}, ValueError, "heads of q a multiple of those of k and v, found 4, 2 and 4"),
        ({"left": -2}, ValueError, "left: wanted -1 for no bound, or 0 or more, found -2"),
        ({"right": -7}, ValueError, "right: wanted -1 for no bound"),
        ({"softcap": -1.0}, ValueError, "softcap: wanted 0 for none, or more, found -1.0"),
        ({"implementation": "flash"}, ValueError, "implementation: wanted one of hopper, .*, found 'flash'"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = operands(2, 9)
    with pytest.raises(error, match=message):
        call(**{"q": q, "k": k, "v": v, **change})


def test_ends_have_to_be_int32() -> None:
    q, k, v = operands(9)
    with pytest.raises(ValueError, match=r"cu_seqlens: wanted int32 \[N \+ 1\] on cpu, found torch.int64 of shape \(2,\)"):
        call(q, k, v, torch.tensor([0, 9]), 9)


# ---- libraries, without a GPU ----------------------------------------------------------------------------------------


def problem(**changes: Any) -> Problem:
    return Problem(**{"dtype": BF16, "head_dim": 128, "left": -1, "right": 0, "softcap": False, "packed": False,
                      "capability": (9, 0), **changes})  # fmt: skip


ALL = [each.name for each in implementations.IMPLEMENTATIONS]


@pytest.mark.parametrize(
    ("changes", "able"),
    [
        ({}, ALL),
        ({"packed": True}, ["hopper", "flash_attn_4", "flash_attn_3", "flash_attn_2", "torch"]),
        ({"left": 31}, ["hopper", "flash_attn_4", "flash_attn_3", "flash_attn_2", "torch"]),
        ({"scale": -0.1}, ["flash_attn_4", "flash_attn_3", "cudnn", "flash_attn_2", "torch"]),
        ({"head_dim": 96}, ["flash_attn_4", "flash_attn_3", "cudnn", "flash_attn_2", "torch"]),
        ({"softcap": True}, ["flash_attn_4", "flash_attn_3", "flash_attn_2"]),
        ({"head_dim": 256}, ["flash_attn_4", "flash_attn_3", "flash_attn_2", "torch"]),
        ({"head_dim": 320}, []),
        ({"head_dim": 100}, []),
        ({"dtype": torch.float32}, []),
        ({"capability": (8, 9)}, ["flash_attn_2", "torch"]),
        ({"capability": (10, 0)}, ["flash_attn_4", "cudnn", "flash_attn_2", "torch"]),
        ({"capability": (10, 0), "head_dim": 192}, ["flash_attn_2", "torch"]),
    ],
)
def test_what_each_library_can_do(changes: dict[str, Any], able: list[str]) -> None:
    assert [each.name for each in implementations.IMPLEMENTATIONS if not each.lacks(problem(**changes))] == able


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "hopper"), ({"length": 512, "packed": True}, "hopper"), ({"head_dim": 96}, "flash_attn_4"),
        ({"head_dim": 96, "length": 7168}, "flash_attn_4"), ({"head_dim": 96, "length": 512}, "cudnn"),
        ({"head_dim": 96, "length": 512, "packed": True}, "flash_attn_4"),
        ({"head_dim": 96, "length": 512, "left": 31}, "flash_attn_4"),
        ({"head_dim": 64, "length": 512}, "hopper"), ({"head_dim": 64, "length": 512, "right": -1}, "cudnn"),
        ({"head_dim": 64, "right": -1, "packed": True}, "hopper"),
        ({"capability": (10, 0)}, "flash_attn_4"), ({"capability": (10, 0), "length": 512}, "cudnn"),
    ],
)  # fmt: skip
def test_the_own_kernel_is_first_and_cudnn_for_short_sequences(changes: dict[str, Any], first: str) -> None:
    found, _ = implementations.choose(problem(**changes), known=tuple(ALL))
    assert found is not None and found.name == first


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`library` takes CPU tensors for a GPU's, and starts with nothing known."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(varlen, "_running", {})
    monkeypatch.setattr(implementations, "_broken", {})
    implementations._absent.cache_clear()


def library(
    q: Any, k: Any, v: Any, ends: Any, longest: int, left: int, right: int, name: str, padded: bool = False
) -> torch.Tensor:
    out = torch.full_like(q, float("nan"))
    varlen.library(q, k, v, ends, longest, 0.25, left, right, 0.0, padded, name, out)
    return out


def module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    made = ModuleType(name)
    vars(made).update(functions)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("bounds", "causal", "window"),
    [((-1, 0), True, (None, None)), ((-1, -1), False, (None, None)), ((5, 0), False, (5, 0)), ((4, 2), False, (4, 2))],
)
def test_flash_attn_4_writes_into_the_given_buffer(
    monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, int], causal: bool, window: Any
) -> None:
    seen: list[Any] = []

    def forward(q: Any, k: Any, v: Any, *, out: Any, **rest: Any) -> None:
        seen.append(rest)
        out.fill_(1)

    module(monkeypatch, "flash_attn")
    module(monkeypatch, "flash_attn.cute")
    module(monkeypatch, "flash_attn.cute.interface", _flash_attn_fwd=forward)
    q, k, v = operands(9, dtype=BF16)
    ends = ends_of(4, 3)
    found = library(q, k, v, ends, 4, *bounds, "flash_attn_4", padded=True)
    assert bool((found == 1).all())
    (rest,) = seen
    assert rest.pop("cu_seqlens_q") is ends and rest.pop("cu_seqlens_k") is ends
    assert rest == {
        "softmax_scale": 0.25, "causal": causal, "softcap": None, "max_seqlen_q": 4, "max_seqlen_k": 4,
        "window_size_left": window[0], "window_size_right": window[1],
    }  # fmt: skip


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attn_2_is_called_by_its_public_functions(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    def dense(q: Any, k: Any, v: Any, **rest: Any) -> Any:
        assert rest == {"softmax_scale": 0.25, "causal": True, "window_size": (-1, -1), "softcap": 0.0}
        return torch.full_like(q, 2)

    def varlen_func(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, **rest: Any) -> Any:
        assert max_seqlen_q == rest.pop("max_seqlen_k") == 9
        return dense(q, k, v, **rest)

    module(monkeypatch, "flash_attn", flash_attn_func=dense, flash_attn_varlen_func=varlen_func)
    q, k, v = operands(9, dtype=BF16) if packed else operands(1, 9, dtype=BF16)
    assert bool((library(q, k, v, ends_of(9) if packed else None, 9, -1, 0, "flash_attn_2") == 2).all())


@pytest.mark.usefixtures("on_a_gpu")
def test_a_library_that_fails_is_replaced_by_the_next(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append("4")
        raise RuntimeError("no such ptxas")

    module(monkeypatch, "flash_attn", flash_attn_func=lambda q, k, v, **rest: (torch.full_like(q, 2), None))
    module(monkeypatch, "flash_attn.cute")
    module(monkeypatch, "flash_attn.cute.interface", _flash_attn_fwd=failing)
    q, k, v = operands(1, 9, dtype=BF16)
    with caplog.at_level(logging.WARNING, "inductor_ext"):
        for _ in range(3):
            assert bool((library(q, k, v, None, 0, -1, 0, "flash_attn_4") == 2).all())
    assert calls == ["4"], "tried once"
    assert [record.getMessage() for record in caplog.records] == [
        "varlen_attention: flash-attn 4 failed and is not used any more: no such ptxas"
    ]
    assert "flash-attn 4: failed: no such ptxas" in implementations.choose(problem(head_dim=96))[1]


@pytest.mark.usefixtures("on_a_gpu")
def test_running_out_of_memory_is_no_librarys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    module(monkeypatch, "flash_attn", flash_attn_func=hungry)
    with pytest.raises(torch.OutOfMemoryError):
        library(*operands(1, 9, dtype=BF16), None, 0, -1, 0, "flash_attn_2")
    assert implementations._broken == {}


@pytest.mark.usefixtures("on_a_gpu")
def test_without_any_library_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "_absent", lambda each: "not installed")
    q, k, v = operands(9, dtype=BF16)
    assert torch.equal(library(q, k, v, ends_of(4, 3), 4, -1, 0, "", True), call(q, k, v, ends_of(4, 3), 4))


@pytest.mark.usefixtures("on_a_gpu")
def test_an_extension_built_for_another_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(implementations.importlib, "import_module", broken)
    flash_4 = implementations.named("flash_attn_4")
    assert flash_4 is not None and implementations._absent(flash_4) == "cannot be imported: undefined symbol: _ZN3c10"
    assert "flash-attn 4 is installed and cannot be imported" in caplog.text
    implementations._absent.cache_clear()


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def kernels(arch: str) -> list[jit.JitSpec]:
    keys = [(BF16, width) for width in implementations.HOPPER_HEADS] + [(FP16, 128)]
    return [OP.spec_of_key(key, arch) for key in keys] if arch == "sm_90a" else []


gpu = pytest.mark.gpu(kernels=kernels)
hopper_gpu = pytest.mark.gpu(kernels=kernels, arch="sm_90a")


def runnable(packed: bool, **changes: Any) -> list[str]:
    wanted = problem(packed=packed, capability=torch.cuda.get_device_capability(), **changes)
    ours = [each for each in implementations.IMPLEMENTATIONS if each.called != "by a rule"]
    return [each.name for each in ours if not implementations.missing(each, wanted)]


def ran(name: str) -> bool:
    if name == "hopper":
        return any(key is not None for key, _ in OP._loaded)
    return name in {running for running, _ in varlen._running.values()}


def close(found: torch.Tensor, q: Any, k: Any, v: Any, *rest: Any) -> None:
    wanted = OP.reference(q.double(), k.double(), v.double(), *rest, "")
    assert found.isfinite().all()
    assert float((found.double() - wanted).norm()) <= 6e-3 * float(wanted.norm())


CASES = [
    {"heads": 16, "kv_heads": 8, "width": 128}, {"heads": 8, "kv_heads": 1, "width": 64},
    {"heads": 4, "kv_heads": 4, "width": 256}, {"heads": 4, "kv_heads": 2, "width": 128, "dtype": FP16},
]  # fmt: skip


@gpu
@pytest.mark.parametrize("bounds", [(-1, 0), (-1, -1), (40, 0), (7, 9)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_library_on_batches(case: dict[str, Any], bounds: tuple[int, int]) -> None:
    dtype = case.get("dtype", BF16)
    for sizes in ((3, 130), (1, 1), (2, 512)):
        q, k, v = operands(*sizes, device="cuda", **{**case, "dtype": dtype})
        for name in runnable(False, head_dim=case["width"], left=bounds[0], right=bounds[1], dtype=dtype):
            found = call(q, k, v, left=bounds[0], right=bounds[1], implementation=name)
            close(found, q, k, v, None, 0, case["width"] ** -0.5, *bounds, 0.0, True)
            assert ran(name), f"{name} did not run"


@gpu
@pytest.mark.parametrize("bounds", [(-1, 0), (-1, -1), (40, 0)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_library_on_packed_sequences(case: dict[str, Any], bounds: tuple[int, int]) -> None:
    dtype = case.get("dtype", BF16)
    lengths = (130, 1, 77, 256)
    q, k, v = operands(sum(lengths) + 50, device="cuda", **{**case, "dtype": dtype})
    for each in (q, k, v):
        each[sum(lengths) :] = 3e4  # what padding may hold: a tile of the last sequence reaches into it
    ends = ends_of(*lengths, device="cuda")
    for name in runnable(True, head_dim=case["width"], left=bounds[0], right=bounds[1], dtype=dtype):
        found = call(q, k, v, ends, 256, left=bounds[0], right=bounds[1], implementation=name)
        close(found, q, k, v, ends, 256, case["width"] ** -0.5, *bounds, 0.0, True)
        assert torch.equal(found[sum(lengths) :], torch.zeros_like(found[sum(lengths) :]))


@hopper_gpu
@pytest.mark.parametrize("bounds", [(-1, 0), (-1, -1), (100, 0), (64, 200)], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_sequences_of_all_sizes(width: int, bounds: tuple[int, int]) -> None:
    """Each against itself alone, too: what lies beside a sequence in its tiles does not matter."""
    lengths = [1, 0, 63, 64, 65, 127, 128, 129, 0, 255, 257, 700, 5, 1025, *range(1, 60)]
    q, k, v = operands(sum(lengths) + 77, heads=6, kv_heads=2, width=width, dtype=BF16, device="cuda")
    ends = ends_of(*lengths, device="cuda")
    rest = (-1 if bounds[0] < 0 else bounds[0], bounds[1])
    for each in (q, k, v):
        each[sum(lengths) :] = float("nan")
    found = call(q, k, v, ends, max(lengths), *rest, implementation="hopper")
    close(found, q, k, v, ends, 0, width**-0.5, *rest, 0.0, True)
    assert torch.equal(found[sum(lengths) :], torch.zeros_like(found[sum(lengths) :]))
    for at in (5, 9, 11):
        rows = slice(int(ends[at]), int(ends[at + 1]))
        alone = call(*(x[None, rows] for x in (q, k, v)), left=rest[0], right=rest[1], implementation="hopper")
        assert torch.equal(alone[0], found[rows])


@hopper_gpu
def test_a_sequence_of_nans_stays_alone() -> None:
    lengths = (200, 33, 190)
    q, k, v = operands(sum(lengths), width=128, dtype=BF16, device="cuda")
    wanted = call(q, k, v, ends_of(*lengths, device="cuda"), 200, implementation="hopper")
    for value in (float("nan"), float("inf"), -float("inf")):
        for each in (q, k, v):
            each[200:233] = value
        found = call(q, k, v, ends_of(*lengths, device="cuda"), 200, implementation="hopper")
        assert torch.equal(found[:200], wanted[:200]) and torch.equal(found[233:], wanted[233:])
        assert found[200:233].isnan().all()


@hopper_gpu
def test_extreme_scores() -> None:
    q, k, v = operands(1, 300, width=128, dtype=BF16, device="cuda")
    for factor in (0.0, 1e-30, 300.0):
        close(call(q * factor, k, v, implementation="hopper"), q * factor, k, v, None, 0, 128**-0.5, -1, 0, 0.0, True)
    with_one = k.clone()
    with_one[:, 170] = float("nan")
    found = call(q, with_one, v, implementation="hopper")
    assert found[:, :170].isfinite().all() and found[:, 170:].isnan().all()


@hopper_gpu
def test_what_the_copy_engine_cannot_read_is_copied() -> None:
    wide = torch.randn(1, 64, 4 * 128 + 4, device="cuda").bfloat16()
    q = wide[..., 4:].view(1, 64, 4, 128)  # begins 8 bytes after a multiple of 16, as all of its rows
    close(call(q, q, q, implementation="hopper"), q, q, q, None, 0, 128**-0.5, -1, 0, 0.0, True)


@hopper_gpu
@pytest.mark.parametrize("sizes", [(0, 5), (3, 0)])
def test_nothing_to_attend_to(sizes: tuple[int, int]) -> None:
    q, k, v = operands(*sizes, width=128, dtype=BF16, device="cuda")
    assert call(q, k, v, implementation="hopper").shape == q.shape
    rows = operands(7, width=128, dtype=BF16, device="cuda")
    none = torch.zeros(1, dtype=torch.int32, device="cuda")
    assert torch.equal(call(*rows, none, 0, implementation="hopper"), torch.zeros_like(rows[0]))


@gpu
def test_softcap_on_a_gpu() -> None:
    q, k, v = operands(2, 200, width=64, dtype=BF16, device="cuda")
    for name in runnable(False, head_dim=64, softcap=True):
        close(call(q * 4, k, v, softcap=5.0, implementation=name), q * 4, k, v, None, 0, 0.125, -1, 0, 5.0, True)


@gpu
def test_views_streams_and_graphs() -> None:
    wide = torch.randn(2, 256, 32, 128, device="cuda").bfloat16()
    q, k, v = wide.split([16, 8, 8], 2)
    for name in runnable(False):
        wanted = call(q, k, v, implementation=name)
        close(wanted, q, k, v, None, 0, 128**-0.5, -1, 0, 0.0, True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = call(q, k, v, implementation=name)
        stream.synchronize()
        assert torch.equal(found, wanted)
        graph, out = torch.cuda.CUDAGraph(), torch.empty_like(wanted)
        with torch.cuda.graph(graph):
            OP._call(q, k, v, None, 0, 128**-0.5, -1, 0, 0.0, False, name, out=out)
        out.zero_()
        graph.replay()
        assert torch.equal(out, wanted)


@gpu
def test_torchs_operators_take_what_the_rule_gives_them() -> None:
    """Without a mask, and with fewer heads of K and V: cuDNN's and flash attention's, as `causal_attention` calls them."""
    aten = torch.ops.aten
    q, k, v = operands(3, 130, heads=16, kv_heads=8, width=128, dtype=BF16, device="cuda")
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    for causal in (True, False):
        rest = (None, 0, 0.1, -1, 0 if causal else -1, 0.0, True)
        found = aten._scaled_dot_product_flash_attention(*rows, 0.0, causal, scale=0.1)[0]
        close(found.transpose(1, 2), q, k, v, *rest)
        if torch.cuda.get_device_capability() >= (9, 0):
            found = aten._scaled_dot_product_cudnn_attention(*rows, None, False, 0.0, causal, scale=0.1)[0]
            close(found.transpose(1, 2), q, k, v, *rest)
            assert found.transpose(1, 2).is_contiguous()
