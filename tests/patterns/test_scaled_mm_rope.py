"""scaled_mm_rope in models and in generated code: one launch a layer, whose columns attention reads without a copy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext import registry
from inductor_ext.kernels.scaled_mm.choice import MAX_M
from inductor_ext.kernels.scaled_mm_rope import op as scaled_mm_rope
from inductor_ext.kernels.scaled_mm_rope.op import DEFAULT, EXACT, HEAD_DIM
from inductor_ext.patterns.qk_norm_rope import _rope
from inductor_ext.report.explain import Explanation
from tests.patterns.test_scaled_mm_model import Linear, needs_rowwise
from tests.support import scaled_tables as tables
from tests.support.compiled import Recorder, run_compiled
from tests.support.fakegpu import fake_cuda_inputs, fake_gpu
from tests.support.products import BF16, empty, explained, one, refusals, scale

forgotten = pytest.fixture(autouse=True)(tables.forgetting)
HEADS, KV_HEADS, D, HIDDEN, LAYERS = 2, 1, HEAD_DIM, 64, 2
BEFORE = {"scaled_mm": "always", "scaled_mm_siblings": "always"}
ALWAYS = {**BEFORE, "scaled_mm_rope": "always"}
#: Two layers of random weights in FP8 make more than a hundredth of another order of attention's sums.
QUIET = {**ALWAYS, "causal_attention": "off"}
MODELS = pytest.mark.parametrize("kind", ["Qwen3", "Llama"])


def model(kind: str, layers: int = LAYERS, rows: bool = False) -> torch.nn.Module:
    """Hugging Face's, its linear layers quantised as torchao does it."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=D, vocab_size=128, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    made = transformers.AutoModel.from_config(config, dtype=BF16).eval()
    for module in list(made.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Linear(child.in_features, child.out_features, rows))
    return made


def on_fake_cuda(kind: str, dynamic: bool, rules: dict[str, Any]) -> Explanation:
    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), torch.device("cuda"):
        made, tokens = model(kind, rows=True), torch.zeros(2, 48, dtype=torch.long)
        for dim in range(2) if dynamic else ():
            torch._dynamo.mark_dynamic(tokens, dim)
        with torch.no_grad():
            return inductor_ext.explain(made, tokens, rules=rules)


