"""causal_attention: a transformers model's own masks, which library is taken, the generated code, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext import registry
from inductor_ext.kernels.varlen_attention import implementations
from inductor_ext.report.explain import Explanation
from tests.support.fakegpu import FakeGpu, fake_cuda_inputs, fake_gpu

aten = torch.ops.aten
BF16 = torch.bfloat16
CUDNN = aten._scaled_dot_product_cudnn_attention
FLASH = aten._scaled_dot_product_flash_attention
EFFICIENT = aten._scaled_dot_product_efficient_attention


@pytest.fixture(autouse=True)
def _sequences_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few tokens here stand for many: libraries in the order of long sequences."""
    monkeypatch.setattr(implementations, "CUDNN_LENGTH", 0)


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let these libraries, and no others, be there."""
    monkeypatch.setattr(implementations, "_absent", lambda each: "" if each.name in names else "not installed")


def explained(fn: Any, *shapes: Any, dynamic: bool = False, dtype: torch.dtype = BF16, **options: Any) -> Explanation:
    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()):
        inputs = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
        return inductor_ext.explain(fn, *inputs, dynamic=dynamic, **options)


def refusals(found: Explanation) -> list[str]:
    assert found.counts().get("causal_attention", 0) == 0
    return [each.reason for each in found.refusals if each.rule == "causal_attention"]


QKV = [(2, 4, 24, 64)] * 3


def bias_of(q: torch.Tensor, allowed: Any, rows: int | None = None) -> torch.Tensor:
    at = torch.arange(q.shape[2], device=q.device)
    return torch.where(allowed(at[:, None], at[None, :]), 0.0, float("-inf")).to(q.dtype).expand(q.shape[0], 1, -1, -1)


def banded(allowed: Any, op: Any = CUDNN) -> Any:
    return lambda q, k, v: op(q, k, v, bias_of(q, allowed), False)[0] * 2


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("allowed", "left", "right"),
    [
        (lambda i, j: j <= i, -1, 0),
        (lambda i, j: i >= j, -1, 0),
        (lambda i, j: j < i + 1, -1, 0),
        (lambda i, j: ~(j > i), -1, 0),
        (lambda i, j: (j - i) <= 0, -1, 0),
        (lambda i, j: (j <= i) & (j > i - 8), 7, 0),
        (lambda i, j: torch.logical_and(i - j < 8, j <= i), 7, 0),
        (lambda i, j: ~((j > i) | (j <= i - 8)), 7, 0),
        (lambda i, j: (i - j).abs() <= 5, 5, 5),
        (lambda i, j: (j <= i) & (j <= i + 3) & (i >= 0), -1, 0),
        (lambda i, j: (2 * i + 1 - i) > j, -1, 0),
        (lambda i, j: (i == i) & (j == j), -1, -1),
        (lambda i, j: i == j, 0, 0),
        (lambda i, j: torch.where(j <= i, j > i - 8, torch.zeros_like(i + j, dtype=torch.bool)), 7, 0),
        (lambda i, j: j < torch.arange(i.shape[0] + 1, device=i.device)[1:, None], -1, 0),
    ],
)
def test_bands_are_read(monkeypatch: pytest.MonkeyPatch, allowed: Any, left: int, right: int, dynamic: bool) -> None:
    """In whatever words, and for any length."""
    installed(monkeypatch, "flash_attn_4")
    attend = lambda *qkv: banded(allowed)(*(projected(x, 4) for x in qkv))  # noqa: E731
    (graph,) = explained(attend, *[(2, 24, 256)] * 3, dynamic=dynamic).graphs
    (call,) = [line for line in graph.after.splitlines() if "inductor_ext.varlen_attention" in line]
    assert f", None, 0, 0.125, {left}, {right}, 0.0, False, flash_attn_4)" in call
    assert "iota" not in graph.after and "where" not in graph.after


@pytest.mark.parametrize(
    ("allowed", "reason"),
    [
        (lambda i, j: j <= 2 * i, "the mask is no band"),
        (lambda i, j: j + i < 9, "the mask is no band"),
        (lambda i, j: j != i, "the mask is no band"),
        (lambda i, j: (j <= i) & (i - j != 3), "the bias is not a mask of positions"),
        (lambda i, j: j <= i - 1, "the mask hides a token from itself"),
        (lambda i, j: (j <= i) & (i < 0), "the mask is no band"),
        (lambda i, j: j // 8 <= i // 8, "the bias is not a mask of positions"),
        (lambda i, j: j.to(torch.uint8) <= i.to(torch.uint8), "the bias is not a mask of positions"),
        (lambda i, j: j.float() * 0.99 <= i.float(), "the bias is not a mask of positions"),
        (lambda i, j: j - i < 2.5, "the bias is not a mask of positions"),
        (lambda i, j: j - i < torch.full((1,), 2.5, device=i.device), "the bias is not a mask of positions"),
        (lambda i, j: i // 8 == j // 8, "the bias is not a mask of positions"),
        (lambda i, j: (i - j).abs() >= 0, "the bias is not a mask of positions"),
        (lambda i, j: j <= torch.cat((i[:1] - 3, i[:-1])) + 1, "the bias is not a mask of positions"),
        (lambda i, j: ~((j <= i) & (i - j < 8)) & torch.zeros_like(i + j, dtype=torch.bool), "the mask is no band"),
    ],
)
def test_other_masks_are_not(monkeypatch: pytest.MonkeyPatch, allowed: Any, reason: str) -> None:
    installed(monkeypatch, "flash_attn_4")
    assert refusals(explained(banded(allowed), *QKV)) == [reason]


def test_every_band_is_the_mask_that_it_was_read_from() -> None:
    """On a CPU the rewritten graph gives what the mask gave, for every pair of bounds."""
    for left, right in ((0, 0), (3, 0), (0, 2), (5, 1), (40, 40)):

        def attend(q: Any, k: Any, v: Any, left: int = left, right: int = right) -> Any:
            bias = bias_of(q, lambda i, j: (j >= i - left) & (j <= i + right))
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias)[0] * 2

        inputs = [torch.randn(2, 4, 24, 16) for _ in range(3)]
        found = inductor_ext.verify(attend, *inputs, end_to_end=False, dynamic=False)
        (check,) = [each for each in found.checks if each.rule == "causal_attention"]
        assert check.rewrites == 1 and check.distance < 1e-5


BIASES: dict[str, Any] = {
    "ones_where_shown": lambda i, j: torch.where(j > i, float("-inf"), 1.0),
    "exponentials": lambda i, j: torch.where(j <= i, 0.0, float("-inf")).exp(),
    "integers": lambda i, j: torch.where(j <= i, 0, -(2**40)),
    "columns_of_a_padded_one_turned": lambda i, j: torch.nn.functional.pad(torch.where(j <= i, 0.0, float("-inf")), [0, 1])[
        :, j[0].flip(0)
    ],
}


@pytest.mark.parametrize("what", list(BIASES))
def test_what_is_nearly_a_mask(what: str) -> None:
    def attend(q: Any, k: Any, v: Any) -> Any:
        at = torch.arange(24, device=q.device)
        bias = BIASES[what](at[:, None], at[None, :]).to(q.dtype).expand(2, 1, -1, -1)
        return CUDNN(q, k, v, bias, False)[0] * 2

    assert refusals(explained(attend, *QKV)) == ["the bias is not a mask of positions"]


@pytest.mark.parametrize(
    ("allowed", "reason"),
    [
        (lambda ids: ids[:, None] == ids[None, :], "the mask tells packed sequences of a graph input apart"),
        (lambda ids: ids[:, None] <= ids[None, :], "the mask depends on a graph input"),
        (lambda ids: (ids == 3).expand(24, -1), "the mask depends on a graph input"),
        (None, "the mask depends on a graph input"),
    ],
)
def test_masks_of_graph_inputs(allowed: Any, reason: str) -> None:
    def attend(q: Any, k: Any, v: Any, given: Any) -> Any:
        bias = given if allowed is None else torch.where(allowed(given), 0.0, float("-inf")).to(q.dtype).expand(2, 1, -1, -1)
        return CUDNN(q, k, v, bias, False)[0] * 2

    assert refusals(explained(attend, *QKV, (24,) if allowed else (2, 1, 24, 24))) == [reason]


def test_a_mask_that_is_no_band_is_named() -> None:
    found = explained(banded(lambda i, j: j <= 2 * i), *QKV)
    assert [each.found for each in found.refusals] == ["-2·query + 1·key + 0 <= 0"]


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda q, k, v: CUDNN(q, k.half(), v, None, False)[0] * 2, "dtypes"),
        (
            lambda q, k, v: CUDNN(q, k, v, bias_of(q, lambda i, j: j <= i)[..., :12], False)[0] * 2,
            "the bias is not of the scores' shape",
        ),
    ],
)
def test_what_no_kernel_takes(fn: Any, reason: str) -> None:
    assert refusals(explained(fn, *QKV)) == [reason]


def test_a_scale_that_is_given() -> None:
    def attend(q: Any, k: Any, v: Any, scale: float = 0.3) -> Any:
        return CUDNN(q, k, v, bias_of(q, lambda i, j: j <= i), False, scale=scale)[0] * 2

    assert ", 0.3, " in explained(attend, *QKV).graphs[0].after
    assert refusals(explained(attend, *QKV, dynamic=True)) == ["head size is not known"]


def test_heads_of_any_size() -> None:
    """Whether a scale is given or follows from the size."""
    attend = banded(lambda i, j: j <= i)
    assert refusals(explained(attend, *QKV, dynamic=True)) == ["head size is not known"]


def test_a_window_is_never_left_to_an_operator_without_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "torch")
    (graph,) = explained(banded(lambda i, j: (j <= i) & (j > i - 8)), *QKV).graphs
    assert ", 7, 0, 0.0, False, torch)" in graph.after and "attention_forward" not in graph.after


def test_weighted_repetitions_are_none() -> None:
    def attend(q: Any, k: Any, v: Any, w: Any) -> Any:
        k, v = ((x[:, :, None] * w[:, None, None]).reshape(q.shape) for x in (k, v))
        return CUDNN(q, k, v, bias_of(q, lambda i, j: j <= i), False)[0] * 2

    (graph,) = explained(attend, QKV[0], (2, 2, 24, 64), (2, 2, 24, 64), (2,)).graphs
    assert graph.after.count("aten.mul.Tensor") == 3


def test_a_small_bias_is_no_mask() -> None:
    def attend(q: Any, k: Any, v: Any) -> Any:
        at = torch.arange(24, device=q.device)
        bias = torch.where(at[:, None] >= at[None, :], 0.0, -100.0).to(q.dtype).expand(2, 1, -1, -1)
        return CUDNN(q, k, v, bias, False)[0] * 2

    assert refusals(explained(attend, *QKV)) == ["the bias is not a mask of positions"]


def test_a_bias_that_is_padded_for_its_kernel() -> None:
    """PyTorch pads the bias of memory-efficient attention to a multiple of 16 bytes and slices that off again."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        bias = torch.nn.functional.pad(bias_of(q[:1], lambda i, j: j <= i), [0, 1])[..., :23].expand(2, 4, -1, -1)
        return EFFICIENT(q, k, v, bias, False)[0] * 2

    assert explained(attend, *[(2, 4, 23, 64)] * 3).counts()["causal_attention"] == 1


