"""scaled_mm: spellings, every refusal, what the tables decide, and when b may be read early."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

import inductor_ext
from inductor_ext import torch_compat
from inductor_ext.calls import aten
from inductor_ext.miss import Miss
from inductor_ext.patterns.support import scaled_plan, scaled_product
from inductor_ext.patterns.support.scaled_product import Product
from tests.support import scaled_tables as tables
from tests.support.fakegpu import fake_cuda_inputs
from tests.support.products import BF16, E4, empty, explained, one, quantise, scale, tensorwise
from tests.support.scaled_tables import FASTER, SLOWER, SMALL

E5 = torch.float8_e5m2
forgotten = pytest.fixture(autouse=True)(tables.forgetting)


# ---- parsing ---------------------------------------------------------------------------------------------------------


class Made:
    """A graph with one product, made by hand: `parse` is asked about arguments that no traced model has."""

    def __init__(self) -> None:
        self.mode, self.graph = FakeTensorMode(shape_env=ShapeEnv()), Graph()

    def tensor(self, shape: Any, stride: Any = None, dtype: torch.dtype = torch.float32, offset: int = 0) -> Node:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        with self.mode:
            if stride is None:
                node.meta["val"] = torch.empty(shape, dtype=dtype)
            else:
                extent = 1 + offset + sum((size - 1) * step for size, step in zip(shape, stride))
                node.meta["val"] = torch.empty(extent, dtype=dtype).as_strided(shape, stride, offset)
        return node

    def fp8(self, *shape: int, stride: Any = None, dtype: torch.dtype = E4, offset: int = 0) -> Node:
        return self.tensor(shape, stride, dtype, offset)

    def weight(self, k: int, n: int, dtype: torch.dtype = E4) -> Node:
        return self.fp8(k, n, stride=(1, k), dtype=dtype)

    def parse(self, *args: Any, v2: bool = False, **kwargs: Any) -> Product:
        target = aten._scaled_mm_v2.default if v2 else aten._scaled_mm.default
        return scaled_product.parse(self.graph.call_function(target, args, kwargs))


def parsed(**changes: Any) -> Product:
    """`parse` of a row-wise product [32, 64] × [64, 48] with some arguments replaced, each a function of `Made`."""
    made = Made()
    arguments: dict[str, Any] = {
        "a": made.fp8(32, 64),
        "b": made.weight(64, 48),
        "scale_a": made.tensor((32, 1)),
        "scale_b": made.tensor((1, 48)),
        "bias": None,
        "scale_result": None,
        "out_dtype": BF16,
    }
    for name, change in changes.items():
        arguments[name] = change(made) if callable(change) else change
    return made.parse(*arguments.values())


def v2_parsed(
    recipes: tuple[Any, Any] = (1, 1), swizzles: Any = (), contraction: Any = (), **changes: Any
) -> Product:
    """The same in the second spelling, with fast accumulation."""
    made = Made()
    a, b = made.fp8(32, 64), made.weight(64, 48)
    scales = [changes.get(name, default)(made) for name, default in (
        ("scale_a", lambda m: m.tensor((32, 1))), ("scale_b", lambda m: m.tensor((48, 1))))]  # fmt: skip
    recipe_a, recipe_b = ([r] if isinstance(r, int) else r for r in recipes)
    left, right = (scales[:1], recipe_a, list(swizzles)), (scales[1:], recipe_b, list(swizzles))
    return made.parse(a, b, *left, *right, None, BF16, list(contraction), True, v2=True)


def test_by_position_and_by_keyword() -> None:
    made = Made()
    a, b, s, t, bias = made.fp8(32, 64), made.weight(64, 48), made.tensor(()), made.tensor(()), made.tensor((48,), dtype=BF16)
    keyword = made.parse(a, b, scale_a=s, scale_b=t, bias=bias, out_dtype=BF16, use_fast_accum=True)
    position = made.parse(a, b, s, t, bias, None, BF16, True)
    assert isinstance(keyword, Product) and isinstance(position, Product)
    for product in (keyword, position):
        assert (product.a, product.b, product.scale_a, product.scale_b, product.bias) == (a, b, s, t, bias)
        assert (product.out_dtype, product.fast, product.m, product.n, product.k) == (BF16, True, 32, 48, 64)
        assert not product.rowwise


ACCEPTED: dict[str, dict[str, Any]] = {
    "rowwise": {},
    "tensorwise": {"scale_a": lambda m: m.tensor(()), "scale_b": lambda m: m.tensor((1, 1))},
    "one_of_each": {"scale_a": lambda m: m.tensor((1,))},
    "padded_rows_of_a": {"a": lambda m: m.fp8(32, 64, stride=(80, 1), offset=16)},
    "padded_columns_of_b": {"b": lambda m: m.fp8(64, 48, stride=(1, 96))},
    "no_rows": {"a": lambda m: m.fp8(0, 64), "scale_a": lambda m: m.tensor((0, 1))},
    "one_row": {"a": lambda m: m.fp8(1, 64), "scale_a": lambda m: m.tensor((1, 1))},
    "bias": {"bias": lambda m: m.tensor((48,), dtype=BF16)},
    "fp32": {"out_dtype": torch.float32, "bias": lambda m: m.tensor((48,))},
    "fp16": {"out_dtype": torch.float16},
    "e5m2_a": {"a": lambda m: m.fp8(32, 64, dtype=E5)},
    "e5m2_b": {"b": lambda m: m.weight(64, 48, dtype=E5)},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    found = parsed(**ACCEPTED[name])
    assert isinstance(found, Product), found
    assert (found.n, found.k, found.fast) == (48, 64, False)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "scale_result": ({"scale_result": lambda m: m.tensor(())}, "scale_result is given", "graph input"),
    "no_output_dtype": ({"out_dtype": None}, "output dtype", "None (the dtype of a)"),
    "fp8_output": ({"out_dtype": E4}, "output dtype", "torch.float8_e4m3fn"),
    "fp4": ({"a": lambda m: m.fp8(32, 64, dtype=torch.uint8)}, "operand dtype", "torch.uint8 and torch.float8_e4m3fn"),
    "e5m2_twice": (
        {"a": lambda m: m.fp8(32, 64, dtype=E5), "b": lambda m: m.weight(64, 48, dtype=E5)},
        "both operands are float8_e5m2",
        "torch.float8_e5m2 and torch.float8_e5m2",
    ),
    "width": ({"b": lambda m: m.weight(64, 40)}, "K or N is not a multiple of 16", "K 64, N 40"),
    "depth": (
        {"a": lambda m: m.fp8(32, 40), "b": lambda m: m.weight(40, 48)},
        "K or N is not a multiple of 16",
        "K 40, N 48",
    ),
    "no_depth": ({"b": lambda m: m.weight(0, 48)}, "K or N is not a multiple of 16", "K 0, N 48"),
    "columns_of_a": ({"a": lambda m: m.fp8(32, 64, stride=(1, 32))}, "A is not row-major", "strides [1, 32] offset 0"),
    "pitch_of_a": ({"a": lambda m: m.fp8(32, 64, stride=(72, 1))}, "A is not row-major", "strides [72, 1] offset 0"),
    "offset_of_a": ({"a": lambda m: m.fp8(32, 64, stride=(64, 1), offset=8)}, "A is not row-major", "offset 8"),
    "rows_of_b": ({"b": lambda m: m.fp8(64, 48)}, "B is not column-major", "strides [48, 1] offset 0"),
    "pitch_of_b": ({"b": lambda m: m.fp8(64, 48, stride=(1, 65))}, "B is not column-major", "strides [1, 65] offset 0"),
    "mx_scales": ({"scale_a": lambda m: m.tensor((32, 2), dtype=torch.float8_e8m0fnu)}, "scale layout", "e8m0fnu[32, 2]"),
    "groups_of_128": ({"scale_a": lambda m: m.tensor((32, 4))}, "scale layout", "float32[32, 4]"),
    "as_many_but_no_vector": ({"scale_a": lambda m: m.tensor((8, 4))}, "scale layout", "float32[8, 4]"),
    "too_few_scales": ({"scale_b": lambda m: m.tensor((1, 16))}, "scale layout", "float32[1, 16]"),
    "strided_scales": ({"scale_a": lambda m: m.tensor((32, 1), (2, 1))}, "scale layout", "strides [2, 1]"),
    "dtype_of_bias": ({"bias": lambda m: m.tensor((48,))}, "bias", "float32[48]"),
    "size_of_bias": ({"bias": lambda m: m.tensor((1,), dtype=BF16)}, "bias", "bfloat16[1]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    changes, reason, found = REFUSED[name]
    with pytest.raises(Miss) as missed:
        parsed(**changes)
    assert missed.value.reason == reason and found in missed.value.found and missed.value.wanted


@pytest.mark.parametrize("shape", [(48, 1), (1, 48), (48,)])
def test_v2_takes_scales_of_b_in_any_direction(shape: tuple[int, ...]) -> None:
    found = v2_parsed(scale_b=lambda m: m.tensor(shape))
    assert isinstance(found, Product) and found.fast and found.rowwise


V2_REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "mx": ({"recipes": (3, 3), "swizzles": [1]}, "scale layout", "recipe [3], swizzle [1] for scale_a"),
    "groups": ({"recipes": (4, 5)}, "scale layout", "recipe [4]"),
    "nvfp4": ({"recipes": ([2, 0], [2, 0])}, "scale layout", "recipe [2, 0]"),
    "swizzled": ({"swizzles": [1]}, "scale layout", "swizzle [1]"),
    "contraction": ({"contraction": [1, 0]}, "contraction_dim is given", "[1, 0]"),
    "one_for_all_rows": ({"scale_a": lambda m: m.tensor(())}, "scale layout", "float32[]"),
    "many_for_the_tensor": ({"recipes": (0, 1)}, "scale layout", "float32[32, 1]"),
}


@pytest.mark.parametrize("name", V2_REFUSED)
def test_v2_refused(name: str) -> None:
    changes, reason, found = V2_REFUSED[name]
    with pytest.raises(Miss) as missed:
        v2_parsed(**changes)
    assert missed.value.reason == reason and found in missed.value.found


def test_the_recipes_are_those_of_torch() -> None:
    assert (ScalingType.TensorWise.value, ScalingType.RowWise.value) == (scaled_product.TENSOR_WISE, scaled_product.ROW_WISE)
    assert SwizzleType.NO_SWIZZLE.value == scaled_product.NO_SWIZZLE


# ---- one product -----------------------------------------------------------------------------------------------------


def test_auto_rewrites_where_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(48, 64): SMALL})
    (event,) = explained(one, tensorwise).rewrites
    assert (event.rule, event.kernel, event.detail) == ("scaled_mm", "scaled_mm", tables.STREAM)
    assert event.why.startswith("2.00x the speed of torch._scaled_mm at M=64 N=48 K=64, tensor-wise, exact accumulation")


def test_auto_leaves_what_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(48, 64): SMALL})
    found = explained(one, lambda: tensorwise(m=80))
    assert found.rewrites == []
    (refusal,) = [each for each in found.refusals if each.rule == "scaled_mm"]
    assert refusal.reason == "PyTorch's own operator is faster here" and refusal.source
    assert refusal.found.startswith("0.50x the speed of torch._scaled_mm at M=16384")


def test_a_gpu_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(48, 64): FASTER}, target="sm_100a")
    (refusal,) = explained(one, tensorwise).refusals
    assert (refusal.reason, refusal.found) == ("no measured table for this GPU", "none for sm_90a")


def test_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(48, 64): FASTER})
    with fake_cuda_inputs(), FakeTensorMode():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
        for mode, reason, what in (("auto", "no measured table for this GPU", "none for sm_89"), ("always", "device", "8.9")):
            found = inductor_ext.explain(one, *tensorwise(), rules={"scaled_mm": mode})
            assert found.rewrites == []
            assert (found.refusals[0].reason, found.refusals[0].found) == (reason, what)


def test_always_takes_our_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(48, 64): SLOWER})
    found = explained(one, tensorwise, scaled_mm="always")
    assert [event.why for event in found.rewrites] == ["forced"]
    assert f"torch.bfloat16, False, False, {tables.TILE})" in found.graphs[0].after


def test_a_cpu_names_no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(48, 64): FASTER})
    a, w, s, t = torch.zeros(32, 64).to(E4), torch.zeros(48, 64).to(E4), torch.ones(()), torch.ones(())
    found = inductor_ext.explain(one, a, w, s, t)
    assert found.counts() == {"scaled_mm": 1} and "stream" not in found.graphs[0].after


def test_inductor_autotunes_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(48, 64): FASTER})
    with fake_cuda_inputs(), FakeTensorMode(), torch._inductor.config.patch(max_autotune_gemm=True):
        assert inductor_ext.explain(one, *tensorwise()).refusals[0].reason == "left to Inductor's autotuner"
        assert inductor_ext.explain(one, *tensorwise(), rules={"scaled_mm": "always"}).counts() == {"scaled_mm": 1}


def _dynamic(m: int = 40) -> tuple[Any, ...]:
    a, w, s, t = tensorwise(m)
    torch._dynamo.mark_dynamic(a, 0)
    return a, w, s, t


def test_a_dynamic_m_is_rewritten_if_some_m_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.use(monkeypatch, {(48, 64): SMALL})
    found = explained(one, _dynamic, dynamic=None)
    (event,) = found.rewrites
    assert event.detail == tables.STREAM and event.why.endswith("; M is known at run time, which then chooses")
    assert re.search(r"bfloat16\[s\d+, 48\]", found.graphs[0].after)
    tables.use(monkeypatch, {(48, 64): SLOWER})
    found = explained(one, _dynamic, dynamic=None)
    assert found.rewrites == [] and found.refusals[0].reason == "PyTorch's own operator is faster here"


def test_a_dynamic_m_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between 100 and 200 rows ours is slower, whatever it is elsewhere."""
    tables.use(monkeypatch, {(48, 64): SMALL})

    def make() -> tuple[Any, ...]:
        a, w, s, t = tensorwise(128)
        torch._dynamo.mark_dynamic(a, 0, min=100, max=200)
        return a, w, s, t

    assert explained(one, make, dynamic=None).rewrites == []


