"""Losses, weights and advantages against TRL and verl, wherever they have the same function.

TRL is installed whole. verl's requirements exclude this transformers, so its files lie beside the environment, in
`.venv/verl` (see `.ci/setup`), and its modules are loaded with stand-ins for what the functions below never touch.
Where the two differ from us is in docs/rl_losses.md; the cases here keep to where all agree.
"""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.losses.gspo import gspo_loss
from mindjax.losses.off_policy import OffPolicyConfig, off_policy_weights
from mindjax.rl import advantages

EPS = {"eps_low": 0.1, "eps_high": 0.2}
VERL = Path(sys.prefix) / "verl"


def case(seed: int = 5) -> tuple[np.ndarray, ...]:
    """Six rows of a response each, where each clip takes some: (logp, old, reference, mask, advantages, weights)."""
    rng = np.random.default_rng(seed)
    logp = -rng.random((6, 8))
    adv = np.array([-1.1, 0.7, 0.5, -0.9, 1.3, -0.4])
    old = logp - np.array([0.4, 0.4, 0.0, -0.3, -0.3, 0.02])[:, None] + 0.05 * rng.normal(size=(6, 8))
    mask = (np.arange(8)[None] < np.array([8, 3, 1, 5, 6, 2])[:, None]).astype(float)
    arrays = (logp, old, logp + 0.5 * rng.normal(size=(6, 8)), mask, adv, 0.5 + rng.random(6))
    return tuple(x.astype(np.float32) for x in arrays)


def ours(logp: Any, old: Any, mask: Any, adv: Any, **options: Any) -> tuple[Any, np.ndarray]:
    """(LossOutput, gradient of its mean)."""
    loss = lambda x: ((out := gspo_loss(x, jnp.asarray(old), jnp.asarray(mask), jnp.asarray(adv), **EPS, **options)).mean, out)  # noqa: E501, E731  # fmt: skip
    (_, out), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(logp))
    return out, np.asarray(grad)


def agree(mine: tuple[Any, np.ndarray], loss: Any, leaf: Any) -> None:
    loss.backward()
    theirs = leaf.grad.numpy()
    assert np.isclose(loss.item(), mine[0].mean, rtol=1e-6)
    assert np.linalg.norm(mine[1] - theirs) <= 1e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("part", ["plain", "dual clip", "k3", "response weights"])
def test_the_loss_equals_trls(part: str) -> None:
    """Its `delta` is a dual clip wherever it lies above 1 + eps_high."""
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer as trainer

    logp, old, ref, mask, adv, weights = case()
    leaf = torch.tensor(logp, requires_grad=True)
    identity = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    delta, beta = 1.25 if part == "dual clip" else None, 0.7 if part == "k3" else 0.0
    weighted = part == "response weights"
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (leaf, torch.zeros(6, 8), None),
        importance_sampling_level="sequence", loss_type="grpo", beta=beta, aux_loss_enabled=False, use_vllm=weighted,
        vllm_importance_sampling_correction=weighted, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        epsilon_low=EPS["eps_low"], epsilon_high=EPS["eps_high"], model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False), accelerator=identity,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(6, 8, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": torch.tensor(mask),
        "advantages": torch.tensor(adv), "old_per_token_logps": torch.tensor(old),
        "ref_per_token_logps": torch.tensor(ref), "importance_sampling_ratio": torch.tensor(weights)[:, None],
    }  # fmt: skip
    options: dict[str, Any] = {
        "plain": {},
        "dual clip": {"dual_clip": delta},
        "k3": {"kl": "k3", "kl_coefficient": beta, "logp_ref": jnp.asarray(ref)},
        "response weights": {"weights": jnp.asarray(weights)},
    }[part]
    mine = ours(logp, old, mask, adv, **options)
    agree(mine, trainer._compute_loss(stub, None, inputs), leaf)
    clips = {name: float(total) for name, (total, _) in mine[0].metrics.items() if name.startswith("clip")}
    assert clips["clip_low"] and clips["clip_high"] and clips.get("clip_dual", 1), "the case must exercise each clip"


class Settings(SimpleNamespace):
    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


@pytest.fixture(scope="module")
def verl() -> Iterator[SimpleNamespace]:
    """verl's `core_algos` and `rollout_corr_helper`, and nothing of it in the process afterwards."""
    assert (VERL / "verl").is_dir(), f"{VERL} is missing: run .ci/setup test"
    before = set(sys.modules)
    stand_ins = {
        "verl": {}, "verl.utils": {}, "verl.trainer": {}, "verl.trainer.ppo": {}, "verl.workers": {},
        "verl.trainer.config": {"AlgoConfig": type("AlgoConfig", (), {})},
        "verl.trainer.config.algorithm": {"RolloutCorrectionConfig": Settings},
        "verl.workers.config": {"ActorConfig": Settings}, "verl.workers.config.actor": {"PolicyLossConfig": Settings},
        "verl.protocol": {"DataProto": object}, "omegaconf": {"DictConfig": dict}, "tensordict": {"TensorDict": dict},
        "verl.utils.device": {"get_device_name": lambda: "cpu", "get_torch_device": lambda: None},
        "verl.utils.import_utils": {"deprecated": lambda *a: lambda f: f},
    }  # fmt: skip
    for name, members in stand_ins.items():
        if name not in sys.modules:
            module = ModuleType(name)
            module.__path__ = [str(VERL / name.replace(".", "/"))]
            module.__dict__.update(members)
            sys.modules[name] = module
    groupwise = importlib.import_module("verl.utils.groupwise")
    sys.modules["verl.utils"].__dict__.update(
        as_torch_index=groupwise.as_torch_index, group_mean_std=groupwise.group_mean_std
    )
    yield SimpleNamespace(
        core=importlib.import_module("verl.trainer.ppo.core_algos"),
        correction=importlib.import_module("verl.trainer.ppo.rollout_corr_helper"),
    )
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("verl", "omegaconf", "tensordict"):
            del sys.modules[name]


