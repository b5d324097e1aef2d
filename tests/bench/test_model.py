"""`bench model` itself, on a CPU: models, FP8 recipes, the processes of the sides, the command."""

from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from inductor_ext import registry
from inductor_ext.bench import families, quantize, sides
from inductor_ext.bench import model as models
from inductor_ext.bench.cache import decode_cache
from inductor_ext.bench.channel import Channel
from inductor_ext.bench.run import Plan, _cosines, run
from inductor_ext.bench.sides import Job, Side
from inductor_ext.bench.workload import Workload
from inductor_ext.cli import app
from inductor_ext.errors import SettingError

TINY = models.named("tiny", 1)[1]
WORK = Workload((8, 8))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


# ---- decoding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_decoded_token_sees_the_whole_cache_and_its_own_row() -> None:
    """Against the same model and an ordinary cache that holds the same rows, in fp32: FP8 rounds the token's own row alone."""
    transformers = pytest.importorskip("transformers")
    shape, items, context = TINY, 3, 16
    model = models.build(shape, "cpu", dtype=torch.float32)
    pool = decode_cache(shape, items, context, "cpu")
    plain = transformers.DynamicCache()
    for index, layer in enumerate(pool.layers):
        rows = [layer._read(each, torch.float32)[:, :, : context - 1] for each in (layer.keys, layer.values)]
        plain.update(*rows, index)
    inputs = Workload((1,) * items, context=context).inputs(shape.vocab, "cpu", 1)
    wanted = model(**inputs, past_key_values=plain, use_cache=True).last_hidden_state
    found = [model(**inputs, past_key_values=pool, use_cache=True).last_hidden_state for _ in range(2)]
    assert torch.equal(*found), "a step can be repeated"
    assert cosine(found[0], wanted) > 0.999
    assert not torch.equal(pool.layers[0].keys, decode_cache(shape, items, context, "cpu").layers[0].keys), "a row was stored"


def test_a_decoding_step_is_rewritten() -> None:
    """One token a sequence: [B, 1, C] tensors, whose middle stride says nothing about their rows."""
    work, ours = Workload((1,) * 3, context=16), sides.parse_sides("ours", {})
    result = run(Plan("tiny", TINY, work, ours, replays=1, rounds=1, cosine_inputs=0))
    (side,) = result["sides"]
    assert not side["error"], side["error"]
    expected = {"qk_norm_rope_store": 1, "rms_norm_quantize": 2, "act_mul_quantize": 1, "fp8_quantize": 1, "qk_norm_rope": None}
    assert {name: side["rewrites"].get(name) for name in expected} == expected
    assert result["workload"]["context"] == 16


# ---- models and recipes ----------------------------------------------------------------------------------------------


def test_names() -> None:
    assert models.named("qwen3-0.6b") == ("Qwen3-0.6B", models.MODELS["Qwen3-0.6B"])
    assert models.named("Llama-3.1-8B", 3)[1].layers == 3
    with pytest.raises(SettingError, match=r"--model: wanted one of Qwen3-0\.6B, .*, found 'gpt'"):
        models.named("gpt")


@pytest.mark.parametrize("name", models.MODELS)
def test_a_layer_has_the_products_that_the_floor_counts(name: str) -> None:
    """All matrices of a layer: what a second one adds."""
    pytest.importorskip("transformers")

    def matrices(layers: int) -> int:
        with torch.device("meta"):
            model = families.module(models.named(name, layers)[1], "sdpa", torch.bfloat16)
        named = ((name, each) for name, each in model.named_parameters() if "modulation" not in name)  # of a vector an item
        return sum(each.numel() for _, each in named if each.dim() > 1)

    wanted = sum(each.n * each.k * each.weights for each in families.linears(models.MODELS[name]))
    assert matrices(2) - matrices(1) == wanted


SMALL = {"hidden": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, "intermediate": 128, "layers": 1}


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "BERT-base", "SigLIP-so400m", "Whisper-large-encoder", "Flux-single"])
def test_a_step_of_every_kind_of_input(name: str) -> None:
    """A small model of each: one hidden state a position, in bf16, and one embedding an item."""
    pytest.importorskip("transformers")
    shape = dataclasses.replace(models.MODELS[name], **SMALL, vocab=128)
    if shape.positions:
        shape = dataclasses.replace(shape, positions=16)
    length = shape.positions or 8
    work = Workload((length,) * 3)
    if shape.kind.reads == "text":
        inputs = work.inputs(shape.vocab, "cpu", 1)
    else:
        inputs = families.inputs(shape, work.items, length, "cpu", 1)
    hidden = models.build(shape, "cpu")(**inputs).last_hidden_state
    assert hidden.shape == (3, length, 64) and hidden.dtype == torch.bfloat16 and bool(hidden.isfinite().all())
    assert work.embeddings(hidden, shape.kind.causal).shape == (3, 64)


