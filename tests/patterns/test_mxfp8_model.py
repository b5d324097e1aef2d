"""Mixtures of experts whose weights `quantize_moe_` has quantised, through the backend: whole models, any number of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inductor_ext
from inductor_ext import MXFP8Weight, torch_compat
from inductor_ext.patterns import mxfp8_scaled_grouped_mm as scaled
from tests.support.compiled import run_compiled
from tests.support.equal import assert_same_bytes
from tests.support.moe import mixtral, qwen3_moe, tokens

ALWAYS = {"mxfp8_grouped_mm": "always"}
MODELS = pytest.mark.parametrize(("make", "activations"), [(qwen3_moe, "bf16"), (mixtral, "mxfp8"), (qwen3_moe, "fp8")])
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # transformers'


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


@MODELS
@torch.no_grad()
def test_a_hugging_face_model(make: Any, activations: str, record_property: Any) -> None:
    """All four products of two layers; as far from eager as Inductor's own code is. Cosine to bf16: in the report."""
    model, ids = Logits(make()), tokens()
    bf16 = model(ids)
    inductor_ext.quantize_moe_(model, activations=activations, show=False)
    eager = model(ids)
    (ours, *_), recorder = run_compiled(model, (ids,))
    (stock, *_), _ = run_compiled(model, (ids,), rules={"mxfp8_grouped_mm": "off"})
    assert recorder.counts()["mxfp8_grouped_mm"] == 4
    (graph,) = recorder.reports
    assert "_grouped_mm.default" not in graph.after.replace("inductor_ext.mxfp8_grouped_mm.default", "")
    quantisations = ("mxfp8_quantize", "fp8_quantize", "act_mul_quantize", "rms_norm_quantize")  # of their own, or with x
    found = sum(graph.after.count(f"inductor_ext.{name}.default(") for name in quantisations)
    # Rows with a scale each are quantised with the gather before them, by Inductor.
    assert found == {"bf16": 0, "fp8": 2, "mxfp8": 4}[activations]
    assert "mxfp8_round" not in graph.after
    assert distance(ours, eager) <= 2 * distance(stock, eager) + 1e-2, "a quantisation enlarges what another rounding did"
    near = cosine(ours, bf16)
    record_property("cosine to bf16", near)
    assert near > 0.95, "a router of random weights changes its mind easily"
    assert near == pytest.approx(cosine(eager, bf16), abs=2e-3), "compiling costs nothing that quantising has not"


@MODELS
@torch.no_grad()
def test_explain_and_verify(make: Any, activations: str) -> None:
    model, ids = Logits(make()), tokens()
    inductor_ext.quantize_moe_(model, activations=activations, show=False)
    found = inductor_ext.explain(model, ids)
    assert found.counts()["mxfp8_grouped_mm"] == 4
    events = [event for event in found.rewrites if event.rule == "mxfp8_grouped_mm"]
    assert all("moe.py" in event.source and "experts" in event.module for event in events), events
    checked = inductor_ext.verify(model, ids, end_to_end=False)
    assert checked.ok and [check.rewrites for check in checked.checks if check.rule == "mxfp8_grouped_mm"] == [4]


@torch.no_grad()
def test_a_bf16_model_stays_bf16() -> None:
    model, ids = Logits(qwen3_moe()), tokens()
    found = inductor_ext.explain(model, ids, rules=ALWAYS)
    assert "mxfp8_grouped_mm" not in found.counts() and "float8" not in found.graphs[0].after
    reasons = [each for each in found.refusals if each.rule == "mxfp8_grouped_mm"]
    assert [each.reason for each in reasons] == ["the weight is not quantised"] * 4
    assert all("inductor_ext.quantize_moe_(model)" in each.wanted for each in reasons)


# ---- sizes ----------------------------------------------------------------------------------------------------------------


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = MXFP8Weight.quantize(torch.randn(4, 48, 64).bfloat16())
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, self.weight.transpose(-2, -1), offs)


