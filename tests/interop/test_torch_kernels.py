"""transformers' experts over our kernels: the same outputs and gradients, float64 as the truth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernels_cuda import library
from mindjax.interop.random_checkpoint import random_checkpoint
from mindjax.interop.torch_kernels import KernelExperts, use_kernels
from mindjax.interop.torch_trace import load

EXPERTS, CHOICES, HIDDEN, INTERMEDIATE = 6, 2, 64, 48
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def draw(tokens: int, seed: int = 0, *, only: int | None = None) -> dict[str, torch.Tensor]:
    """Weights and a routed input in float64; `only` sends every first choice to one expert."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    index = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:CHOICES] for _ in range(tokens)])
    if only is not None:
        index = torch.full_like(index, only)
        index[:, 1:] = (only + 1) % EXPERTS
    return {
        "gate_up_proj": normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5,
        "down_proj": normal(EXPERTS, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5,
        "hidden_states": normal(tokens, HIDDEN),
        "top_k_weights": normal(tokens, CHOICES).softmax(-1),
        "top_k_index": index,
        "cotangent": normal(tokens, HIDDEN),
    }


def truth(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dense: every expert on every token, then a weighted sum; outputs and gradients by autograd in float64."""
    leaves = {name: case[name].clone().requires_grad_() for name in NAMES}
    gate, up = torch.einsum("th,eih->tei", leaves["hidden_states"], leaves["gate_up_proj"]).chunk(2, -1)
    answers = torch.einsum("tei,ehi->teh", nn.functional.silu(gate) * up, leaves["down_proj"])
    share = torch.zeros(len(case["top_k_index"]), EXPERTS + 1, dtype=torch.float64)
    share = share.scatter(1, case["top_k_index"], leaves["top_k_weights"])[:, :EXPERTS]
    out = torch.einsum("te,teh->th", share, answers)
    out.backward(case["cotangent"].double())
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


NAMES = ("gate_up_proj", "down_proj", "hidden_states", "top_k_weights")


def ours(case: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    leaves = {name: case[name].to(device, dtype).requires_grad_() for name in NAMES}
    experts = KernelExperts(nn.Parameter(leaves["gate_up_proj"].detach()), nn.Parameter(leaves["down_proj"].detach()))
    out = experts(leaves["hidden_states"], case["top_k_index"].to(device), leaves["top_k_weights"])
    out.backward(case["cotangent"].to(device, dtype))
    gradients = {"gate_up_proj": experts.gate_up_proj.grad, "down_proj": experts.down_proj.grad}
    gradients |= {name: leaves[name].grad for name in ("hidden_states", "top_k_weights")}
    return {"out": out.detach(), **gradients}


def assert_near(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], rtol: float) -> None:
    for name, expected in truth.items():
        error = float((ours[name].cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30))
        assert error < rtol, (name, error)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 7, 64, 129])
def test_outputs_and_gradients_in_float32(tokens: int, device: str) -> None:
    case = draw(tokens, seed=tokens)
    assert_near(ours(case, device, torch.float32), truth(case), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_as_near_as_transformers(device: str) -> None:
    """Same rounded inputs; several roundings each, so the bound is transformers' own error."""
    case = {
        name: value if name == "top_k_index" else value.bfloat16().double() for name, value in draw(96, seed=3).items()
    }
    expected = truth(case)
    found, theirs = ours(case, device, torch.bfloat16), _transformers(case, torch.bfloat16)
    for name, right in expected.items():
        errors = [float((x[name].cpu().double() - right).norm() / right.norm()) for x in (found, theirs)]
        assert errors[0] < max(3e-3, 1.25 * errors[1]), (name, errors)


def _transformers(case: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    config = Qwen3VLMoeTextConfig(num_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE)
    config._experts_implementation = "eager"
    experts = Qwen3VLMoeTextExperts(config).to(dtype)
    with torch.no_grad():
        experts.gate_up_proj.copy_(case["gate_up_proj"])
        experts.down_proj.copy_(case["down_proj"])
    x, weights = (case[name].to(dtype).requires_grad_() for name in ("hidden_states", "top_k_weights"))
    out = experts(x, case["top_k_index"], weights)
    out.backward(case["cotangent"].to(dtype))
    gradients = {"gate_up_proj": experts.gate_up_proj.grad, "down_proj": experts.down_proj.grad}
    return {"out": out.detach(), **gradients, "hidden_states": x.grad, "top_k_weights": weights.grad}


@pytest.mark.parametrize("device", DEVICES)
def test_one_expert_takes_all_and_the_others_have_zero_gradients(device: str) -> None:
    case = draw(33, seed=5, only=2)
    found = ours(case, device, torch.float32)
    assert_near(found, truth(case), 1e-5)
    idle = [expert for expert in range(EXPERTS) if expert not in (2, 3)]
    assert not found["gate_up_proj"][idle].any() and not found["down_proj"][idle].any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_choice_of_no_expert_adds_nothing(device: str) -> None:
    case = draw(20, seed=6)
    case["top_k_index"][::3, 1] = EXPERTS
    found, expected = ours(case, device, torch.float32), truth(case)
    assert_near(found, expected, 1e-5)
    assert not found["top_k_weights"].cpu()[::3, 1].any()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("moe")
    return load(folder, random_checkpoint(folder, moe=True))


def test_patched_model_gives_the_same_logits_and_gradients(model: Any, tmp_path: Path) -> None:
    patched = copy.deepcopy(model)
    parameters = dict(patched.named_parameters())
    assert use_kernels(patched) == model.config.text_config.num_hidden_layers
    assert {name: id(value) for name, value in patched.named_parameters()} == {
        name: id(value) for name, value in parameters.items()
    }
    inputs = {"input_ids": torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))}
    results = []
    for candidate in (model, patched):
        candidate.zero_grad()
        logits = candidate(**inputs).logits
        logits.log_softmax(-1)[..., 0].sum().backward()
        results.append((logits.detach(), {name: value.grad for name, value in candidate.named_parameters()}))
    (theirs, their_gradients), (found, gradients) = results
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-4)
    for name, expected in their_gradients.items():
        if expected is not None:
            error = float((gradients[name] - expected).norm() / expected.norm().clamp_min(1e-12))
            assert error < 1e-4, (name, error)

    patched.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_bfloat16_model_is_as_near_to_float64_as_transformers(model: Any) -> None:
    inputs = {"input_ids": torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(1))}
    rounded = copy.deepcopy(model).bfloat16()
    patched = copy.deepcopy(rounded)
    use_kernels(patched)
    with torch.no_grad():
        exact = copy.deepcopy(rounded).double()(**inputs).logits
        errors = [float((x(**inputs).logits.double() - exact).square().mean().sqrt()) for x in (patched, rounded)]
    assert errors[0] < 1.25 * errors[1], errors


def test_mistakes_say_what_to_do(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no Qwen3VLMoeTextExperts"):
        use_kernels(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\[E, 2 I, H\]"):
        KernelExperts(nn.Parameter(torch.zeros(2, 8, 4)), nn.Parameter(torch.zeros(2, 8, 4)))
    missing = library.Library(None, None, "not built; build them")
    monkeypatch.setattr(library, "load", lambda backend: missing)
    with pytest.raises(RuntimeError, match="build them"):
        use_kernels(copy.deepcopy(model))