# ---- libraries -------------------------------------------------------------------------------------------------------


def detail(found: Explanation) -> str:
    (event,) = [each for each in found.rewrites if each.rule == "causal_attention"]
    return event.detail


CAUSAL, WINDOW = banded(lambda i, j: j <= i), banded(lambda i, j: (j <= i) & (j > i - 8))


def test_the_fastest_library_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    order = ["hopper", "flash_attn_4", "flash_attn_3", "cudnn", "flash_attn_2", "torch"]
    for at, name in enumerate(order):
        installed(monkeypatch, *order[at:])
        found = explained(CAUSAL, *QKV)
        title = implementations.named("cudnn" if name in ("flash_attn_2", "torch") else name).title  # type: ignore[union-attr]
        assert detail(found).startswith(f"causal, 4/4 heads of 64, {title}"), "the graph calls cuDNN: it is there"
        assert ("flash-attn 4: not installed" in detail(found)) == (at > 1)


def test_the_report_says_why_a_faster_library_was_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "torch")
    found = explained(WINDOW, *QKV)
    assert detail(found) == (
        "keys from -7 to +0, 4/4 heads of 64, torch's flash attention (this package's kernel: not installed; flash-attn 4: not "
        "installed; flash-attn 3: not installed; cuDNN: no window; flash-attn 2: not installed)"
    )


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    assert refusals(explained(WINDOW, *QKV)) == ["no implementation"]
    installed(monkeypatch, "torch", "flash_attn_4")
    assert refusals(explained(CAUSAL, *QKV, dtype=torch.float32)) == ["no implementation"]
    assert refusals(explained(CAUSAL, *[(2, 4, 24, 60)] * 3)) == ["no implementation"]
    assert refusals(explained(CAUSAL, *[(2, 4, 24, 320)] * 3)) == ["no implementation"]