def test_any_number_of_rows_in_one_graph() -> None:
    experts, compiles = Experts(), []
    backend = inductor_ext.backend(rules=ALWAYS)

    def counted(*args: Any, **options: Any) -> Any:
        compiles.append(1)
        return backend(*args, **options)

    compiled = torch.compile(experts, backend=counted, dynamic=True)
    for rows, ends in ((12, [3, 3, 10, 12]), (7, [0, 7, 7, 7]), (300, [1, 2, 3, 300])):
        x, offs = torch.randn(rows, 64).bfloat16(), torch.tensor(ends, dtype=torch.int32)
        assert distance(compiled(x, offs), experts(x, offs)) < 1e-2
    assert len(compiles) == 1


def test_gradients_pass_through() -> None:
    """To x, by autograd's own formula for grouped products, compiled as eager."""
    experts, offs = Experts(), torch.tensor([3, 3, 10, 12], dtype=torch.int32)
    x, upstream = torch.randn(12, 64).bfloat16(), torch.randn(12, 48).bfloat16()
    grads = []
    for run in (experts, torch.compile(experts, backend=inductor_ext.backend(rules=ALWAYS))):
        leaf = x.clone().requires_grad_()
        run(leaf, offs).backward(upstream)
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert distance(grads[1], grads[0]) < 1e-2


def test_rows_of_no_group() -> None:
    experts, x, offs = Experts(), torch.randn(12, 64).bfloat16(), torch.tensor([3, 3, 5, 9], dtype=torch.int32)
    x[9:] = float("nan")
    (found, *_), recorder = run_compiled(experts, (x, offs))
    assert recorder.counts() == {"mxfp8_grouped_mm": 1}
    weight = experts.weight
    wanted = torch.ops.inductor_ext.mxfp8_grouped_mm(x, None, weight._data, weight._scale, offs, torch.bfloat16, False, 32)
    assert_same_bytes(found[:9], wanted[:9])


def test_rows_counted_on_the_device() -> None:
    """As many rows as data say: an all-to-all of expert parallelism gives such."""

    class Kept(Experts):
        def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
            return super().forward(x[x[:, 0] > 0], offs)

    experts, x = Kept(), torch.randn(40, 64).bfloat16()
    kept = int((x[:, 0] > 0).sum())
    offs = torch.tensor([1, 4, 4, kept], dtype=torch.int32)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (found, *_), recorder = run_compiled(experts, (x, offs))
    assert recorder.counts() == {"mxfp8_grouped_mm": 1}
    assert distance(found, experts(x, offs)) < 1e-2


# ---- GPUs on which PyTorch's MXFP8 kernel loses the CUDA context ----------------------------------------------------------


def test_explain_and_verify_run_no_kernel_that_loses_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock graph runs on dequantised operands there; here a CPU plays the GPU, and PyTorch's operator the mine."""
    torch_compat.trace_scaled_mm_v2()
    monkeypatch.setattr(torch_compat, "loses_context", lambda device: True)
    inside = []
    plain = torch_compat._plain_scaled_grouped_mm_v2
    monkeypatch.setattr(
        torch_compat, "_plain_scaled_grouped_mm_v2", lambda *args, **kwargs: inside.append(1) or plain(*args, **kwargs)
    )
    inputs = scaled._inputs("cpu")
    assert inductor_ext.explain(scaled._product, *inputs).counts() == {"mxfp8_scaled_grouped_mm": 1}
    assert len(inside) == 1
    assert inductor_ext.verify(scaled._product, *inputs, end_to_end=False).ok
    assert len(inside) == 4, "the graph before the rule, run whole and for the rewrite, and the one whose result is returned"


def test_which_gpus_those_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, lost in (((8, 9), False), ((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert torch_compat.loses_context(torch.device("cuda")) is lost
    assert not torch_compat.loses_context(torch.device("cpu"))
