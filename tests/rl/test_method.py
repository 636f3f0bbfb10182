"""The parts of the method as the loop uses them: phases, estimators, oversampling, exclusion, rollouts ahead."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mindjax.losses.off_policy import OffPolicyConfig
from mindjax.rl.config import AdvantageConfig, OversampleConfig, RLConfig, RolloutConfig
from mindjax.rl.distance import DistanceConfig
from mindjax.rl.engine import NativeEngine
from mindjax.rl.rewards import RewardConfig
from mindjax.rl.train import train
from mindjax.train.metrics import read_metrics
from tests.rl import program, tiny

SMALL = replace(
    program.SETTINGS, steps=4, checkpoint_every=0, evaluate_every=0, advantage=AdvantageConfig(),
    off_policy=OffPolicyConfig(), rollout=RolloutConfig(), oversample=OversampleConfig(),
)  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> tuple[Any, ...]:
    return tiny.policy()


def run(policy: tuple[Any, ...], settings: RLConfig, workdir: Path) -> list[dict[str, float]]:
    """The metrics of a run, without clocks."""
    config, params, processor = policy
    train(settings, config, params, tiny.letters(), processor, workdir)
    return records(workdir)


def records(workdir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in read_metrics(workdir)]


def shown(workdir: Path) -> dict[int, list[Any]]:
    """step -> the groups that were written out."""
    result: dict[int, list[Any]] = {}
    for line in (workdir / "rollouts.jsonl").read_text().splitlines():
        record = json.loads(line)
        result.setdefault(record["step"], []).append(record)
    return result


def test_two_phases(policy: tuple[Any, ...], tmp_path: Path) -> None:
    """What each answer was trained with, against the formulas of the paper on what the answers say."""
    advantage = AdvantageConfig(pass_at_k=0.5, k=2, estimator="diversity", distance=DistanceConfig("exact"))
    settings = replace(SMALL, advantage=advantage, show_every=1)
    assert [record["phase"] for record in run(policy, settings, tmp_path)] == [0, 0, 1, 1]
    compared = {0: 0, 1: 0}
    for step, groups in shown(tmp_path).items():
        for group in groups:
            texts = [sample["text"].casefold().strip() for sample in group["samples"]]
            right = [sample["parts"]["correct"] for sample in group["samples"]]
            n, c = len(right), int(sum(right))
            if step <= 2:
                rho = 1 - math.comb(n - c, 2) / math.comb(n, 2)
                sigma = math.sqrt(rho * (1 - rho))
                q = math.comb(n - c - 1, 1) / math.comb(n - 1, 1) if c < n else 0.0
                expected = [0.0] * n if not sigma else [(1 - rho - (0 if r else q)) / sigma for r in right]
            else:
                spread = [sum(a != b for b in texts) / (n - 1) for a in texts]
                earned = [r * d for r, d in zip(right, spread, strict=True)]
                expected = [e - sum(earned) / n for e in earned]
            got = [sample["advantage"] for sample in group["samples"]]
            np.testing.assert_allclose(got, expected, atol=1e-6)
            compared[int(step > 2)] += any(got)
    assert all(compared.values()), "some group had a lesson in each phase"
    assert all(
        (tmp_path / path).is_file() for groups in shown(tmp_path).values() for g in groups for path in g["images"]
    )


def test_entropy_ends_the_first_phase(policy: tuple[Any, ...], tmp_path: Path) -> None:
    settings = replace(SMALL, advantage=AdvantageConfig(pass_at_k=1.0, k=2, entropy_switch=100.0))
    assert [record["phase"] for record in run(policy, settings, tmp_path)] == [0, 1, 1, 1]


def test_oversampling_trains_the_groups_with_a_lesson(policy: tuple[Any, ...], tmp_path: Path) -> None:
    """One answer in ten is right: many groups of four are all wrong, so more prompts are asked."""
    settings = replace(SMALL, oversample=OversampleConfig(largest=2.0, decay=0.0))
    history = run(policy, settings, tmp_path)
    assert history[0]["oversample"] == 1.0 and max(record["oversample"] for record in history) == 2.0
    wide = [record for record in history if record["oversample"] == 2.0 and 0 < record["informative"] < 1]
    assert wide and all(record["trained_informative"] >= record["informative"] for record in wide)
    assert any(record["trained_informative"] > record["informative"] for record in wide)
    for before, after in itertools.pairwise(history):
        wanted = min(2.0, 1 / before["informative"]) if before["informative"] else 2.0
        assert after["oversample"] == math.ceil(wanted * 4) / 4


def test_what_is_excluded_from_the_loss_has_no_gradient(policy: tuple[Any, ...], tmp_path: Path) -> None:
    """Answers of one token are cut unless it ends the turn: with one seed all of them, with the other all but one."""
    history = run(policy, replace(SMALL, steps=1, seed=5, exclude_cut="both"), tmp_path / "without")
    other = run(policy, replace(SMALL, steps=1, seed=5), tmp_path / "with")
    assert history[0]["cut"] == 1.0 and other[0]["grad_norm"] > 0
    assert history[0]["grad_norm"] == 0.0
    # Rows that do not count are left out of the mean, not averaged in as zeros; the other update has none.
    history = run(policy, replace(SMALL, steps=1, exclude_cut="both"), tmp_path / "one")
    assert history[0]["cut"] == 15 / 16 and history[0]["ratio"] == pytest.approx(0.5, abs=0.05)


def test_kl_is_to_the_policy_before_the_first_step(policy: tuple[Any, ...], tmp_path: Path) -> None:
    """Not to that of the step: it grows as the policy moves on. Its gradient is tested with the loss."""
    history = run(policy, replace(SMALL, steps=6, kl="k3", kl_coefficient=1e-6), tmp_path)
    divergence = [record["reference_kl"] for record in history]
    assert 0 <= divergence[0] < divergence[-1]
    assert divergence[-1] > 4 * history[-1]["approx_kl"]


def test_eight_bit_rollouts_are_corrected(policy: tuple[Any, ...], tmp_path: Path) -> None:
    """The sampler's own rounding is what the weights see; with full weights there is nothing to see."""
    settings = replace(SMALL, steps=2, off_policy=OffPolicyConfig("sequence"))
    full = run(policy, settings, tmp_path / "full")
    eight = run(policy, replace(settings, rollout=RolloutConfig(weights="int8")), tmp_path / "int8")
    assert abs(full[0]["off_policy_weight"] - 1) < 1e-5 and full[0]["rollout_max"] < 1e-4
    assert full[0]["rollout_pearson"] > 0.999999
    assert 1e-4 < eight[0]["rollout_max"] < 1.0 and eight[0]["rollout_pearson"] < full[0]["rollout_pearson"]
    assert eight[0]["off_policy_weight"] != 1.0


