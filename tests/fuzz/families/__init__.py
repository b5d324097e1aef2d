"""Every family: its name, and what draws a program of it."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.builder import Builder
from tests.fuzz.families import attention, cache, moe, product, quantise

FAMILIES: dict[str, Callable[[Builder], None]] = {
    made.__name__: made
    for made in (
        quantise.fp8_downcast,
        quantise.fp8_quantize,
        quantise.quantize_once,
        quantise.rms_norm_quantize,
        quantise.norm_quantize,
        quantise.act_mul_quantize,
        quantise.act_quantize,
        quantise.act_cat_quantize,
        cache.downcast_fp8,
        cache.qk_norm_rope,
        cache.qk_norm_rope_store,
        product.scaled_mm,
        product.scaled_mm_add,
        product.scaled_mm_act_mul,
        product.scaled_mm_siblings,
        product.scaled_mm_cat,
        product.scaled_mm_rope,
        attention.causal_attention,
        attention.grouped_queries,
        attention.prefill_only,
        moe.moe_combine,
        moe.moe_scatter,
        moe.moe_masks,
        moe.mxfp8_grouped_mm,
        moe.mxfp8_scaled_grouped_mm,
    )
}