SETTINGS = Settings(clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.2, clip_ratio_c=1.25, global_batch_info={})


@pytest.mark.parametrize("weighted", [False, True])
def test_the_token_form_equals_verls(verl: SimpleNamespace, weighted: bool) -> None:
    """With an advantage and a weight for each token."""
    import torch

    logp, old, _, mask, *_ = case()
    rng = np.random.default_rng(0)
    adv, weights = rng.normal(size=logp.shape).astype(np.float32), rng.random(logp.shape).astype(np.float32)
    leaf = torch.tensor(logp, requires_grad=True)
    given = torch.tensor(weights) if weighted else None
    loss, _ = verl.core.compute_policy_loss_gspo(
        torch.tensor(old), leaf, torch.tensor(adv), torch.tensor(mask), config=SETTINGS, rollout_is_weights=given
    )
    options = {"weights": jnp.asarray(weights)} if weighted else {}
    agree(ours(logp, old, mask, adv, level="token", **options), loss, leaf)


def test_dual_clip_equals_verls(verl: SimpleNamespace) -> None:
    """It has it for single tokens, which is what a response of one token is."""
    import torch

    logp, old, *_ = case()
    adv = np.random.default_rng(0).normal(size=48).astype(np.float32)
    logp, old, one = logp.reshape(48, 1), old.reshape(48, 1), np.ones((48, 1), np.float32)
    leaf = torch.tensor(logp, requires_grad=True)
    loss, _ = verl.core.compute_policy_loss_vanilla(
        torch.tensor(old), leaf, torch.tensor(adv)[:, None], torch.tensor(one),
        loss_agg_mode="seq-mean-token-mean", config=SETTINGS,
    )  # fmt: skip
    mine = ours(logp, old, one, adv, dual_clip=1.25)
    agree(mine, loss, leaf)
    assert mine[0].metrics["clip_dual"][0] > 0


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_kl_terms_equal_verls(verl: SimpleNamespace, kl: str) -> None:
    import torch

    logp, _, ref, mask, *_ = case()
    leaf = torch.tensor(logp, requires_grad=True)
    per_token = verl.core.kl_penalty(leaf, torch.tensor(ref), kl)
    loss = verl.core.agg_loss(per_token, torch.tensor(mask), "seq-mean-token-mean")
    options = {"logp_ref": jnp.asarray(ref), "kl": kl, "kl_coefficient": 1.0}
    agree(ours(logp, logp, mask, np.zeros(6, np.float32), **options), loss, leaf)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_off_policy_weights_equal_verls(verl: SimpleNamespace, level: str, mode: str) -> None:
    import torch

    logp, old, _, mask, *_ = case()
    config = OffPolicyConfig(level, mode, cap=1.3, floor=0.7)  # type: ignore[arg-type]
    weights, metrics = off_policy_weights(jnp.asarray(logp), jnp.asarray(old), jnp.asarray(mask), config)
    theirs, _ = verl.correction.compute_rollout_correction_weights(
        torch.tensor(logp) - torch.tensor(old), torch.tensor(mask), level,
        1.3 if mode == "truncate" else "0.7_1.3",
    )  # fmt: skip
    assert weights is not None
    mine = np.asarray(weights if level == "token" else jnp.broadcast_to(weights[:, None], mask.shape))
    np.testing.assert_allclose(mine * mask, theirs.numpy() * mask, rtol=1e-5)
    assert metrics["off_policy_cut"][0] > 0


def test_the_advantages_equal_verls(verl: SimpleNamespace) -> None:
    """Its deviation is the sample's, ours the population's: sqrt(N / (N - 1)) between them, and its 1e-6."""
    import torch

    rewards = np.random.default_rng(0).random((5, 4)).astype(np.float32)
    index, one = np.repeat(np.arange(5), 4), torch.ones(20, 1)
    # Filled by hand, as its functions write into what they are given.
    scores = lambda: torch.tensor(rewards.reshape(20, 1))  # noqa: E731
    group = verl.core.compute_grpo_outcome_advantage(scores(), one, index, norm_adv_by_std_in_grpo=False)[0]
    scaled = verl.core.compute_grpo_outcome_advantage(scores(), one, index)[0]
    rloo = verl.core.compute_rloo_outcome_advantage(scores(), one, index)[0]
    for mine, theirs, factor in (
        (advantages.group(rewards, normalize_deviation=False), group, 1.0),
        (advantages.group(rewards, normalize_deviation=True), scaled, np.sqrt(3 / 4)),
        (advantages.rloo(rewards), rloo, 1.0),
    ):
        np.testing.assert_allclose(mine * factor, theirs.numpy().reshape(5, 4), rtol=1e-4, atol=1e-6)