def spawn(*arguments: str, devices: int = 1) -> int:
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.run([sys.executable, "-m", "tests.rl.program", *arguments], env=environment).returncode


def test_resumes_after_kill_9(policy: tuple[Any, ...], tmp_path: Path) -> None:
    """Killed in the middle of the first phase, a rollout under way: rewards, place in the schedule and samples of the
    steps that follow are those of a run that was left alone."""
    config, params, processor = policy
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert spawn(str(killed), "--kill-at", "4") == -9
    assert len(records(killed)) == 3

    def go_on(workdir: Path) -> Any:
        return train(program.SETTINGS, config, params, tiny.letters(), processor, workdir, evaluate=lambda _: {})

    expected, resumed = go_on(whole), go_on(killed)
    assert records(killed) == records(whole)
    # The step after a checkpoint samples from what was saved; the others from weights one step old.
    assert [record["staleness"] for record in records(whole)] == [0, 1, 0, 1, 0]
    for a, b in zip(*(jax.tree.leaves(result.params) for result in (expected, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rollouts_on_devices_of_their_own(tmp_path: Path) -> None:
    """Two devices, one trains while the other samples: the answers and the rewards of sharing one."""
    assert spawn(str(tmp_path), "--devices", "1", "0", devices=2) == 0
    apart, shared = records(tmp_path / "1"), records(tmp_path / "0")
    assert [record["reward"] for record in apart] == [record["reward"] for record in shared]
    for a, b in zip(apart, shared, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="there are 1 devices, and the trainer needs one"):
        NativeEngine(tiny.policy()[0], RolloutConfig(devices=1), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantage": {"pass_at_k": 0.5, "k": 4}}, "advantage.k is 4 and samples_per_prompt 4"),
        ({"advantage": {"pass_at_k": 1.5}}, "share of the steps"),
        ({"off_policy": {"level": "token"}}, "needs level='token'"),
        ({"rollout": {"overlap": True}}, "set off_policy.level"),
        ({"rollout": {"repeat_window": 4}}, "together, or neither"),
        ({"rollout": {"engine": "vllm", "devices": 1}}, "are of the native engine"),
        ({"oversample": {"largest": 0.5}}, "at least 1"),
        ({"kl": "k3"}, "kl and kl_coefficient together"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    parts = {"advantage": AdvantageConfig, "off_policy": OffPolicyConfig, "rollout": RolloutConfig,
             "oversample": OversampleConfig}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **{k: parts[k](**v) if k in parts else v for k, v in change.items()})


def test_several_processes_sample_natively_and_in_step(
    policy: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, params, processor = policy
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    ahead = replace(SMALL, off_policy=OffPolicyConfig("sequence"), rollout=RolloutConfig(overlap=True))
    for settings in (ahead, replace(SMALL, rollout=RolloutConfig(engine="vllm"))):
        with pytest.raises(ValueError, match=r"set rollout\.engine to native and rollout\.overlap to False"):
            train(settings, config, params, tiny.letters(), processor, tmp_path)


# Answers of several tokens, half of them right, sampled in 8 bits and corrected: what a field could act on is there.
BUSY = replace(
    SMALL, steps=2, max_new_tokens=4, reward=RewardConfig(custom=("tests.train.several:reward",)),
    advantage=AdvantageConfig(normalize_deviation=False), rollout=RolloutConfig(weights="fp8"),
    off_policy=OffPolicyConfig("sequence"),
)  # fmt: skip


def other_values() -> Sequence[tuple[str, RLConfig]]:
    """Every field that the loop reads, set to something else than in `BUSY`; diversity acts on answers that repeat."""
    flat = {
        "prompts_per_step": 2, "samples_per_prompt": 3, "updates_per_rollout": 1, "eps_low": 0.0, "eps_high": 0.0,
        "temperature": 0.7, "max_new_tokens": 3, "exclude_cut": "both", "dtype": "bfloat16", "seed": 1,
    }  # fmt: skip
    nested = {
        "advantage": [AdvantageConfig(pass_at_k=1.0, k=2), AdvantageConfig(pass_at_k=1.0, k=3),
                      *(AdvantageConfig(estimator=name) for name in ("rloo", "batch")),
                      AdvantageConfig(normalize_deviation=True)],
        "off_policy": [OffPolicyConfig(), OffPolicyConfig("geometric")],
        "rollout": [RolloutConfig(), RolloutConfig(weights="int8")],
        "oversample": [OversampleConfig(largest=2.0)],
        "reward": [replace(BUSY.reward, correct=2.0), replace(BUSY.reward, length=1.0, soft_length=1)],
    }  # fmt: skip
    changes = [{name: value} for name, value in flat.items()]
    changes += [{name: value} for name, values in nested.items() for value in values]
    changes += [{"level": "token", "off_policy": OffPolicyConfig("token")}]
    changes += [{"dual_clip": 1.0001, "eps_low": 0.0}, {"kl": "k1", "kl_coefficient": 1.0}]
    return [(str(change), replace(BUSY, **change)) for change in changes]


@pytest.mark.prove
@pytest.mark.parametrize(("name", "settings"), other_values(), ids=[name for name, _ in other_values()])
def test_no_field_is_dead(name: str, settings: RLConfig, policy: tuple[Any, ...], tmp_path: Path) -> None:
    config, params, processor = policy

    def trained(settings: RLConfig, workdir: Path) -> Any:
        return train(settings, config, params, tiny.letters(), processor, workdir).params

    plain, changed = trained(BUSY, tmp_path / "plain"), trained(settings, tmp_path / "changed")
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True)), name
