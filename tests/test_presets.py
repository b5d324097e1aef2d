"""What ``inductor-ext build --preset qwen3`` builds is what a Qwen3 model quantised by torchao's recipes asks for."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inductor_ext
from inductor_ext import jit, registry
from tests.patterns.test_scaled_mm_model import Linear
from tests.support.fakegpu import fake_cuda_inputs
from tests.support.products import E4

ARCH = "sm_90a"


class StaticLinear(Linear):
    """torchao's static FP8 linear layer: its input's scale is a buffer of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, rows=False)
        self.register_buffer("input_scale", torch.ones(1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = (x.float() / self.input_scale).clamp(-448.0, 448.0).to(E4).reshape(-1, x.shape[-1])
        scales = self.input_scale.reshape(1, 1), self.scale
        out = torch._scaled_mm(q, self.weight.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
        return out.reshape(*x.shape[:-1], -1)


def qwen3(recipe: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=128, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                sizes = child.in_features, child.out_features
                made = StaticLinear(*sizes) if recipe == "static" else Linear(*sizes, rows=recipe == "rowwise")
                setattr(module, name, made)
    return model


@pytest.mark.parametrize("tokens", [(1, 16), (14, 512)], ids=str)
@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise", "static"])
def test_qwen3_needs_no_other_kernel(monkeypatch: pytest.MonkeyPatch, recipe: str, tokens: tuple[int, int]) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_ARCH", ARCH)
    torch._dynamo.reset()
    fakes = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with fake_cuda_inputs(), fakes, torch.device("cuda"), torch.no_grad():
        found = inductor_ext.explain(qwen3(recipe), torch.zeros(tokens, dtype=torch.long))
    (report,) = found.graphs
    needed = {jit.JitSpec.from_dict(kernel) for kernel in report.kernels}
    # With static scales gate and up have an input each: calibrated apart.
    activation = "scaled_mm_act_mul" if tokens == (14, 512) and recipe != "static" else "act_mul_quantize"
    assert {spec.name for spec in needed} >= {"scaled_mm", activation, "qk_norm_rope"}
    ops = [op for op in registry.ops() if op.name in registry.PRESETS["qwen3"]]
    built = {spec for op in ops for spec in op.examples(ARCH, "qwen3")}
    missing = [spec.describe() for spec in needed - built]
    assert not missing, missing