def test_dynamic_k_and_n_are_refused() -> None:
    found = explained(one, tensorwise, dynamic=True, scaled_mm="always")
    assert [each.reason for each in found.refusals if each.rule == "scaled_mm"] == ["K or N is symbolic"]


@pytest.mark.parametrize("recipe", [ScalingType.TensorWise, ScalingType.RowWise])
def test_functional_scaled_mm_is_rewritten(recipe: Any) -> None:
    def v2(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
        return scaled_mm(a, w.t(), s, recipe, t, recipe)

    shapes = ((), ()) if recipe is ScalingType.TensorWise else ((32, 1), (48, 1))
    found = explained(v2, lambda: (empty(32, 64), empty(48, 64), *(scale(*shape) for shape in shapes)), scaled_mm="always")
    assert found.counts() == {"scaled_mm": 1} and "_scaled_mm_v2" not in found.graphs[0].after


def test_swizzled_mx_scales_are_refused() -> None:
    def mx(a: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
        kind, swizzle = ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4
        return scaled_mm(a, w.t(), s, kind, t, kind, swizzle_a=swizzle, swizzle_b=swizzle)

    def make() -> tuple[Any, ...]:
        scales = (empty(rows * 256 // 32, dtype=torch.float8_e8m0fnu) for rows in (256, 512))
        return empty(256, 256), empty(512, 256), *scales

    found = explained(mx, make, scaled_mm="always")
    assert [each.reason for each in found.refusals] == ["scale layout"]


def test_what_older_versions_lack_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import trace_rules

    allowed: list[Any] = []
    monkeypatch.setattr(torch._dynamo, "allow_in_graph", allowed.append)
    monkeypatch.delitem(trace_rules.torch_c_binding_in_graph_functions, "torch._scaled_mm_v2")
    added = torch_compat.trace_scaled_mm_v2.__wrapped__()
    assert "trace rule of _scaled_mm_v2" in added and torch._scaled_mm_v2 in allowed


@pytest.mark.parametrize(
    ("a", "b", "shape"),
    [((8, 32), (4, 32, 64), (8, 64)), ((8, 32), (32, 64), (4, 8, 64)), ((4, 8, 32), (4, 32, 64), (4, 8, 64))],
)
def test_meta_of_the_grouped_product(a: Any, b: Any, shape: Any) -> None:
    offs = torch.empty(4, dtype=torch.int32, device="meta")
    one, two = (torch.empty(size, dtype=E4, device="meta") for size in (a, b))
    found = torch_compat._meta_scaled_grouped_mm_v2(one, two, [], [], [], [], [], [], offs)
    assert found.shape == shape and found.dtype is BF16


@pytest.mark.parametrize("operand", ["scale_a", "bias"])
def test_verify_names_the_rule_when_it_loses_an_operand(monkeypatch: pytest.MonkeyPatch, operand: str) -> None:
    """The rule promises no bytes, but a product without its bias, or with another scale, is not the product."""
    insert = scaled_plan.Plan.insert

    def wrong(plan: scaled_plan.Plan, graph: Graph) -> Node:
        (product,) = plan.products
        changed = {"scale_a": product.scale_b} if operand == "scale_a" else {"bias": None}
        return insert(dataclasses.replace(plan, products=(dataclasses.replace(product, **changed),)), graph)

    def biased(a: Any, w: Any, s: Any, t: Any, b: Any) -> torch.Tensor:
        return torch._scaled_mm(a, w.t(), s, t, bias=b, out_dtype=BF16)

    a, w = torch.randn(32, 64).to(E4), torch.randn(48, 64).to(E4)
    inputs = a, w, torch.tensor(0.5), torch.tensor(0.25), torch.ones(48, dtype=BF16)
    right = inductor_ext.verify(biased, *inputs, rules={"scaled_mm": "always"}, end_to_end=False)
    assert right.ok and right.checks[0].rewrites == 1
    monkeypatch.setattr(scaled_plan.Plan, "insert", wrong)
    found = inductor_ext.verify(biased, *inputs, rules={"scaled_mm": "always"}, end_to_end=False)
    assert found.differs == ["scaled_mm"] and found.checks[0].distance > 0.1


# ---- b read before the kernel ahead ends -----------------------------------------------------------------------------


def _static_b(fn: Any, make: Any) -> bool:
    (graph,) = explained(fn, make, scaled_mm="always").graphs
    (line,) = [line for line in graph.after.splitlines() if "inductor_ext.scaled_mm" in line]
    found = re.search(r"torch.bfloat16, (?:True|False), (True|False), ", line)
    assert found is not None
    return found[1] == "True"


def _inputs() -> tuple[Any, ...]:
    return empty(32, 64, dtype=BF16), empty(48, 64), scale(), scale()


def test_static_b_when_a_kernel_of_this_graph_lies_between() -> None:
    assert _static_b(lambda x, w, s, t: one(quantise(x, s), w, s, t), _inputs)
    assert _static_b(lambda x, w, s, t: one(quantise(torch.sin(x), s)[:16], w[:32], s, t), _inputs)


@pytest.mark.parametrize("rule", ["fp8_quantize", "none"])
def test_static_b_behind_a_dynamic_scale(rule: str) -> None:
    def dynamic(x: Any, w: Any, s: Any, t: Any) -> torch.Tensor:
        scale = x.abs().amax().float() / 448.0
        return one(quantise(x, scale), w, scale, t)

    assert _static_b(dynamic, _inputs)


UNSURE: dict[str, tuple[Any, Any]] = {
    "a_is_an_input": (one, tensorwise),
    "a_is_a_view_of_an_input": (lambda a, w, s, t: one(a.view(E4).view(32, 64), w, s, t), lambda: (
        empty(64, 32, dtype=torch.int8), *tensorwise()[1:])),
    "b_is_a_copy_by_reshape": (
        lambda x, w, s, t: one(quantise(x, s), w.permute(1, 0, 2).reshape(48, 64), s, t),
        lambda: (empty(32, 64, dtype=BF16), empty(8, 6, 64), scale(), scale()),
    ),
    "a_is_a_copy_of_an_input": (lambda a, w, s, t: one(a.clone(), w, s, t), tensorwise),
    "b_is_computed": (lambda x, w, s, t: one(quantise(x, s), quantise(w, t), s, t), lambda: (
        empty(32, 64, dtype=BF16), empty(48, 64, dtype=BF16), scale(), scale())),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSURE)
def test_not_static_b_when_unsure(name: str) -> None:
    assert not _static_b(*UNSURE[name])