def test_cached_graphs_know_what_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from inductor_ext.passes import RewritePass
    from inductor_ext.settings import Settings

    before = RewritePass(Settings()).uuid()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.0")
    assert RewritePass(Settings()).uuid() != before


# ---- refusals that a CPU's operator cannot show -----------------------------------------------------------------------


def test_refusals_on_a_gpu() -> None:
    one = lambda *args, **kwargs: lambda q, k, v: CUDNN(q, k, v, None, False, *args, **kwargs)[0] * 2  # noqa: E731
    assert refusals(explained(one(0.5, True), *QKV)) == ["dropout"]
    assert refusals(explained(one(0.0, True), (2, 4, 24, 64), (2, 4, 24, 64), (2, 4, 24, 32))) == ["head size of V (MLA)"]
    strided = lambda q, k, v: FLASH(q[..., ::2], k, v, 0.0, True)[0] * 2  # noqa: E731
    shapes = [(2, 4, 24, 128), (2, 4, 24, 64), (2, 4, 24, 64)]
    found = explained(strided, *shapes, rules={"causal_attention": "always"})
    assert refusals(found) == ["input layout"]
    read = "[6144, 1536, 64, 1]"
    assert [each.found for each in found.refusals] == [f"[12288, 3072, 128, 2], {read}, {read}"]