# ---- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@MODELS
def test_one_launch_a_layer(kind: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    found = on_fake_cuda(kind, dynamic, ALWAYS)
    assert found.counts()["scaled_mm_rope"] == LAYERS and refusals(found, "scaled_mm_rope") == []
    (graph,) = found.graphs
    calls = [line for line in graph.after.splitlines() if "inductor_ext.scaled_mm_rope.default(" in line]
    assert len(calls) == LAYERS and "inductor_ext.qk_norm_rope" not in graph.after
    for line in calls:
        assert ("cast mul" in line) == (kind == "Qwen3")
        assert (f", {DEFAULT})" in line) == (not dynamic)
        assert line.endswith(f", {(HEADS + 2 * KV_HEADS) * D}]")
    details = {event.detail for event in found.rewrites if event.rule == "scaled_mm_rope"}
    table = scaled_mm_rope.table("cast mul" if kind == "Qwen3" else "")  # asked for the most rows where M is symbolic
    name = table.choose("sm_90a", MAX_M, (HEADS + 2 * KV_HEADS) * D, HIDDEN, True, True) if dynamic else DEFAULT
    assert details == {f"{HEADS} and {KV_HEADS} heads, N = 256 + 128 + 128: {name}"}


@MODELS
def test_fewer_rows_than_were_measured(kind: str) -> None:
    torch._dynamo.reset()
    found = on_fake_cuda(kind, False, BEFORE)
    assert "scaled_mm_rope" not in found.counts() and found.counts()["qk_norm_rope"] == LAYERS
    assert set(refusals(found, "scaled_mm_rope")) == {"not measured"}


def test_what_was_measured_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of heads with a norm for Qwen3, without for Llama, and with the tile that was the fastest."""
    plain, normalised = (scaled_mm_rope.table(norm).kind(True, True) for norm in ("", "cast mul"))
    shape = (HEADS + 2 * KV_HEADS) * D, HIDDEN
    for kind, own in (("Qwen3", normalised), ("Llama", plain)):
        for us, reason in ((2.0, None), (3.99, "it would not be faster"))[: 2 if kind == "Qwen3" else 1]:
            tables.use(monkeypatch, {shape: ((64, "tile:64x128p", us, 4.0), (128, "tile:64x128p", us, 4.0))}, kinds=(own,))
            torch._dynamo.reset()
            found = on_fake_cuda(kind, False, BEFORE)
            assert found.counts().get("scaled_mm_rope", 0) == (LAYERS if reason is None else 0)
            assert set(refusals(found, "scaled_mm_rope")) == ({reason} if reason else set())
            if reason is None:
                (detail,) = {event.detail for event in found.rewrites if event.rule == "scaled_mm_rope"}
                assert detail.endswith(": tile:64x128p")
    tables.use(monkeypatch, {shape: ((64, "tile:64x128p", 2.0, 4.0),)}, kinds=(normalised,))
    torch._dynamo.reset()
    assert set(refusals(on_fake_cuda("Llama", False, BEFORE), "scaled_mm_rope")) == {"not measured"}


@pytest.mark.parametrize("rows", [False, True], ids=["tensorwise", "rowwise"])
@MODELS
def test_the_model_computes_what_it_did(kind: str, rows: bool) -> None:
    needs_rowwise(rows)
    torch.manual_seed(0)
    torch._dynamo.reset()
    made, tokens = model(kind, rows=rows), torch.randint(0, 128, (2, 24))
    with torch.no_grad():
        found = inductor_ext.verify(made, tokens, rules=QUIET, end_to_end=False)
    (check,) = [check for check in found.checks if check.rule == "scaled_mm_rope"]
    assert check.ok and check.rewrites == LAYERS and check.elements > 0
    assert check.local < 1e-3, "the reference is the composition of the two operators', whose sums are side by side"


def test_the_compiled_model_is_that_of_two_launches() -> None:
    """And no further from eager than stock Inductor's is."""
    torch.manual_seed(0)
    made, tokens = model("Qwen3"), torch.randint(0, 128, (2, 24))

    def run(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return made(tokens).last_hidden_state

    (found, _), recorder = run_compiled(run, (tokens,), rules=QUIET)
    (apart, _), without = run_compiled(run, (tokens,), rules={**QUIET, "scaled_mm_rope": "off"})
    assert recorder.counts()["scaled_mm_rope"] == LAYERS == without.counts()["qk_norm_rope"]
    assert torch.equal(found, apart)
    (stock, _), _ = run_compiled(run, (tokens,), rules=dict.fromkeys([rule.name for rule in registry.rules()], "off"))
    eager = run(tokens).float()
    distance = [float((each.float() - eager).norm() / eager.norm()) for each in (found, stock)]
    assert distance[0] <= 2 * distance[1] + 1e-2, distance


# ---- sizes -------------------------------------------------------------------------------------------------------------


def layer(x: Any, s: Any, cos: Any, sin: Any, *pairs: Any) -> Any:
    """q, k, v of x [B, S, K], rotated, and attention. As many heads of k as of q, so that nothing is repeated."""
    q, k, v = (one(x.flatten(0, 1), w, s, t).view(*x.shape[:2], -1, D) for w, t in zip(pairs[::2], pairs[1::2]))
    q, k = _rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v.transpose(1, 2), 0.0, True)[0]


def layer_inputs(*, batched: bool = False, dynamic: bool = False) -> tuple[Any, ...]:
    x, tables_ = empty(2, 24, 128), [empty(2 if batched else 1, 24, D, dtype=BF16) for _ in range(2)]
    if dynamic:
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(x, dim)
        for table in tables_:
            torch._dynamo.mark_dynamic(table, 1)
    return x, scale(), *tables_, *(value for _ in range(3) for value in (empty(2 * D, 128), scale()))


def test_a_dynamic_m_compiles_once() -> None:
    recorder = Recorder(rules=ALWAYS)

    def fn(x: Any, s: Any, cos: Any, sin: Any, *pairs: Any) -> Any:
        q, k, v = (one(x.flatten(0, 1), w, s, t).view(*x.shape[:2], -1, D) for w, t in zip(pairs[::2], pairs[1::2]))
        q, k = _rope(q, k, cos, sin, dim=2)
        return q.float().sigmoid() + k.float() * v.float()

    compiled = torch.compile(fn, backend=recorder, dynamic=None)
    weights = [value for _ in range(3) for value in (torch.randn(2 * D, 64).to(torch.float8_e4m3fn), torch.tensor(0.5))]
    for sequences, positions in ((2, 24), (3, 7), (5, 33), (7, 2)):
        x = torch.randn(sequences, positions, 64).to(torch.float8_e4m3fn)
        cos, sin = (torch.randn(1, positions, D).to(BF16) for _ in range(2))
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(x, dim)
        for table in (cos, sin):
            torch._dynamo.mark_dynamic(table, 1)
        given = (x, torch.tensor(0.25), cos, sin, *weights)
        torch.testing.assert_close(compiled(*given), fn(*given), rtol=2e-2, atol=2e-1)
    assert len(recorder.reports) == 1 and recorder.counts()["scaled_mm_rope"] == 1


# ---- generated code ------------------------------------------------------------------------------------------------------


def body(make: Callable[[], Any], fn: Any = layer, dynamic: bool | None = False) -> str:
    with fake_gpu() as gpu:
        source = gpu.source(fn, make, backend=inductor_ext.backend(build="defer", rules=QUIET), dynamic=dynamic)
    return source.split("runner = ")[0].split("benchmark_compiled_module")[0]


@pytest.mark.parametrize("batched", [False, True], ids=["one_table", "a_table_each"])
def test_attention_reads_columns_of_the_planned_buffer(batched: bool) -> None:
    """No kernel but ours and attention's: q, k and v are views."""
    source = body(lambda: layer_inputs(batched=batched))
    (call,) = [line.strip() for line in source.splitlines() if "extern_kernels.inductor_ext_scaled_mm_rope(" in line]
    (written,) = re.findall(r"out=(buf\d+)\)", call)
    assert f"{written} = empty_strided_cuda((48, 768), (768, 1), torch.bfloat16)" in source
    assert call.endswith(f"torch.bfloat16, False, False, '{EXACT}', out={written})")
    (attention,) = [line for line in source.splitlines() if "_scaled_dot_product_flash_attention.default(" in line]
    for offset in (0, 256, 512):
        assert f"reinterpret_tensor({written}, (2, 2, 24, 128), (18432, 128, 768, 1), {offset})" in attention
    assert ".run(" not in source and "inductor_ext_qk_norm_rope" not in source, "no copy, no second launch"
    assert len(re.findall(r"= empty_strided_cuda\(", source)) == 1


def test_symbolic_sizes_are_planned_too() -> None:
    source = body(lambda: layer_inputs(dynamic=True), dynamic=None)
    (call,) = [line.strip() for line in source.splitlines() if "extern_kernels.inductor_ext_scaled_mm_rope(" in line]
    (written,) = re.findall(r"out=(buf\d+)\)", call)
    assert re.search(rf"{written} = empty_strided_cuda\(\(s\d+\*s\d+, 768\), \(768, 1\), torch.bfloat16\)", source)
    assert re.search(r"torch.bfloat16, False, False, '', out=buf\d+\)$", call), "the op chooses when it runs"
    assert ".run(" not in source


# ---- who else reads ------------------------------------------------------------------------------------------------------


def test_other_tables_for_k_leave_it_to_a_launch_of_its_own() -> None:
    """q's rotation is the products'; k's reads k's columns, which stay as they were, afterwards."""

    def fn(x: Any, s: Any, cos: Any, sin: Any, *pairs: Any) -> Any:
        q, k, v = (one(x.flatten(0, 1), w, s, t).view(*x.shape[:2], -1, D) for w, t in zip(pairs[::2], pairs[1::2]))
        (q, _), (_, k) = _rope(q, q, cos, sin, dim=2), _rope(k, k, sin, cos, dim=2)
        return torch.ops.aten._scaled_dot_product_flash_attention(*(each.transpose(1, 2) for each in (q, k, v)), 0.0, True)[0]

    found = explained(fn, layer_inputs, **QUIET)
    assert found.counts() == {"scaled_mm_rope": 1, "qk_norm_rope": 1}
    (graph,) = found.graphs
    assert "inductor_ext.scaled_mm_rope.default(" in graph.after and ", None, None, " in graph.after


def test_a_returned_q_is_taken_when_asked_for() -> None:
    def fn(*given: Any) -> Any:
        x, s, cos, sin, *pairs = given
        q, k, v = (one(x.flatten(0, 1), w, s, t).view(*x.shape[:2], -1, D) for w, t in zip(pairs[::2], pairs[1::2]))
        return *_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin), v.float().sigmoid()

    forced = explained(fn, layer_inputs, **ALWAYS)
    assert forced.counts()["scaled_mm_rope"] == 1
    left = explained(fn, layer_inputs, **BEFORE)
    assert refusals(left, "scaled_mm_rope") == ["a sibling is returned to the caller"]


@pytest.mark.parametrize("capability", [(8, 9), (10, 0)])
def test_another_gpu_keeps_two_launches(capability: tuple[int, int]) -> None:
    with fake_gpu(capability) as gpu:
        source = gpu.source(layer, layer_inputs, backend=inductor_ext.backend(build="defer", rules=QUIET), dynamic=False)
    assert "inductor_ext_scaled_mm_rope" not in source and "inductor_ext_qk_norm_rope(" in source
    assert ("inductor_ext_scaled_mm(" in source) == (capability == (10, 0))
