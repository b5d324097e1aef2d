"""``attn_implementation="inductor_ext"`` for transformers models: packed sequences without a mask.

    import inductor_ext.integrations.transformers
    model = AutoModel.from_pretrained(name, attn_implementation="inductor_ext")
    model(input_ids=[1, T], position_ids=[1, T], cu_seq_lens_q=[N + 1], max_length_q=longest)

With ``cu_seq_lens_q``, the keyword that transformers' flash attention takes too, attention is `varlen_attention` over the
packed sequences. The mask that the model makes of ``position_ids`` is not read then, so that a compiled graph does not compute
it (eagerly it is computed in vain); as with transformers' flash attention, a mask function of one's own is not applied.
``max_length_q`` saves work where it is less than T. Rows past the last end come out zero; ``padded=False``, passed to the model
too, says that there are none and saves a memset a layer. A compiled model takes any T and number of sequences where these are
dynamic (``torch.compile(…, dynamic=True)``).

Without it, attention is transformers' "sdpa", mask and all: batches, padding, caches. In a compiled graph the rule
`causal_attention` drops masks of positions; where ``position_ids`` restart and there is no ``cu_seq_lens_q``, the result is
right and the mask stays.

transformers has no plugin entry point: this module registers when it is imported.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "inductor_ext"


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[B, heads, S, D] → [B, S, heads, D], as transformers' attention functions do."""
    if kwargs.get("cu_seq_lens_q") is not None:
        return _packed(module, query, key, value, dropout, scaling, **kwargs), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k", "padded"):
        kwargs.pop(name, None)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    padded: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    _check(query, key, value, dropout, sliding_window, causal, kwargs)
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    total = rows[0].shape[0]
    longest = total if max_length_q is None else max_length_q
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    left = -1 if sliding_window is None else sliding_window - 1
    out = torch.ops.inductor_ext.varlen_attention(
        *rows, cu_seq_lens_q.to(torch.int32), longest, scale, left, 0 if causal else -1, softcap or 0.0, padded, ""
    )
    return out.view(query.shape[0], query.shape[2], *out.shape[1:])


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    sliding_window: int | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> None:
    """ValueError for what packed attention here does not do."""
    if dropout:
        raise ValueError(f'attn_implementation="inductor_ext": dropout: wanted 0 with cu_seq_lens_q, found {dropout}')
    if kwargs.get("s_aux") is not None:
        raise ValueError('attn_implementation="inductor_ext": s_aux: wanted no attention sinks with cu_seq_lens_q, found some')
    if sliding_window is not None and not causal:
        wanted = "causal attention where there is a sliding window"
        raise ValueError(f'attn_implementation="inductor_ext": is_causal: wanted {wanted}, found False')
    if key.shape[2] != query.shape[2]:
        found = f"{key.shape[2]} keys for {query.shape[2]} queries"
        raise ValueError(f'attn_implementation="inductor_ext": cu_seq_lens_q: wanted no tokens in the cache, found {found}')
    if value.shape[-1] != query.shape[-1]:
        found = f"heads of {value.shape[-1]} beside {query.shape[-1]}"
        raise ValueError(f'attn_implementation="inductor_ext": value: wanted heads as wide as the query\'s, found {found}')


def register() -> None:
    """Make the name known to transformers; once is enough, again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from inductor_ext import registry

    registry.ops()  # defines the operators
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()
