"""A model's linear layers in FP8 (e4m3), in place, by one of three recipes.

    row      one dynamic scale a row of the activation, one a row of the weight      torchao's PerRow
    tensor   one dynamic scale for the activation, one for the weight                torchao's PerTensor
    static   one fixed scale for the activation, measured on the benchmark's batch   torchao's observers, PerTensor
    none     the linear layers stay as they are

torchao does it where it can: row and tensor need a GPU, static is a prototype of its. Elsewhere linear layers of torch
operators with torchao's arithmetic take their place, and the answer says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from inductor_ext.bench.library import BenchError
from inductor_ext.demo import E4M3, Fp8Linear, quiet, scaled_mm_works

RECIPES = ("row", "tensor", "static", "none")

Calibrate = Callable[[torch.nn.Module], Any]


def quantize(build: Callable[[], torch.nn.Module], recipe: str, run: Calibrate, device: str) -> tuple[torch.nn.Module, str]:
    """A model of ``build()`` with its linear layers quantised, and how that was done.

    ``run(model)`` runs the benchmark's batch: it calibrates static scales, and shows that torchao's layers work here. A
    model that torchao has spoilt before it failed is built again.
    """
    if recipe == "none":
        return build(), "bf16, not quantised"
    try:
        model = build()
        how = _torchao(model, recipe, run, device)
        run(model)
        return model, how
    except Exception as error:  # whatever a version of torchao dislikes about a version of torch, or about this machine
        if device == "cuda" and isinstance(error, (ImportError, torch.OutOfMemoryError)):
            raise BenchError(f"FP8 by torchao: {type(error).__name__}: {error}") from error
        reason = f"torchao refused: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    model = build()
    _replace(model, recipe, run)
    return model, f"FP8 {recipe}, torchao's arithmetic in torch operators ({reason})"


def _torchao(model: torch.nn.Module, recipe: str, run: Calibrate, device: str) -> str:
    with quiet("torchao", "torch.utils._pytree"):
        import torchao
        from torchao import quantization as ao
    if recipe == "static":
        ao.quantize_(model, ao.Float8StaticActivationFloat8WeightConfig(step="prepare", granularity=ao.PerTensor()))
        run(model)
        convert = ao.Float8StaticActivationFloat8WeightConfig(step="convert", granularity=ao.PerTensor())
        ao.quantize_(model, convert, filter_fn=lambda module, _: hasattr(module, "input_act_obs"))
    else:
        granularity = ao.PerRow() if recipe == "row" else ao.PerTensor()
        ao.quantize_(model, ao.Float8DynamicActivationFloat8WeightConfig(granularity=granularity))
    return f"FP8 {recipe} by torchao {torchao.__version__}"


class Fp8TensorLinear(torch.nn.Module):
    """A linear layer in FP8 with one scale for its input, fixed if ``amax`` is given, and one for its weight.

    ``amax / 448`` is taken in the input's dtype, as torchao's dynamic scale is; the scale is fp32 from there on.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, linear: torch.nn.Linear, amax: torch.Tensor | None = None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = tensor_scale(weight)
        self.register_buffer("weight", to_fp8(weight, scale))
        self.register_buffer("scale", scale)
        self.register_buffer("input_scale", None if amax is None else (amax / 448.0).float())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.scaled_mm = scaled_mm_works(weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = tensor_scale(x) if self.input_scale is None else self.input_scale
        rows = to_fp8(x, scale).view(-1, x.shape[-1])
        if self.scaled_mm:
            out = torch._scaled_mm(rows, self.weight.t(), scale, self.scale, out_dtype=x.dtype, use_fast_accum=True)
        else:
            out = ((rows.float() * scale) @ (self.weight.float() * self.scale).t()).to(x.dtype)
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def tensor_scale(x: torch.Tensor) -> torch.Tensor:
    return (x.abs().amax() / 448.0).float()


def to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-448.0, 448.0).to(E4M3)


def _replace(model: torch.nn.Module, recipe: str, run: Calibrate) -> None:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    amax = _observe(model, linears, run) if recipe == "static" else {}
    for name, linear in linears.items():
        made = Fp8Linear(linear) if recipe == "row" else Fp8TensorLinear(linear, amax.get(name))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)


def _observe(model: torch.nn.Module, linears: dict[str, torch.nn.Linear], run: Calibrate) -> dict[str, torch.Tensor]:
    """The largest absolute input of each linear layer in one run."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[name] = args[0].abs().amax()

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    run(model)
    for handle in handles:
        handle.remove()
    return found
