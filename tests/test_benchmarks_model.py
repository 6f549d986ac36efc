"""Benchmark of the model alone: its errors, the ways to train, and its command."""

import math
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch as th
from scipy import stats
from stable_baselines3.common.buffers import ReplayBuffer

from benchmarks import model
from benchmarks.model import (
    N_NEXT,
    UNITS,
    VARIANTS,
    Errors,
    as_regression,
    errors,
    measure,
    seconds_by_size,
    seconds_of_loop,
)
from sb3_mbpo.common.buffers import real_transitions
from sb3_mbpo.dynamics.rollouts import Transitions
from tests.agents import make_agent
from tests.test_ensemble import linear_ensemble

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def eager(monkeypatch):
    """Compiling takes longer than what is tested."""
    monkeypatch.setattr(model, "compiled", lambda function, device: function)


def test_errors_of_a_known_model():
    """The model says the same for all: its errors are those of a biased constant, and five steps have five times the bias."""
    th.manual_seed(0)
    n, sigma, scale = 20_000, 0.5, th.tensor([1.0, 10.0])
    ensemble = linear_ensemble(np.zeros((2, 2)), sigma, [0.5, 5.0])
    truth = th.randn(n, 2) * scale
    obs = th.cat([th.zeros(1, 1), truth[:, 1:].cumsum(dim=0)])
    following = Transitions(obs[:-1], th.zeros(n, 1), obs[1:], truth[:, 0], th.zeros(n, dtype=th.bool))
    found = errors(ensemble, following, scale, steps=12)
    off = truth.numpy() / scale.numpy() - 0.5
    std = sigma / scale.numpy()
    assert found.steps == 12
    assert found.mean == pytest.approx(np.sqrt(1.25), rel=0.02)
    assert found.typical == pytest.approx(np.median(np.sqrt(np.mean(off**2, 1))), rel=1e-2)
    assert found.sample == pytest.approx(np.sqrt(np.mean(off**2) + np.mean(std**2)), rel=1e-2)
    assert found.inside == pytest.approx(np.mean(np.abs(off) < std), abs=0.01)
    nll = -stats.norm.logpdf(off, scale=std).sum(axis=1)
    assert found.nll == pytest.approx(np.median(nll), rel=0.02)
    # Of a normal around 2.5 with the variance of five true steps and five of the model's
    spread = np.sqrt(5 * (1 + std[1] ** 2))
    assert found.sample_5 == pytest.approx(spread * np.sqrt(stats.ncx2.median(1, (2.5 / spread) ** 2)), rel=0.05)


def buffer_of(sizes, seed=0):
    """A random walk whose steps have these means."""
    rng = np.random.default_rng(seed)
    space = gymnasium.spaces.Box(-5, 5, (2,))
    buffer = ReplayBuffer(len(sizes), space, space, device="cpu")
    obs = rng.normal(0, 1, 2)
    for size in sizes:
        next_obs = obs + size + rng.normal(0, 1, 2)
        buffer.add(obs, next_obs, rng.normal(0, 1, 2), rng.normal(size, 1), np.zeros(1), [{}])
        obs = next_obs if size == 0 else rng.normal(0, 1, 2)
    return real_transitions(buffer)


def test_errors_are_those_of_the_next_transitions(eager):
    """Steps are of another size in the next 1,000 transitions, and in those after them."""
    transitions = buffer_of(np.repeat([0.0, 5.0, 100.0], [400, N_NEXT, 50]))
    (found,) = measure(transitions, VARIANTS["budget"]._replace(steps=0.02), range(400, 401), seed=0)
    # Noise of one standard deviation, about a mean that is off by five
    assert found.steps == 28 and found.mean == pytest.approx(np.sqrt(26), rel=0.15)
    # None of them goes on from the one before
    assert math.isnan(found.sample_5)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "paper"])
def test_ways(name, eager):
    # Each transition begins anew, so that the next ones are of the same distribution
    transitions = buffer_of(np.full(400 + N_NEXT, 1e-9))
    variant, share = VARIANTS[name], 0.02 * VARIANTS[name].steps
    variant = variant._replace(steps=share)
    found = list(measure(transitions, variant, range(300, 401, 100), seed=0))
    extra = variant.constants.get("EXTRA_STEPS", 1_000)
    later = round(share * 100 * (1 + extra / 400)) * (2 if name == "small batches" else 1)
    assert [each.steps for each in found] == [share * (300 + extra), later]
    # There is nothing to learn but the mean
    assert all(0.9 < each.mean < 1.5 for each in found)
    # It does something else; a whole first training would need noise that is learned by heart
    as_usual = list(measure(transitions, VARIANTS["budget"]._replace(steps=0.02), range(300, 401, 100), seed=0))
    assert (found == as_usual) == (name in {"budget", "whole first training"})


