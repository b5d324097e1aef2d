"""What the qk_norm_rope rule makes of Hugging Face's models, which rotations it pairs, and what Inductor writes around it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext.patterns.qk_norm_rope import _llama_norm, _rope, _turned_as_complex
from inductor_ext.report.explain import Explanation
from tests.patterns.test_scaled_mm_model import Linear
from tests.support import scaled_tables as tables
from tests.support.compiled import run_compiled
from tests.support.equal import assert_all_same_bytes
from tests.support.fakegpu import fake_cuda_inputs, fake_gpu
from tests.support.products import BF16, empty, explained, refusals

forgotten = pytest.fixture(autouse=True)(tables.forgetting)
ALWAYS = {"scaled_mm": "always", "scaled_mm_siblings": "always"}
HEADS, KV_HEADS, D = 4, 2, 64


def _model(kind: str, layers: int = 2) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=D, vocab_size=128, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    return transformers.AutoModel.from_config(config, dtype=BF16).eval()


def _quantised(model: torch.nn.Module) -> torch.nn.Module:
    """Linear layers as torchao makes them of row-wise dynamic FP8."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Linear(child.in_features, child.out_features, rows=True))
    return model


def _on_fake_cuda(kind: str, dynamic: bool) -> Explanation:
    with fake_cuda_inputs(), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), torch.device("cuda"):
        model, tokens = _quantised(_model(kind)), torch.zeros(2, 48, dtype=torch.long)
        for dim in range(2) if dynamic else ():
            torch._dynamo.mark_dynamic(tokens, dim)
        with torch.no_grad():
            return inductor_ext.explain(model, tokens, rules=ALWAYS)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_one_launch_a_layer(kind: str, dynamic: bool) -> None:
    """q and k are columns of the buffer that the siblings' rule makes, and stay there."""
    torch._dynamo.reset()
    found = _on_fake_cuda(kind, dynamic)
    assert found.counts()["qk_norm_rope"] == 2 and not refusals(found, "qk_norm_rope")
    (graph,) = found.graphs
    calls = [line for line in graph.after.splitlines() if "inductor_ext.qk_norm_rope.default(" in line]
    assert len(calls) == 2
    for line in calls:
        assert ("cast mul" in line) == (kind == "Qwen3")
        q, k = line.split("default(")[1].split(", ")[:2]
        sources = {_source(graph.after, name) for name in (q, k)}
        assert len(sources) == 1 and next(iter(sources)).startswith("scaled_mm_default")
    assert "aten.neg" not in graph.after
    tables = {tuple(line.split("default(")[1].split(", ")[4:6]) for line in calls}
    assert len(tables) == 1, "both layers read the tables that are there"