def test_heads_that_only_their_repetition_makes_readable_stay_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "flash_attn_4")

    def attend(q: Any, k: Any, v: Any) -> Any:
        k, v = (x.transpose(2, 3)[:, :, None].expand(2, 2, 2, 24, 64).reshape(2, 4, 24, 64) for x in (k, v))
        return CUDNN(q, k, v, bias_of(q, lambda i, j: j <= i), False)[0] * 2

    found = explained(attend, (2, 4, 24, 64), (2, 2, 64, 24), (2, 2, 64, 24))
    assert detail(found).startswith("causal, 4/4 heads of 64")


# ---- a transformers model --------------------------------------------------------------------------------------------


@pytest.fixture
def sent_to_cudnn() -> Iterator[str]:
    """transformers' sdpa, as PyTorch sends it on an H200: no GPU here can be asked."""
    pytest.importorskip("transformers")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import repeat_kv
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **_: Any) -> Any:
        k, v = (repeat_kv(each, module.num_key_value_groups) for each in (k, v))
        bias = None if mask is None else torch.where(mask, 0.0, -65536.0).to(q.dtype)
        out = CUDNN(q, k, v, bias, False, 0.0, mask is None and q.shape[2] > 1, scale=scaling)[0]
        return out.transpose(1, 2).contiguous(), None

    name = "sent_to_cudnn"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    yield name
    AttentionInterface._global_mapping.pop(name)
    AttentionMaskInterface._global_mapping.pop(name)