@pytest.mark.parametrize("name", UNITS)
def test_other_units(name, eager):
    """Errors are in standard deviations."""
    transitions = buffer_of(np.full(400 + N_NEXT, 1e-9))
    variant = VARIANTS["budget"]._replace(steps=0.02)
    obs, actions, next_obs, rewards, _ = other = UNITS[name](transitions)
    (found,), (in_others,) = (measure(each, variant, range(400, 401), seed=0) for each in (transitions, other))
    assert th.equal(actions, transitions.actions)
    # Noise is foreseen no worse than the rest, which is noise too; a clock is known, but always beyond what was seen
    assert in_others.mean == pytest.approx(found.mean, rel=0.5 if name == "and Unix time" else 0.1)
    if not name.startswith("and"):
        assert obs.shape == transitions.obs.shape
        assert in_others.mean == pytest.approx(found.mean, rel=0.02) and in_others.nll == pytest.approx(found.nll, rel=0.05)
        return
    assert th.equal(obs[:, :2], transitions.obs.double()) and th.equal(rewards, transitions.rewards)
    assert th.equal(next_obs[:-1, 2], obs[1:, 2])


def test_units_are_what_they_are_called():
    transitions = buffer_of(np.full(100, 1e-9))
    obs = transitions.obs.double()

    def of(name):
        return UNITS[name](transitions)

    np.testing.assert_allclose(of("observations x 1e-4").obs, 1e-4 * obs, rtol=1e-6)
    np.testing.assert_allclose(of("observations x 1e4").next_obs, 1e4 * transitions.next_obs, rtol=1e-6)
    for name, factor in (("first dimension x 1e-4", 1e-4), ("first dimension x 1e4", 1e4)):
        np.testing.assert_allclose(of(name).obs, obs * th.tensor([factor, 1]), rtol=1e-6)
        np.testing.assert_allclose(of(name).next_obs, transitions.next_obs * th.tensor([factor, 1]), rtol=1e-6)
    assert of("first dimension + 1e6").obs.dtype == th.float64
    np.testing.assert_allclose(of("first dimension + 1e6").next_obs - th.tensor([1e6, 0]), transitions.next_obs, atol=1e-9)
    np.testing.assert_allclose(of("reward x 1e-3").rewards, 1e-3 * transitions.rewards, rtol=1e-6)
    np.testing.assert_allclose(of("reward x 1e3").rewards, 1e3 * transitions.rewards, rtol=1e-6)
    np.testing.assert_array_equal(of("and Unix time").next_obs[:, 2] - of("and Unix time").obs[:, 2], 60)
    for name, std in (("and noise of 0.3", 0.3), ("and noise of 300", 300)):
        assert of(name).obs[:, 2].std().item() == pytest.approx(std, rel=0.2)


def test_regression():
    inputs, targets = as_regression(buffer_of(np.zeros(5)))
    assert inputs.shape == (5, 4) and targets.shape == (5, 3)


@pytest.mark.slow
def test_seconds_of_model_training():
    ((size, of_model, of_sac),) = seconds_by_size([300], rounds=1)
    assert size == 300 and of_model > 0 and of_sac > 0


@pytest.mark.slow
def test_seconds_of_the_loop():
    """A training after 250 steps, at the budget of one gradient step for each of them, which takes longer than a hundredth."""
    seconds = seconds_of_loop(300, 260)
    assert set(seconds) == {"env", "model", "rollouts", "updates"} and min(seconds.values()) > 0
    assert seconds["updates"] > seconds["model"] > seconds["env"]


@pytest.mark.slow
def test_command(tmp_path):
    make_agent(learning_starts=1_700).learn(1_650).save_replay_buffer(tmp_path / "Pendulum-v1.pkl")
    command = [sys.executable, "-m", "benchmarks.model", "error", "--tasks", "Pendulum-v1", "--begin", "400", "--end", "500"]
    command += ["--every", "100", "--ways", "half a step", "--buffers", tmp_path, "--out", tmp_path / "errors.csv"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    lines = (tmp_path / "errors.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].split(",")[5:] == list(Errors._fields)
    assert [line.split(",")[:6] for line in lines[1:]] == [
        ["Pendulum-v1", "as they are", "half a step", "0", "400", "700"],
        ["Pendulum-v1", "as they are", "half a step", "0", "500", "150"],
    ]
    assert "| Pendulum-v1 | as they are | half a step | 0 | 425 |" in result.stdout
