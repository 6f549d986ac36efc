"""Rollouts in a model whose every step is known."""

from itertools import pairwise

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_mbpo.dynamics.rollouts import rollout
from tests.test_ensemble import constant_ensemble, make_ensemble


def no_termination(obs, actions, next_obs):
    return th.zeros(len(obs), dtype=th.bool)


def zero_policy(obs):
    return th.zeros(len(obs), 1)


def test_rollouts_end_at_terminations_and_never_cross_them():
    """Every step adds one; states of 3 and more are terminal."""
    ensemble = constant_ensemble(1, 1, means=[1.0], log_var=-30)
    start = th.tensor([[0.0], [1.0], [2.0], [-10.0]])
    steps = list(rollout(ensemble, zero_policy, start, 5, lambda obs, actions, next_obs: next_obs[:, 0] > 2.5))
    obs = [step.obs.squeeze(1).round().tolist() for step in steps]
    terminated = [step.terminated.tolist() for step in steps]
    assert obs == [[0, 1, 2, -10], [1, 2, -9], [2, -8], [-7], [-6]]
    assert terminated == [[False, False, True, False], [False, True, False], [True, False], [False], [False]]
    for step, following in pairwise(steps):
        assert th.equal(step.next_obs[~step.terminated], following.obs)
        assert th.allclose(step.next_obs, step.obs + 1, atol=1e-5)
    # All over: no empty batches follow
    assert len(list(rollout(ensemble, zero_policy, start[:3], 50, lambda o, a, n: n[:, 0] > 2.5))) == 3


def test_policy_acts_on_the_present_state_and_is_asked_at_every_step():
    ensemble = constant_ensemble(2, 1, means=[1.0], log_var=-30)
    states = []

    def policy(obs):
        states.append(obs)
        return obs[:, :1] / 100

    steps = list(rollout(ensemble, policy, th.tensor([[0.0, 5.0], [7.0, 7.0]]), 3, no_termination))
    assert len(states) == 3
    for step, state in zip(steps, states, strict=True):
        assert th.equal(step.obs, state) and th.equal(step.actions, state[:, :1] / 100)


def test_a_new_elite_at_every_step():
    """Member m adds 10**m: the sum tells which members made the steps."""
    th.manual_seed(0)
    ensemble = constant_ensemble(1, 1, means=[1.0, 10.0, 100.0], n_elites=2, log_var=-30)
    ensemble.elites.copy_(th.tensor([0.0, 2.0]))
    *_, last = rollout(ensemble, zero_policy, th.zeros(8_000, 1), 2, no_termination)
    sums, counts = last.next_obs.round().unique(return_counts=True)
    assert sums.tolist() == [2, 101, 200]
    np.testing.assert_allclose(counts / 8_000, [0.25, 0.5, 0.25], atol=5 * 0.5 / np.sqrt(8_000))


def test_reward_function_replaces_the_prediction():
    ensemble = constant_ensemble(1, 1, means=[1.0], log_var=-30)
    start = th.tensor([[0.0], [4.0]])
    (predicted,) = rollout(ensemble, zero_policy, start, 1, no_termination)
    assert th.allclose(predicted.rewards, th.ones(2), atol=1e-5)

    def reward(obs, actions, next_obs):
        return obs[:, 0] - 2 * next_obs[:, 0]

    (replaced,) = rollout(ensemble, zero_policy, start, 1, no_termination, reward)
    assert th.allclose(replaced.rewards, th.tensor([-2.0, -6.0]), atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_predictions_are_not_transitions(value):
    ensemble = constant_ensemble(2, 1, means=[1.0], log_var=-30)
    start = th.tensor([[0.0, 0.0], [value, 0.0], [2.0, 2.0]])
    steps = list(rollout(ensemble, zero_policy, start, 2, no_termination))
    for step in steps:
        assert len(step.obs) == 2
        assert all(th.isfinite(column).all() for column in step)
    assert list(rollout(ensemble, zero_policy, start[1:2], 2, no_termination)) == []


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**31))
def test_invariants(obs_dim, action_dim, n, length, seed):
    th.manual_seed(seed)
    ensemble = make_ensemble(obs_dim, action_dim, (8,))
    steps = list(
        rollout(
            ensemble,
            lambda obs: th.rand(len(obs), action_dim) * 2 - 1,
            th.randn(n, obs_dim),
            length,
            lambda obs, actions, next_obs: next_obs[:, 0] > 1,
        )
    )
    alive = n
    assert 1 <= len(steps) <= length
    for step in steps:
        assert len({len(column) for column in step}) == 1 and len(step.obs) == alive
        assert step.obs.shape == step.next_obs.shape == (alive, obs_dim) and step.actions.shape == (alive, action_dim)
        assert step.rewards.shape == step.terminated.shape == (alive,) and step.terminated.dtype == th.bool
        assert not any(column.requires_grad for column in step)
        # No state is visited after a termination
        assert not (step.obs[:, 0] > 1).any() or step is steps[0]
        alive -= int(step.terminated.sum())
    assert len(steps) == length or alive == 0