@contextlib.contextmanager
def set_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def qwen3(attention: str, device: str, **options: Any) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, attn_implementation=attention, use_cache=False, **options,
    )  # fmt: skip
    with torch.device(device), set_default_dtype(BF16):
        return Qwen3Model(config).eval()


def explained_qwen3(attention: str, dynamic: bool | None, length: int = 48, **options: Any) -> Explanation:
    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        model = qwen3(attention, "cuda", **options)
        ids = torch.zeros(3, length, dtype=torch.int64, device="cuda")
        return inductor_ext.explain(lambda x: model(input_ids=x).last_hidden_state, ids, dynamic=dynamic)


@pytest.mark.parametrize("library", ["this package's kernel", "cuDNN"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_both_layers_of_a_qwen3(monkeypatch: pytest.MonkeyPatch, sent_to_cudnn: str, dynamic: bool, library: str) -> None:
    if library == "cuDNN":
        installed(monkeypatch, "cudnn")
    found = explained_qwen3(sent_to_cudnn, dynamic)
    assert found.counts()["causal_attention"] == 2
    (graph,) = found.graphs
    assert "aten.where" in graph.before and "expand" in graph.before
    for line in graph.after.splitlines():
        assert "aten.where" not in line and "cumsum" not in line, line
        assert "# bool" not in line or "[3, 1" not in line, line
    if library == "cuDNN":
        calls = [line for line in graph.after.splitlines() if "_scaled_dot_product" in line and "getitem" not in line]
        assert len(calls) == 2 and all(", None, False, 0.0, True)" in call or "0.0, True, scale=" in call for call in calls)
    else:
        calls = [line for line in graph.after.splitlines() if "inductor_ext.varlen_attention" in line]
        assert len(calls) == 2 and all(", None, 0, 0.125, -1, 0, 0.0, False, hopper)" in call for call in calls)
    events = [event for event in found.rewrites if event.rule == "causal_attention"]
    assert all(event.detail.startswith(f"causal, 4/2 heads of 64, {library}") for event in events)
    assert [event.module for event in events] == ["layers.0.self_attn", "layers.1.self_attn"]


# ---- generated code --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as fake:
        yield fake


def projected(x: Any, heads: int) -> Any:
    return x.view(*x.shape[:2], heads, 64).transpose(1, 2)


def grouped(q: Any, k: Any, v: Any) -> Any:
    """As a model does it: projections, GQA, the mask, and the reshape that the next projection reads."""
    q, k, v = projected(q, 4), projected(k, 2), projected(v, 2)
    k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
    return CUDNN(q, k, v, bias_of(q, lambda i, j: j <= i), False)[0].transpose(1, 2).flatten(2)


@pytest.mark.parametrize("library", ["flash_attn_4", "cudnn"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_generated_code_copies_nothing(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, dynamic: bool, library: str) -> None:
    installed(monkeypatch, library)

    def make() -> tuple[Any, ...]:
        return tuple(torch.empty(2, 24, width, dtype=BF16, device="cuda") for width in (256, 128, 128))

    source = gpu.source(grouped, make, backend=inductor_ext.backend(build="defer"), dynamic=dynamic)
    body = source.split("runner = ")[0]
    assert ".run(" not in body, "no kernel of Inductor's: no mask, no copy of K or V, none of the output"
    if library == "cudnn":
        assert body.count("aten._scaled_dot_product_cudnn_attention.default(") == 1 and "empty_strided_cuda" not in body
    else:
        assert "extern_kernels.inductor_ext_varlen_attention(" in body and body.count("= empty_strided_cuda(") == 1
        assert "'flash_attn_4', out=buf0)" in body


def test_the_rule_is_registered_before_what_reads_its_output() -> None:
    names = [rule.name for rule in registry.rules()]
    assert names.index("causal_attention") < names.index("fp8_quantize")