@torch.no_grad()
def test_building_twice_gives_the_same_weights() -> None:
    pytest.importorskip("transformers")
    inputs = WORK.inputs(TINY.vocab, "cpu", 1)
    one, two = (models.build(TINY, "cpu")(**inputs).last_hidden_state for _ in range(2))
    assert torch.equal(one, two) and one.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("recipe", quantize.RECIPES)
def test_recipes_stay_near_bf16(recipe: str) -> None:
    pytest.importorskip("transformers")
    inputs = WORK.inputs(TINY.vocab, "cpu", 1)

    def call(model: torch.nn.Module) -> torch.Tensor:
        return model(**inputs).last_hidden_state

    wanted = call(models.build(TINY, "cpu"))
    model, how = quantize.quantize(lambda: models.build(TINY, "cpu"), recipe, call, "cpu")
    got = call(model)
    assert cosine(got, wanted) > 0.99
    assert torch.equal(got, wanted) == (recipe == "none")
    assert how.startswith("bf16" if recipe == "none" else f"FP8 {recipe}")


@torch.no_grad()
def test_tensor_linear_is_torchaos_arithmetic() -> None:
    linear = torch.nn.Linear(64, 32).bfloat16()
    x = torch.randn(2, 3, 64).bfloat16()
    for amax in (None, torch.tensor(3.0)):
        layer = quantize.Fp8TensorLinear(linear, amax)
        layer.scaled_mm = False
        scale = ((x.abs().amax() if amax is None else amax) / 448.0).float()
        q = (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        wanted = (q.float() * scale) @ (layer.weight.float() * layer.scale).t()
        torch.testing.assert_close(layer(x), wanted.bfloat16() + linear.bias, rtol=0, atol=0)
        layer.scaled_mm = True
        torch.testing.assert_close(layer(x), wanted.bfloat16() + linear.bias, rtol=2e-2, atol=2e-2)


# ---- sides -----------------------------------------------------------------------------------------------------------


def test_sides() -> None:
    stock, ours = sides.parse_sides("stock, ours-max", {"fp8_quantize": "off"})
    assert stock == sides.SIDES["stock"]
    assert (ours.backend, ours.mode, dict(ours.rules)) == ("inductor_ext", sides.MAX_AUTOTUNE, {"fp8_quantize": "off"})
    for text, found in (("theirs", "'theirs'"), ("", "''"), ("ours,ours", "'ours,ours'")):
        with pytest.raises(SettingError, match=f"found {found}"):
            sides.parse_sides(text, {})


def test_ablation_adds_one_rule_a_side() -> None:
    everything = {rule.name for rule in registry.rules()}
    found = sides.ablation(["fp8_quantize", "quantize_once"], {"fp8_quantize": "always", "fp8_downcast": "always"})
    assert [side.name for side in found] == ["stock", "no rules", "+ quantize_once", "+ fp8_quantize"]
    off = [{name for name, mode in side.rules.items() if mode == "off"} for side in found[1:]]
    assert off == [everything, everything - {"quantize_once"}, everything - {"quantize_once", "fp8_quantize"}]
    assert found[-1].rules["fp8_quantize"] == "always"


def test_a_job_survives_the_way_to_its_process() -> None:
    side = Side("ours", "inductor_ext", rules={"scaled_mm": "off"})
    job = Job(side, TINY, Workload((3, 4), True), "row", "cpu", "x", reference=True)
    assert Job.from_json(job.to_json()) == job


def test_channel() -> None:
    here, there = (Channel(end) for end in socket.socketpair())
    here.send(ask="time", replays=3)
    assert there.receive() == {"ask": "time", "replays": 3}
    with pytest.raises(TimeoutError):
        there.receive(0.01)
    here.close()
    assert there.receive() is None


def plan(**changes: Any) -> Plan:
    given: dict[str, Any] = {"sides": [sides.SIDES["eager"]], "replays": 2, "rounds": 2, "cosine_inputs": 3}
    return Plan("tiny", TINY, **{"workload": WORK, **given, **changes})


def test_eager_bf16_is_its_own_reference() -> None:
    pytest.importorskip("transformers")
    found = run(plan(fp8="none"))
    (side,) = found["sides"]
    assert not side["error"], side["error"]
    assert side["cosine_to_bf16"]["inputs"] == 3 and side["cosine_to_bf16"]["min"] == pytest.approx(1.0, abs=1e-9)
    assert len(side["rounds_ms"]) == 2 and side["compile_s"] is None and side["breakdown"] == {}
    assert side["tokens_per_s"] == pytest.approx(16 / side["step_ms"] * 1e3, rel=1e-2)
    assert found["floor"]["ms"] > 0


def test_a_side_that_takes_too_long_is_given_up() -> None:
    pytest.importorskip("transformers")
    (side,) = run(plan(limit_s=0.01))["sides"]
    assert side["error"] == "the process of 'eager' was not ready after 0.01 s" and side["step_ms"] is None


def test_cosines_are_compared_text_by_text(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    torch.save(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), tmp_path / "0" / "reference.pt")
    torch.save(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), tmp_path / "stock.pt")  # cosines 1, √½
    torch.save(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), tmp_path / "ours.pt")  # √½, 1
    found = _cosines(tmp_path, {"stock": str(tmp_path / "stock.pt"), "ours": str(tmp_path / "ours.pt"), "failed": ""})
    assert found["failed"] is None and found["stock"] is not None and "less_stock" not in found["stock"]
    assert found["ours"] == pytest.approx(
        {"inputs": 2, "mean": 0.5 + 0.5**1.5, "min": 0.5**0.5, "less_stock": 0.0, "standard_error": 1 - 0.5**0.5}
    )


