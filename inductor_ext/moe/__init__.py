"""Mixtures of experts: quantising their weights, explicitly (`quantize_moe_`), and the tensor that holds them."""

from __future__ import annotations

from inductor_ext.moe.quantize import MoEReport, quantize_moe_
from inductor_ext.moe.weight import MXFP8Weight

__all__ = ["MXFP8Weight", "MoEReport", "quantize_moe_"]