def _source(text: str, name: str) -> str:
    """What a view is of."""
    while match := re.search(rf"^{name} = aten\.(?:reshape|slice|permute)[.\w]*\((\w+), ", text, re.MULTILINE):
        name = match[1]
    return name


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_the_model_computes_what_it_did(kind: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, tokens = _model(kind, layers=1), torch.randint(0, 128, (2, 24))
    with torch.no_grad():
        found = inductor_ext.verify(model, tokens, rules={"qk_norm_rope": "always"})
    (check,) = [check for check in found.checks if check.rule == "qk_norm_rope"]
    assert found.ok and check.rewrites == 1 and check.differing == 0


# ---- pairs -----------------------------------------------------------------------------------------------------------


def _projections(x: Any, wq: Any, wk: Any, cos: Any, sin: Any, between: Any = None) -> Any:
    q = (x @ wq).unflatten(-1, (HEADS, D)).transpose(1, 2)
    table = cos.unsqueeze(1), sin.unsqueeze(1)
    rotate = lambda y: y * table[0] + torch.cat((-y[..., D // 2 :], y[..., : D // 2]), -1) * table[1]  # noqa: E731
    q = rotate(q)
    if between is not None:
        x = between(x, q)
    return q, rotate((x @ wk).unflatten(-1, (KV_HEADS, D)).transpose(1, 2))


def _inputs() -> tuple[Any, ...]:
    width = HEADS * D
    return (
        *(empty(2, 24, width, dtype=BF16), empty(width, width, dtype=BF16), empty(width, KV_HEADS * D, dtype=BF16)),
        *(empty(1, 24, D, dtype=BF16), empty(1, 24, D, dtype=BF16)),
    )


def test_q_and_k_of_two_products_are_one_launch() -> None:
    assert explained(_projections, _inputs).counts() == {"qk_norm_rope": 1}


def test_k_that_needs_q_is_a_launch_of_its_own() -> None:
    later = lambda x, q: x + q.transpose(1, 2).flatten(2)  # noqa: E731
    assert explained(lambda *args: _projections(*args, between=later), _inputs).counts() == {"qk_norm_rope": 2}


def test_other_norms_are_not_paired() -> None:
    def fn(q: Any, k: Any, weight: Any, cos: Any, sin: Any) -> Any:
        return _rope(_llama_norm(q, weight), k, cos, sin, dim=2)

    def make() -> tuple[Any, ...]:
        q, k = (empty(2, 24, heads, D, dtype=BF16) for heads in (HEADS, KV_HEADS))
        return q, k, empty(D, dtype=BF16), empty(1, 24, D, dtype=BF16), empty(1, 24, D, dtype=BF16)

    found = explained(fn, make)
    assert found.counts() == {"qk_norm_rope": 2}
    calls = [line for line in found.graphs[0].after.splitlines() if "inductor_ext.qk_norm_rope" in line]
    assert sorted("cast mul" in line for line in calls) == [False, True]


def test_a_broken_k_leaves_q_alone() -> None:
    def fn(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return _rope(q, k * 2, cos, sin, dim=2)

    def make() -> tuple[Any, ...]:
        q, k = (empty(2, 24, heads, D, dtype=BF16) for heads in (HEADS, KV_HEADS))
        return q, k, empty(1, 24, D, dtype=BF16), empty(1, 24, D, dtype=BF16)

    found = explained(fn, make)
    assert found.counts() == {"qk_norm_rope": 1}
    assert refusals(found, "qk_norm_rope") == ["Inductor fuses this rotation into its producer for free"]


def test_without_a_norm_the_compiled_bytes_are_eagers() -> None:
    def fn(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return _rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        q, k = ((torch.randn(2, 7, heads, 80) * 3).to(dtype) for heads in (HEADS, KV_HEADS))
        angles = torch.randn(2, 7, 80) * 9
        given = (q, k, angles.cos().to(dtype), angles.sin().to(dtype))
        found, recorder = run_compiled(fn, given)
        assert recorder.counts() == {"qk_norm_rope": 1}
        assert_all_same_bytes(found, [*fn(*given), *given])


# ---- generated code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_attention_reads_the_planned_buffers(dynamic: bool) -> None:
    """No copy stands between the product, our launch and attention."""

    def layer(x: Any, w: Any, cos: Any, sin: Any) -> Any:
        qkv = (x.flatten(0, 1) @ w).view(*x.shape[:2], -1)
        q, k, v = qkv.split([HEADS * D, HEADS * D, HEADS * D], -1)
        q, k, v = (each.unflatten(-1, (HEADS, D)).transpose(1, 2) for each in (q, k, v))
        q, k = _rope(q, k, cos, sin)
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]

    def make() -> tuple[Any, ...]:
        width = HEADS * D
        tables = (empty(1, 24, D, dtype=BF16) for _ in range(2))
        return empty(2, 24, width, dtype=BF16), empty(width, 3 * width, dtype=BF16), *tables

    with fake_gpu() as gpu:
        source = gpu.source(layer, make, backend=inductor_ext.backend(build="defer"), dynamic=dynamic)
    body = source.split("runner = ")[0].split("benchmark_compiled_module")[0]
    (call,) = [line for line in body.splitlines() if "inductor_ext_qk_norm_rope(" in line]
    outs = re.findall(r"out\d=(buf\d+)", call)
    assert len(outs) == 2 and ".run(" not in body
    (attention,) = [line for line in body.splitlines() if "_scaled_dot_product_flash_attention.default(" in line]
    for out in outs:
        assert re.search(rf"{out} = empty_strided_cuda\(", body), "Inductor plans both"
        assert re.search(rf"reinterpret_tensor\({out}, |\b{out}\b", attention)


# ---- functions of models, at the sizes that their heads have ---------------------------------------------------------


def _selected_by_sections(q: Any, k: Any, cos: Any, sin: Any, sections: list[int]) -> Any:
    """Qwen2-VL's and Qwen2.5-VL's text: each section of a head has the angles of time, height or width."""
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(each.split(sections * 2, dim=-1))], dim=-1) for each in (cos, sin)
    )
    return _rope(q, k, cos, sin)


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_tables_selected_by_sections(d: int) -> None:
    rest = d // 2 - d // 8
    sections = [d // 8, rest // 2, rest - rest // 2]

    def text(x: Any, cos: Any, sin: Any) -> Any:
        q, k, _ = x.view(2, 5, -1, d).split([HEADS, KV_HEADS, KV_HEADS], 2)
        return _selected_by_sections(q.transpose(1, 2), k.transpose(1, 2), cos, sin, sections)

    x = torch.randn(2, 5, (HEADS + 2 * KV_HEADS) * d).bfloat16()
    cos, sin = (torch.randn(3, 2, 5, d).bfloat16() for _ in range(2))
    outputs, recorder = run_compiled(text, (x, cos, sin), rules={"qk_norm_rope": "always"})
    assert recorder.counts() == {"qk_norm_rope": 1}
    assert_all_same_bytes(outputs[:2], text(x, cos, sin))


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_the_towers_rotation_in_fp32(d: int) -> None:
    """transformers' vision towers: all patches in one row, fp32 tables."""
    module = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")

    def tower(qkv: Any, cos: Any, sin: Any) -> Any:
        q, k, _ = qkv.view(5, 3, HEADS, d).unbind(1)
        return module.apply_rotary_pos_emb_vision(q, k, cos, sin)

    given = torch.randn(5, 3 * HEADS * d).bfloat16(), torch.randn(5, d), torch.randn(5, d)
    outputs, recorder = run_compiled(tower, given, rules={"qk_norm_rope": "always"})
    assert recorder.counts() == {"qk_norm_rope": 1}
    assert_all_same_bytes(outputs[:2], tower(*given))


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_llama_4_multiplies_complex_numbers(d: int) -> None:
    module = pytest.importorskip("transformers.models.llama4.modeling_llama4")

    def turned(qkv: Any, table: Any) -> Any:
        q, k, _ = qkv.view(2, 5, -1, d).split([HEADS, KV_HEADS, KV_HEADS], 2)
        return module.apply_rotary_emb(q, k, table)

    angles = torch.randn(1, 5, d // 2)
    given = torch.randn(2, 5, (HEADS + 2 * KV_HEADS) * d).bfloat16(), torch.polar(torch.ones_like(angles), angles)
    outputs, recorder = run_compiled(turned, given, rules={"qk_norm_rope": "always"})
    assert recorder.counts() == {"qk_norm_rope": 1}
    for found, wanted in zip(outputs, turned(*given), strict=False):
        apart = (found.float() - wanted.float()).norm() / wanted.float().norm()
        assert apart <= 5e-4, "more than a rare rounding to bf16 differs"


def _complex_table() -> tuple[torch.Tensor, ...]:
    return (empty(8, D // 2, dtype=torch.complex64),)


def _cache_and_positions() -> tuple[torch.Tensor, ...]:
    return empty(64, D // 2, 2, dtype=torch.float32), empty(8, dtype=torch.int64)


def test_no_table_is_copied_that_has_cos_and_sin_in_turn() -> None:
    """The kernel reads a complex table where it is, and rows of a cache where they are gathered."""

    def projected(x: Any, w: Any) -> Any:
        q, k = (x @ w).view(2, 8, HEADS + KV_HEADS, D).split([HEADS, KV_HEADS], 2)
        return q, k

    def of_complex(x: Any, w: Any, table: Any) -> Any:
        return tuple(_turned_as_complex(each, table.view(1, -1, 1, D // 2)) for each in projected(x, w))

    def of_cache(x: Any, w: Any, cache: Any, positions: Any) -> Any:
        both = cache[positions].view(-1, 8, 1, D // 2, 2)
        pairs = [each.float().unflatten(-1, (-1, 2)) for each in projected(x, w)]
        turned = [
            torch.stack((a * both[..., 0] - b * both[..., 1], b * both[..., 0] + a * both[..., 1]), -1)
            for a, b in (each.unbind(-1) for each in pairs)
        ]
        return tuple(each.flatten(3).to(x.dtype) for each in turned)

    x, w = (16, HEADS * D), (HEADS * D, (HEADS + KV_HEADS) * D)
    with fake_gpu() as gpu:
        for fn, kernels, table in ((of_complex, 0, _complex_table), (of_cache, 1, _cache_and_positions)):

            def make(table: Any = table) -> Any:
                return empty(*x, dtype=BF16), empty(*w, dtype=BF16), *table()

            source = gpu.source(fn, make, backend=inductor_ext.backend(build="defer"), dynamic=False)
            assert len(re.findall(r"inductor_ext[._]qk_norm_rope\b\S*\(", source)) == 1
            assert len(re.findall(r"triton_\w+\.run\(", source)) == kernels
