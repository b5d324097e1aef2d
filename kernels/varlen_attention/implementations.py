"""The libraries that can run `varlen_attention`, fastest first, and which of them a call takes.

    found, why = choose(Problem(dtype, head_dim, …))    found.name: "flash_attn_4", "cudnn", …; why: what faster ones lack

This package's own kernel for compute capability 9.0, flash-attn 4 (``flash_attn.cute``), flash-attn 3
(``flash_attn_interface``), cuDNN through torch, flash-attn 2 (``flash_attn``) and torch's own flash attention.
``benchmarks/kernels/attention.py`` measures all that are installed. Only flash-attn 4, torch from 2.13 on, and the own kernel
write into a buffer they are given; the result of the others is copied. Two are no functions here: cuDNN, for which a rule
emits PyTorch's own operator, which Inductor calls without a copy, and the own kernel, which the op runs itself (``op.py``).

Nothing is imported before a call on a GPU asks for it. A library that cannot be imported, or fails at its first call, costs
one warning, and the next one is taken.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch

log = logging.getLogger("inductor_ext")

#: ``run(q, k, v, cu_seqlens, max_seqlen, scale, left, right, softcap, out)`` fills ``out``.
Run = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What decides between libraries. ``left`` and ``right`` are the op's; ``packed``: there are ``cu_seqlens``; ``length``:
    the tokens of a sequence, 0 if not known."""

    dtype: torch.dtype
    head_dim: int
    left: int
    right: int
    softcap: bool
    packed: bool
    capability: tuple[int, int]
    length: int = 0
    scale: float = 1.0

    @property
    def windowed(self) -> bool:
        return self.left >= 0 or self.right > 0


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One library. ``module`` is what has to be importable ("" for torch); ``load(module)`` gives its `Run`, None for one that
    is not ``called`` as a library; ``lacks(problem)`` says what it cannot do, "" if it can."""

    name: str
    title: str
    module: str
    distribution: str
    load: Callable[[Any], Run] | None
    lacks: Callable[[Problem], str]
    called: Literal["as a library", "by a rule", "as a kernel"] = "as a library"


def choose(
    problem: Problem,
    *,
    known: tuple[str, ...] = (),
    called: tuple[str, ...] = ("as a library", "by a rule", "as a kernel"),
) -> tuple[Implementation | None, str]:
    """The first implementation that is there and can do it, and what those before it lack.

    ``known``: names of what the graph calls already, so need not be looked for. ``called``: the ways in which it may be.
    """
    reasons: list[str] = []
    for each in sorted(IMPLEMENTATIONS, key=lambda each: not _leads(each, problem)):
        if each.called not in called:
            continue
        lacks = missing(each, problem, known)
        if not lacks:
            return each, "; ".join(reasons)
        reasons.append(f"{each.title}: {lacks}")
    return None, "; ".join(reasons)


#: Up to here cuDNN is ahead of flash-attn 4 on batches. On an H200, causal, 16 and 8 heads of 128, 7168 tokens in all: 29 and
#: 52 µs in sequences of 128, 48 and 60 of 512, 75 and 81 of 1024, 427 and 349 in one. The own kernel takes 27, 42, 65 and 375.
CUDNN_LENGTH = 2048


def _leads(each: Implementation, problem: Problem) -> bool:
    if each.name == "hopper":  # 39 µs where cuDNN takes 37: 14 full sequences of 512, 12 heads of 64
        full = problem.left < 0 and problem.right < 0
        return not (full and problem.head_dim == 64 and not problem.packed)
    return each.name == "cudnn" and 0 < problem.length <= CUDNN_LENGTH


def missing(each: Implementation, problem: Problem, known: tuple[str, ...] = ()) -> str:
    """What keeps an implementation from a problem: what it cannot do, or that it is not there."""
    return each.lacks(problem) or ("" if each.name in known else _absent(each))


@functools.cache
def _absent(each: Implementation) -> str:
    if each.name in _broken:
        return f"failed: {_broken[each.name]}"
    if each.name == "cudnn":
        return "" if torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled() else "not available"
    if not each.module:
        return ""
    try:
        importlib.import_module(each.module)
    except ModuleNotFoundError as error:
        if error.name and each.module.startswith(error.name):
            return "not installed"
        return f"cannot be imported: {error}"
    except Exception as error:  # a compiled extension for another torch raises whatever its loader does
        log.warning("varlen_attention: %s is installed and cannot be imported: %s", each.title, error)
        return f"cannot be imported: {error}"
    return ""


_broken: dict[str, str] = {}  # name → what it failed with at its first call


def broken(name: str, error: Exception) -> None:
    """Do without an implementation from now on."""
    title = next(each.title for each in IMPLEMENTATIONS if each.name == name)
    log.warning("varlen_attention: %s failed and is not used any more: %s", title, error)
    _broken[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    _absent.cache_clear()


def named(name: str) -> Implementation | None:
    return next((each for each in IMPLEMENTATIONS if each.name == name), None)


def versions() -> tuple[str, ...]:
    """What is installed, for cache keys: a graph compiled without a library must not be served once it is there."""
    found = []
    for each in IMPLEMENTATIONS:
        if each.distribution:
            try:
                found.append(f"{each.distribution} {importlib.metadata.version(each.distribution)}")
            except importlib.metadata.PackageNotFoundError:
                continue
    return tuple(found)


# ---- what each can do ------------------------------------------------------------------------------------------------


def _lacks(
    problem: Problem, least: tuple[int, int], multiple: int, most: int = 256, packed: bool = True, window: bool = True,
    softcap: bool = True, before: tuple[int, int] = (99, 0),
) -> str:  # fmt: skip
    have = ".".join(map(str, problem.capability))
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"no {str(problem.dtype)[6:]}"
    if not least <= problem.capability < before:
        return f"not for compute capability {have}"
    if problem.head_dim % multiple or not 0 < problem.head_dim <= most:
        return f"no heads of {problem.head_dim}"
    if problem.packed and not packed:
        return "no packed sequences"
    if problem.windowed and not window:
        return "no window"
    if problem.softcap and not softcap:
        return "no softcap"
    return ""


def _lacks_cudnn(problem: Problem) -> str:
    return _lacks(problem, (9, 0), 8, most=128, packed=False, window=False, softcap=False)


#: What the own kernel (``hopper.cuh``) is compiled for.
HOPPER_HEADS = (64, 128)


def _lacks_hopper(problem: Problem) -> str:
    if problem.capability[0] == 9 and problem.head_dim not in HOPPER_HEADS:
        return f"no heads of {problem.head_dim}"
    if not problem.scale > 0:
        return f"no scale of {problem.scale}"
    return _lacks(problem, (9, 0), 64, softcap=False, before=(9, 1))


def _lacks_flash_4(problem: Problem) -> str:
    if problem.capability[0] == 10 and problem.head_dim > 128 and problem.head_dim != 256:
        return f"no heads of {problem.head_dim}"
    return _lacks(problem, (9, 0), 8)


# ---- how each is called ----------------------------------------------------------------------------------------------


def _window(left: int, right: int) -> tuple[bool, tuple[int, int]]:
    """Flash-attn's ``causal`` and ``window_size``: -1 is no bound, and causal alone takes the faster kernel."""
    causal = right == 0
    return causal and left < 0, (-1, -1) if causal and left < 0 else (left, right)