def test_packed_attention_of_ours_is_sdpas() -> None:
    pytest.importorskip("transformers")
    eager = Side("packed", "eager")
    found = run(dataclasses.replace(plan(sides=[eager], fp8="none"), workload=Workload((5, 9, 2), True), others="inductor_ext"))
    (side,) = found["sides"]
    assert not side["error"], side["error"]
    assert side["cosine_to_bf16"]["inputs"] == 3 and side["cosine_to_bf16"]["min"] > 0.999


def test_a_side_that_fails_does_not_take_the_others_along() -> None:
    pytest.importorskip("transformers")
    broken = Side("broken", "inductor_ext", rules={"nope": "off"})
    found = run(plan(sides=[sides.SIDES["eager"], broken]))
    assert found["sides"][0]["step_ms"] and not found["sides"][0]["error"]
    assert "no rule is called 'nope'" in found["sides"][1]["error"] and found["sides"][1]["step_ms"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["row", "tensor", "static"])
def test_on_a_gpu(recipe: str) -> None:
    """torchao quantises, steps are graph replays, and every kernel of the step has a class that is known."""
    pytest.importorskip("torchao")
    chosen = [sides.SIDES["eager"], sides.SIDES["ours"]]
    found = run(plan(sides=chosen, device="cuda", fp8=recipe, workload=Workload((64, 64)), together=True))
    assert "by torchao" in found["quantisation"] and "CUDA-graph replays" in found["how_timed"]
    for side in found["sides"]:
        assert not side["error"], side["error"]
        assert side["breakdown"]["GEMM"]["launches"] >= 1 and side["breakdown"]["attention"]["launches"] >= 1
        assert "other" not in side["breakdown"], side["kernels"]
        assert side["cosine_to_bf16"]["min"] > 0.98
    assert found["sides"][1]["rewrites"]


# ---- the command -----------------------------------------------------------------------------------------------------


def invoke(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", "model", "--device", "cpu", *words])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.slow
def test_stock_against_ours(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    data, html = tmp_path / "result.json", tmp_path / "page.html"
    words = ["--layers", "1", "--batch", "2", "--length", "16", "--replays", "2", "--together", "--cosine-inputs", "4"]
    shown = invoke(*words, "--json", str(data), "--html", str(html))
    found = json.loads(data.read_text())
    stock, ours = found["sides"]
    assert (stock["name"], stock["of_stock"], stock["rewrites"]) == ("stock", 1.0, {})
    assert ours["rewrites"]["quantize_once"] == 3  # q, k and v share one quantisation; gate and up another
    assert ours["compile_s"] > 0 and ours["graph_breaks"] == 0
    assert min(stock["cosine_to_bf16"]["min"], ours["cosine_to_bf16"]["min"]) > 0.99
    assert found["compiled_together"] and "This ran on a CPU" in shown.stdout and "<svg" in html.read_text()


def test_settings_that_are_refused() -> None:
    assert "--fp8: wanted one of row" in invoke("--fp8", "int4", code=1).stderr
    assert "--device: wanted cpu" in invoke("--device", "tpu", code=1).stderr
    assert "--sides: wanted some of" in invoke("--sides", "theirs", code=1).stderr
    assert "no rule is called 'nope'" in invoke("--rules", "nope=off", code=1).stderr
    assert "takes the place of --length" in invoke("--lengths", "3,4", "--length", "5", code=1).stderr


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "inductor-ext[bench]" in invoke(code=1).stderr
