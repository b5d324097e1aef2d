"""Columns that were written in place: what reads them afterwards, with stores into inputs left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.nearly import E4, check, reasons, refused

N = 16


def made(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def test_a_store_into_an_input_stays() -> None:
    def fn(x: Any) -> Any:
        x[:, 4:8] = x[:, :4] * 2
        return x[:, 4:6] + x[:, 8:10]

    found = check("written_columns", fn, made(9, N), count=0)
    assert reasons(found, "written_columns") == []


#: What is read, and how many versions of the buffer go.
READS: dict[str, tuple[Any, int]] = {
    "written": (lambda b: b[:, 4:8], 1),
    "some_written": (lambda b: b[:, 5:7], 1),
    "before": (lambda b: b[:, :4], 1),
    "behind": (lambda b: b[:, 8:], 1),
    "by_split": (lambda b: torch.cat(b.split([4, 4, 8], 1)[::-1], 1), 1),
    "by_chunks": (lambda b: torch.cat(b.chunk(4, 1)[1:3], 1), 1),
    "across_the_begin": (lambda b: b[:, 3:5] + b[:, 4:6], 0),
    "across_the_end": (lambda b: b[:, 7:9] + b[:, 4:6], 0),
    "all": (lambda b: b + b[:, 4:5], 0),
    "rows": (lambda b: b[2:4].sum() + b[:, 4:6], 0),
    "every_other": (lambda b: b[:, 4:8:2] + b[:, 4:6], 0),
    "split_rows": (lambda b: b.split(3)[0].sum() + b[:, 4:6], 0),
    "split_across": (lambda b: b.split(6, 1)[1][:, :2] + b[:, 4:6], 0),
}


@pytest.mark.parametrize("name", list(READS))
def test_what_is_read_of_a_buffer_that_was_written(name: str) -> None:
    read, count = READS[name]

    def fn(x: Any, y: Any) -> Any:
        return read(torch.slice_scatter(x @ x.t(), y, 1, 4, 8)) * 2

    found = check("written_columns", fn, made(N, N), made(N, 4), count=count)
    assert count or reasons(found, "written_columns") == ["written columns are read together with others"]


@pytest.mark.parametrize("way", ["every_other", "none"])
def test_scatters_that_are_no_columns(way: str) -> None:
    def fn(x: Any, y: Any) -> Any:
        b = x @ x.t()
        if way == "every_other":
            b = torch.slice_scatter(b, y, 1, 4, 12, 2)
        else:
            b = torch.slice_scatter(b, y[:, :0], 1, 4, 4)
        return b[:, 4:8] * 2

    check("written_columns", fn, made(N, N), made(N, 4), count=0)


def test_the_last_of_two_writes_counts() -> None:
    def fn(x: Any, y: Any) -> Any:
        b = torch.slice_scatter(x @ x.t(), y, 1, 4, 8)
        b = torch.slice_scatter(b, y * 3, 1, 4, 8)
        return b[:, 4:8] + b[:, :4]

    check("written_columns", fn, made(N, N), made(N, 4), count=2)


def test_a_column_that_the_caller_gets_keeps_its_memory() -> None:
    def fn(x: Any, y: Any) -> Any:
        k = torch.slice_scatter(x @ x.t(), y, 1, 4, 8)[:, 4:8]
        return k, k * 2

    refused("written_columns", fn, made(N, N), made(N, 4), reason="the buffer that is written is returned")


def test_k_and_v_divided_in_place_are_one_store() -> None:
    """SGLang's ``set_kv_buffer``, without a clamp, into a pool of bytes."""

    def fn(x: Any, w: Any, ks: Any, vs: Any, kc: Any, vc: Any, at: Any) -> None:
        _, k, v = (x @ w).split([64, 32, 32], -1)
        k, v = k.view(-1, 2, 16), v.view(-1, 2, 16)
        k.div_(ks)
        v.div_(vs)
        kc[at] = k.to(E4).view(torch.uint8)
        vc[at] = v.to(E4).view(torch.uint8)

    x, w = made(9, 32).bfloat16() * 9, made(32, 128).bfloat16()
    pools = [torch.zeros(40, 2, 16, dtype=torch.uint8) for _ in range(2)]
    found = check("downcast_fp8", fn, x, w, torch.tensor(0.5), torch.tensor(2.0), *pools, torch.randperm(40)[:9], count=1)
    assert [each.differing for each in found.checks if each.rule == "downcast_fp8"] == [0]