def _copy(found: torch.Tensor, cu_seqlens: torch.Tensor | None, padded: bool, out: torch.Tensor) -> None:
    """What a library has allocated, into ``out``; rows past the last sequence, which it never wrote, stay ``out``'s.

    Where the caller says that there are none, a plain copy: to tell those rows apart took 42 µs of [7168, 16, 128] bf16 on an
    H200, three launches.
    """
    if cu_seqlens is None or not padded:
        out.copy_(found)
        return
    inside = torch.arange(out.shape[0], device=out.device) < cu_seqlens[-1]
    torch.where(inside.view(-1, 1, 1), found, out, out=out)


def _load_flash_4(module: Any) -> Run:
    forward = importlib.import_module(f"{module.__name__}.interface")._flash_attn_fwd  # the public one takes no ``out``

    def run(
        q: Any, k: Any, v: Any, cu_seqlens: Any, max_seqlen: int, scale: float, left: int, right: int, softcap: float,
        padded: bool, out: Any,
    ) -> None:  # fmt: skip
        causal, window = _window(left, right)
        bounds = [None if bound < 0 else bound for bound in window]
        packed = {} if cu_seqlens is None else {
            "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen,
        }  # fmt: skip
        forward(
            q, k, v, softmax_scale=scale, causal=causal, window_size_left=bounds[0], window_size_right=bounds[1],
            softcap=softcap or None, out=out, **packed,
        )  # fmt: skip

    return run


def _load_flash(module: Any) -> Run:
    """flash-attn 2 and 3, which spell their public functions alike."""

    def run(
        q: Any, k: Any, v: Any, cu_seqlens: Any, max_seqlen: int, scale: float, left: int, right: int, softcap: float,
        padded: bool, out: Any,
    ) -> None:  # fmt: skip
        causal, window = _window(left, right)
        rest = {"softmax_scale": scale, "causal": causal, "window_size": window, "softcap": softcap}
        if cu_seqlens is None:
            found = module.flash_attn_func(q, k, v, **rest)
        else:
            lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            longest = {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
            found = module.flash_attn_varlen_func(q, k, v, **lengths, **longest, **rest)
        _copy(found[0] if isinstance(found, tuple) else found, cu_seqlens, padded, out)

    return run


def _load_torch(_: Any) -> Run:
    into = getattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace", None)  # from torch 2.13 on

    def run(
        q: Any, k: Any, v: Any, cu_seqlens: Any, max_seqlen: int, scale: float, left: int, right: int, softcap: float,
        padded: bool, out: Any,
    ) -> None:  # fmt: skip
        causal, window = _window(left, right)
        longest = max_seqlen if cu_seqlens is not None else q.shape[1]
        bounds = {} if window == (-1, -1) else {"window_size_left": window[0], "window_size_right": window[1]}
        args = (q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, causal, False)
        if into is not None:
            into(out, *args, scale=scale, **bounds)
        else:
            _copy(torch.ops.aten._flash_attention_forward(*args, scale=scale, **bounds)[0], cu_seqlens, padded, out)

    return run


IMPLEMENTATIONS = (
    Implementation("hopper", "this package's kernel", "", "", None, _lacks_hopper, "as a kernel"),
    Implementation("flash_attn_4", "flash-attn 4", "flash_attn.cute", "flash-attn-4", _load_flash_4, _lacks_flash_4),
    Implementation(
        "flash_attn_3",
        "flash-attn 3",
        "flash_attn_interface",
        "flash-attn-3",
        _load_flash,
        lambda problem: _lacks(problem, (9, 0), 8, before=(10, 0)),
    ),
    Implementation("cudnn", "cuDNN", "", "", None, _lacks_cudnn, "by a rule"),
    Implementation(
        "flash_attn_2", "flash-attn 2", "flash_attn", "flash-attn", _load_flash, lambda problem: _lacks(problem, (8, 0), 8)
    ),
    Implementation(
        "torch", "torch's flash attention", "", "", _load_torch, lambda problem: _lacks(problem, (8, 0), 8, softcap=False)
    ),
)
