"""DHMBPO's training rollout and updates beside independent computations in float64."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn
from torch.func import vjp

from sb3_mbpo.common.adam import TrainState, coefficients
from sb3_mbpo.common.compilation import compiled
from sb3_mbpo.dhmbpo.policies import ActorLayers, CriticLayers, DHMBPOPolicy
from sb3_mbpo.dhmbpo.rollouts import Model, Rollout, RolloutNoise, draw_rollout_noise, model_step, roll_out, state_step
from sb3_mbpo.dhmbpo.update import (
    Networks,
    Noise,
    Settings,
    State,
    critic_targets,
    critic_update,
    joint_update,
    soft_returns,
    update_actor,
    update_bounds,
    update_critics,
)
from sb3_mbpo.dynamics.ensemble import Ensemble

OBS, ACTION, BATCH, HORIZON, MEMBERS, CRITICS = 3, 2, 12, 4, 4, 5
GAMMA, TAU, ENT_COEF, LEARNING_RATE = 0.9, 0.1, 0.3, 0.01


def far_away(obs, actions, next_obs):
    return next_obs[:, 0].abs() > 1.5


def in_float64(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


def train_state(module):
    parameters = {name: p.detach().double().clone() for name, p in module.named_parameters()}
    return TrainState(parameters, *({name: th.zeros_like(p) for name, p in parameters.items()} for _ in range(2)))


def gradient(state):
    """Of the only step so far, from Adam's first moment."""
    return {name: first / 0.1 for name, first in state.first.items()}


def flat(tensors):
    return th.cat([tensor.flatten() for tensor in tensors.values()])


class Problem:
    """Random networks, model and noise, all in float64."""

    def __init__(self, seed=0, dropout=0.1, learned=True, horizon=HORIZON, dtype=th.float64):
        th.manual_seed(seed)
        box = spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
        policy = DHMBPOPolicy(
            *(box, spaces.Box(-1, 1, (ACTION,), np.float32), lambda _: LEARNING_RATE),
            net_arch=[16, 16],
            n_critics=CRITICS,
            dropout=dropout,
        )
        policy.set_statistics(th.randn(OBS), th.rand(OBS) + 0.5)
        self.policy = policy.to(dtype)
        self.networks = Networks(ActorLayers(policy.actor), CriticLayers(policy.critic))
        ensemble = Ensemble(OBS, ACTION, (8, 8), MEMBERS, MEMBERS, 1e-3)
        # Steps are large, so that some of the rollouts end
        ensemble.set_stats(th.randn(500, OBS + ACTION), 0.8 * th.randn(500, 1 + OBS))
        ensemble = ensemble.to(dtype)
        for weight in ensemble.weights:
            weight.data *= 2
        ensemble.requires_grad_(False)
        weights, biases = ([each.detach() for each in of] for of in (ensemble.weights, ensemble.biases))
        none = th.zeros(OBS, dtype=th.bool)
        self.model = Model(ensemble, weights, biases, none, none)
        critic, target = train_state(self.networks.critic), train_state(self.networks.critic).parameters
        # Their last layer begins at zero
        for values in (critic.parameters, target):
            for value in values.values():
                value += 0.3 * th.randn_like(value)
        log_ent_coef = {"log_ent_coef": th.tensor([math.log(ENT_COEF)], dtype=th.float64)}
        moments = ({name: th.zeros_like(value) for name, value in log_ent_coef.items()} for _ in range(2))
        ent_coef = TrainState(log_ent_coef, *moments) if learned else TrainState({"ent_coef": th.tensor([ENT_COEF])}, {}, {})
        self.state = State(
            train_state(self.networks.actor), critic, target, ent_coef, th.tensor([-2.0, 5.0], dtype=th.float64)
        )
        self.start = th.randn(BATCH, OBS, dtype=th.float64)
        rollout = draw_rollout_noise(horizon, BATCH, OBS, ACTION, MEMBERS, th.device("cpu"))
        rollout = rollout._replace(actions=rollout.actions.double(), model=rollout.model.double())
        self.noise = Noise(rollout, th.tensor([3, 1]), policy.critic.draw_dropped(2, batch_size=BATCH))
        adam = coefficients(th.optim.Adam([nn.Parameter(th.zeros(1))], lr=LEARNING_RATE), 1)[0].double()
        target_entropy, gamma, tau = th.tensor([-2.0, GAMMA, TAU], dtype=th.float64)
        self.settings = Settings(adam, adam, adam, target_entropy, gamma, tau)

    def cast(self, dtype):
        """A copy in another precision."""
        other = deepcopy(self)

        def convert(value):
            if isinstance(value, th.Tensor):
                return value.to(dtype) if value.is_floating_point() else value
            if isinstance(value, dict):
                return {name: convert(each) for name, each in value.items()}
            if isinstance(value, nn.Module):
                return value.to(dtype)
            if hasattr(value, "_fields"):
                return type(value)(*map(convert, value))
            return type(value)(map(convert, value)) if isinstance(value, list | tuple) else value

        for name in ("networks", "model", "state", "start", "noise", "settings"):
            setattr(other, name, convert(getattr(other, name)))
        other.model.ensemble.to(dtype)
        return other

    def arguments(self, termination=far_away, reward=None):
        return self.networks, self.state, self.model, self.start, self.noise, self.settings, termination, reward

    def rollout(self, termination=far_away, reward=None):
        arguments = self.networks.actor, self.state.actor.parameters, self.model, self.start, self.noise.rollout
        return roll_out(*arguments, termination, reward)


# --- Computed once more, row by row ----------------------------------------------------------------------------------


def gaussian_by_hand(problem, parameters, obs):
    """Mean and standard deviation before squashing, of one observation."""
    actor = problem.policy.actor
    x = (obs - actor.standardise.mean) / actor.standardise.std
    for layer in (0, 2):
        x = nn.functional.silu(parameters[f"actor.latent_pi.{layer}.weight"] @ x + parameters[f"actor.latent_pi.{layer}.bias"])
    mean = parameters["actor.mu.weight"] @ x + parameters["actor.mu.bias"]
    return mean, nn.functional.softplus(parameters["actor.log_std.weight"] @ x + parameters["actor.log_std.bias"]) + 1e-5


def act_by_hand(problem, parameters, obs, noise):
    mean, std = gaussian_by_hand(problem, parameters, obs)
    before = mean + std * noise
    normal = th.distributions.Normal(mean, std)
    return before.tanh(), (normal.log_prob(before) - th.log(1 - before.tanh() ** 2 + 1e-6)).sum()


def critics_by_hand(problem, parameters, obs, action, row=None, dropped=None):
    """Q-values of all networks for one observation and action."""
    critic, bounds, values = problem.policy.critic, problem.state.bounds, []
    inputs = th.cat([(obs - critic.standardise.mean) / critic.standardise.std, action])
    for network in range(CRITICS):
        x = inputs
        for layer in range(3):
            if layer > 0:
                x = nn.functional.silu(x)
                if dropped is not None:
                    numbers = dropped[layer - 1]
                    # The units of one network lie together, and in these those of one row
                    own = [n % 16 for n in numbers.tolist() if n // 16 == network * BATCH + row]
                    keep = th.ones_like(x)
                    keep[own] = 0
                    x = x * keep / (1 - critic.dropout)
                x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
            x = x @ parameters[f"critic.weights.{layer}"][network] + parameters[f"critic.biases.{layer}"][network, 0]
        values.append((bounds[0] + bounds[1]) / 2 + (bounds[1] - bounds[0]) / 2 * x[0])
    return th.stack(values)


def model_by_hand(problem, obs, action, noise, member):
    ensemble = problem.model.ensemble
    x = (th.cat([obs, action]) - ensemble.input_mean) / ensemble.input_std
    for layer, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
        x = x @ weight[member] + bias[member, 0]
        if layer < len(ensemble.weights) - 1:
            x = nn.functional.silu(x)
    mean, log_var = x.split(1 + OBS)
    softplus = nn.functional.softplus
    log_var = ensemble.max_log_var - softplus(ensemble.max_log_var - log_var)
    log_var = ensemble.min_log_var + softplus(log_var - ensemble.min_log_var)
    sample = th.cat([mean[:1], mean[1:] + (log_var[1:] / 2).exp() * noise])
    raw = ensemble.target_mean + ensemble.target_std * sample
    return obs + raw[1:], raw[0]


def rollout_by_hand(problem, parameters, row):
    """Of one start state: observations, actions, log_probs and rewards up to a terminal transition; whether there is one."""
    noise, obs = problem.noise.rollout, problem.start[row]
    states, actions, log_probs, rewards = [obs], [], [], []
    for step in range(len(noise.model)):
        action, log_prob = act_by_hand(problem, parameters, obs, noise.actions[step, row])
        member = int((noise.slots[step] == row).nonzero()) // (len(noise.slots[step]) // MEMBERS)
        next_obs, reward = model_by_hand(problem, obs, action, noise.model[step, row], member)
        actions.append(action)
        log_probs.append(log_prob)
        rewards.append(reward)
        if next_obs[0].abs() > 1.5:
            return states, actions, log_probs, rewards, True
        obs = next_obs
        states.append(obs)
    action, log_prob = act_by_hand(problem, parameters, obs, noise.actions[-1, row])
    return states, [*actions, action], [*log_probs, log_prob], rewards, False


def target_by_hand(problem, row):
    states, actions, log_probs, rewards, ended = rollout_by_hand(problem, problem.state.actor.parameters, row)
    total = rewards[0]
    for t in range(1, len(rewards)):
        total = total + GAMMA**t * (rewards[t] - ENT_COEF * log_probs[t])
    if not ended:
        values = critics_by_hand(problem, problem.state.target, states[-1], actions[-1])
        low, high = problem.state.bounds
        value = min(values[3], values[1]).clamp(low, high)
        total = total + GAMMA ** len(rewards) * (value - ENT_COEF * log_probs[-1])
    return total


def actor_loss_by_hand(problem, parameters, critic, dropped):
    losses = []
    for row in range(BATCH):
        states, actions, log_probs, rewards, ended = rollout_by_hand(problem, parameters, row)
        total = sum(GAMMA**t * (reward - ENT_COEF * log_probs[t]) for t, reward in enumerate(rewards))
        if not ended:
            value = critics_by_hand(problem, critic, states[-1], actions[-1], row, dropped).mean()
            total = total + GAMMA ** len(rewards) * (value - ENT_COEF * log_probs[-1])
        losses.append(-total)
    return th.stack(losses).mean()


# --- Tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_rollout(seed):
    problem = Problem(seed)
    rollout = problem.rollout()
    # Some end, at different steps, and some do not
    assert 0 < rollout.alive[1].sum() < BATCH
    assert rollout.alive[1].sum() > rollout.alive[-1].sum() > 0
    for row in range(BATCH):
        states, actions, log_probs, rewards, ended = rollout_by_hand(problem, problem.state.actor.parameters, row)
        n = len(rewards)
        assert rollout.alive[:, row].tolist() == [1.0] * n + ([0.0] * (HORIZON + 1 - n) if ended else [1.0])
        for own, by_hand in zip(rollout[:4], (states, actions, log_probs, rewards), strict=True):
            th.testing.assert_close(own[: len(by_hand), row], th.stack(by_hand))
    assert rollout.lost.sum() == 0


def test_batch_is_split_evenly_among_elites():
    problem = Problem()
    slots = problem.noise.rollout.slots
    assert slots.shape == (HORIZON, BATCH)
    assert all(sorted(step.tolist()) == list(range(BATCH)) for step in slots)
    assert len({tuple(step.tolist()) for step in slots}) == HORIZON
    # A batch that cannot be split evenly: each row once, too
    uneven = draw_rollout_noise(1, BATCH - 1, OBS, ACTION, MEMBERS, th.device("cpu")).slots
    assert sorted(uneven[0].tolist()) == list(range(BATCH))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 11])
def test_batches_that_cannot_be_split_evenly(n):
    """Each row is what its elite says of it, whatever fills the slots that are left."""
    problem = Problem()
    noise = draw_rollout_noise(1, n, OBS, ACTION, MEMBERS, th.device("cpu"))
    arguments = problem.start[:n], th.zeros(n, ACTION, dtype=th.float64), noise.model[0].double(), noise.slots[0]
    next_obs, rewards = model_step(problem.model, *arguments)
    for row in range(n):
        member = int((noise.slots[0] == row).nonzero()) // (len(noise.slots[0]) // MEMBERS)
        by_hand = model_by_hand(problem, arguments[0][row], arguments[1][row], arguments[2][row], member)
        th.testing.assert_close((next_obs[row], rewards[row]), by_hand)


def test_reward_has_no_noise_and_observations_do():
    problem = Problem()
    before = problem.rollout()
    noise = problem.noise.rollout._replace(model=problem.noise.rollout.model + 1)
    problem.noise = problem.noise._replace(rollout=noise)
    after = problem.rollout()
    th.testing.assert_close(after.rewards[0], before.rewards[0], rtol=0, atol=0)
    alive = (before.alive[1] * after.alive[1]) > 0
    assert (after.obs[1] - before.obs[1])[alive].abs().min() > 0


def test_target():
    problem = Problem()
    ent_coef = th.tensor([ENT_COEF], dtype=th.float64)
    targets = critic_targets(
        problem.networks.critic, problem.state, problem.rollout(), problem.noise.critics, ent_coef, problem.settings.gamma
    )
    th.testing.assert_close(targets, th.stack([target_by_hand(problem, row) for row in range(BATCH)]))


def test_value_in_target_stays_within_the_bounds():
    problem = Problem()
    for weight in problem.state.target.values():
        weight *= 3
    problem.state.bounds.copy_(th.tensor([-0.5, 0.5]))
    ent_coef = th.tensor([0.0], dtype=th.float64)
    rollout, arguments = problem.rollout(), (problem.noise.critics, ent_coef, problem.settings.gamma)
    targets = critic_targets(problem.networks.critic, problem.state, rollout, *arguments)
    lows, highs = (
        soft_returns(rollout, ent_coef, problem.settings.gamma, th.full((BATCH,), bound, dtype=th.float64))
        for bound in (-0.5, 0.5)
    )
    goes_on = rollout.alive[-1] > 0
    at_bound = ((targets - lows).abs() < 1e-12) | ((targets - highs).abs() < 1e-12)
    assert (lows - 1e-12 <= targets).all() and (targets <= highs + 1e-12).all()
    assert at_bound[goes_on].any()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_critics_learn_the_squared_error(dropout):
    problem = Problem(dropout=dropout)
    before = deepcopy(problem.state)
    loss = critic_update(*problem.arguments())[0]
    dropped = [units[0] for units in problem.noise.dropped] or None
    # The bounds have moved first
    parameters = {name: value.clone().requires_grad_() for name, value in before.critic.parameters.items()}
    moved, problem.state = problem.state, before._replace(bounds=problem.state.bounds)
    expected = sum(
        (
            critics_by_hand(problem, parameters, problem.start[row], problem.rollout().actions[0, row], row, dropped)
            - target_by_hand(problem, row)
        )
        .square()
        .sum()
        / BATCH
        for row in range(BATCH)
    )
    th.testing.assert_close(loss, expected.detach())
    expected.backward()
    th.testing.assert_close(flat(gradient(moved.critic)), flat({name: p.grad for name, p in parameters.items()}))
    # Adam's first step is the sign of the gradient
    steps = flat(moved.critic.parameters) - flat(before.critic.parameters)
    large = flat(gradient(moved.critic)).abs() > 1e-4
    expected_steps = -LEARNING_RATE * flat(gradient(moved.critic)).sign()
    th.testing.assert_close(steps[large], expected_steps[large], rtol=1e-3, atol=0)
    # Target critics follow, the actor does not
    th.testing.assert_close(flat(moved.target), 0.9 * flat(before.target) + 0.1 * flat(moved.critic.parameters))
    th.testing.assert_close(flat(moved.actor.parameters), flat(before.actor.parameters), rtol=0, atol=0)
    assert moved.ent_coef.parameters == before.ent_coef.parameters


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_of_the_actor_by_finite_differences(dropout):
    """Through policy, noise, model, rewards and critics, on everything computed by hand."""
    problem = Problem(dropout=dropout)
    before = deepcopy(problem.state.actor.parameters)
    loss = joint_update(*problem.arguments())[1]
    dropped = [units[1] for units in problem.noise.dropped] or None
    # The critics are those from after their own step
    critic = problem.state.critic.parameters
    th.testing.assert_close(loss, actor_loss_by_hand(problem, before, critic, dropped))
    own = flat(gradient(problem.state.actor))
    th.manual_seed(7)
    for _ in range(3):
        direction = {name: th.randn_like(value) for name, value in before.items()}
        high, low = (
            actor_loss_by_hand(
                problem, {name: value + size * direction[name] for name, value in before.items()}, critic, dropped
            )
            for size in (1e-6, -1e-6)
        )
        th.testing.assert_close((high - low) / 2e-6, own @ flat(direction), rtol=1e-5, atol=1e-7)
    assert own.abs().max() > 0.01


def test_gradient_of_the_entropy_coefficient():
    problem = Problem()
    log_prob = th.stack([rollout_by_hand(problem, problem.state.actor.parameters, row)[2][0] for row in range(BATCH)])
    loss, before = joint_update(*problem.arguments())[2:4]
    th.testing.assert_close(gradient(problem.state.ent_coef)["log_ent_coef"][0], -(log_prob - 2.0).mean())
    th.testing.assert_close(loss, -math.log(ENT_COEF) * (log_prob - 2.0).mean())
    assert before.item() == pytest.approx(ENT_COEF)


def test_fixed_entropy_coefficient_stays():
    problem = Problem(learned=False)
    result = joint_update(*problem.arguments())
    assert result[2] == 0 and result[3].item() == pytest.approx(ENT_COEF)
    assert problem.state.ent_coef.parameters["ent_coef"].item() == pytest.approx(ENT_COEF)


def test_bounds():
    problem = Problem()
    rollout, ent_coef = problem.rollout(), th.tensor([ENT_COEF], dtype=th.float64)
    alive = rollout.alive[:-1].numpy() > 0
    soft = (rollout.rewards - ENT_COEF * rollout.log_prob[:-1]).numpy()[alive]
    limits = np.quantile(soft, [0.01, 0.99]) / (1 - GAMMA)
    first, later = th.zeros(2, dtype=th.float64), th.tensor([-2.0, 5.0], dtype=th.float64)
    update_bounds(first, rollout, ent_coef, problem.settings.gamma)
    update_bounds(later, rollout, ent_coef, problem.settings.gamma)
    np.testing.assert_allclose(first.numpy(), limits)
    np.testing.assert_allclose(later.numpy(), (1 - 3e-4) * np.array([-2.0, 5.0]) + 3e-4 * limits)


def test_critics_begin_at_the_centre_of_the_bounds():
    policy = DHMBPOPolicy(
        spaces.Box(-1, 1, (OBS,), np.float32), spaces.Box(-1, 1, (ACTION,), np.float32), lambda _: 1e-3, net_arch=[8]
    )
    policy.critic.bounds.copy_(th.tensor([2.0, 6.0]))
    values = policy.critic(th.randn(7, OBS), th.rand(7, ACTION))
    assert len(values) == 5 and all((value == 4.0).all() and value.shape == (7, 1) for value in values)


def test_dropout_leaves_out_the_share_that_it_says():
    policy = DHMBPOPolicy(
        *(spaces.Box(-1, 1, (OBS,), np.float32), spaces.Box(-1, 1, (ACTION,), np.float32), lambda _: 1e-3),
        net_arch=[64, 32],
        dropout=0.2,
    )
    dropped = policy.critic.draw_dropped(2, batch_size=50)
    assert [units.shape[0] for units in dropped] == [2, 2]
    for units, width in zip(dropped, (64, 32), strict=True):
        n_units = 5 * 50 * width
        assert units.min() >= 0 and units.max() < n_units
        assert len(units[0].unique()) / n_units == pytest.approx(0.2, abs=0.01)
        assert (units[0] != units[1]).any()


class LinearPolicy(nn.Module):
    """a = tanh(atanh(-K s)), hardly any noise."""

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(gain.clone())

    def forward(self, obs):
        mean = th.atanh(-obs @ self.gain.T)
        return mean, th.full_like(mean, -30.0)


class QuadraticValue(nn.Module):
    """-s' P s, whatever the action."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, obs, actions, dropped):
        return -((obs @ self.matrix) * obs).sum(dim=1).expand(1, -1)


def test_linear_quadratic_problem():
    """
    s' = A s + B a, reward -(s' Q s + a' R a), and after the horizon the value -s' P s. With P of Riccati's equation, the
    optimal gain is the same at every step, and the gradient is 0 there. Elsewhere it is known in closed form.
    """
    a = th.tensor([[1.0, 0.1], [-0.2, 0.95]], dtype=th.float64)
    b = th.tensor([[0.0], [0.3]], dtype=th.float64)
    q, r, gamma = th.diag(th.tensor([1.0, 0.5], dtype=th.float64)), th.tensor([[0.2]], dtype=th.float64), 0.9
    p = q.clone()
    for _ in range(2_000):
        gain = th.linalg.solve(r + gamma * b.T @ p @ b, gamma * b.T @ p @ a)
        p = q + gain.T @ r @ gain + gamma * (a - b @ gain).T @ p @ (a - b @ gain)

    ensemble = Ensemble(2, 1, (), 1, 1, 1e-3).double()
    # (reward, change) and log-variances, which are as low as they can be
    weight = th.zeros(1, 3, 6, dtype=th.float64)
    weight[0, :2, 1:3], weight[0, 2:, 1:3] = (a - th.eye(2)).T, b.T
    bias = th.zeros(1, 1, 6, dtype=th.float64)
    ensemble.min_log_var.data.fill_(-60.0)
    bias[..., 3:] = -60.0
    none = th.zeros(2, dtype=th.bool)
    model = Model(ensemble, [weight], [bias], none, none)

    def reward(obs, actions, next_obs):
        return -((obs @ q) * obs).sum(dim=1) - ((actions @ r) * actions).sum(dim=1)

    def never(obs, actions, next_obs):
        return th.zeros(len(obs), dtype=th.bool)

    th.manual_seed(0)
    start = 0.1 * th.randn(64, 2, dtype=th.float64)
    noise = draw_rollout_noise(5, 64, 2, 1, 1, th.device("cpu"))
    noise = noise._replace(actions=noise.actions.double(), model=noise.model.double())
    adam = coefficients(th.optim.Adam([nn.Parameter(th.zeros(1))], lr=1e-3), 1)[0].double()
    settings = Settings(adam, adam, adam, *th.tensor([-1.0, gamma, 0.0], dtype=th.float64))

    def by_rollout(gain):
        policy, value = LinearPolicy(gain), QuadraticValue(p)
        state = State(train_state(policy), train_state(value), {}, None, th.tensor([-1.0, 1.0], dtype=th.float64))
        rollout, pull_back, *_ = vjp(
            lambda parameters: roll_out(policy, parameters, model, start, noise, never, reward), state.actor.parameters
        )
        rollout = Rollout(*(column.detach() for column in rollout))
        no_entropy = th.zeros(1, dtype=th.float64)
        update_actor(Networks(policy, value), state, rollout, pull_back, (), no_entropy, settings)
        return gradient(state.actor)["gain"]

    def closed_form(gain):
        closed, values = a - b @ gain, [p]
        for _ in range(5):
            values.insert(0, q + gain.T @ r @ gain + gamma * closed.T @ values[0] @ closed)
        total, states = th.zeros(1, 2, dtype=th.float64), start
        for t in range(5):
            second = states.T @ states / len(states)
            total += 2 * gamma**t * ((r + gamma * b.T @ values[t + 1] @ b) @ gain - gamma * b.T @ values[t + 1] @ a) @ second
            states = states @ closed.T
        return total

    assert by_rollout(gain).abs().max() < 1e-8
    for other in (gain + 0.1, 0.8 * gain, th.zeros_like(gain)):
        th.testing.assert_close(by_rollout(other), closed_form(other), rtol=1e-6, atol=1e-9)
        assert closed_form(other).abs().max() > 1e-4


def test_terminations_that_were_found_out_before():
    """A function that cannot be part of a graph is asked in the same rollout, made before without gradients."""
    inside, outside = Problem(), Problem()
    ended = outside.rollout().alive[1:] == 0
    results = joint_update(*inside.arguments()), joint_update(*outside.arguments(termination=ended))
    th.testing.assert_close(*results, rtol=0, atol=0)
    th.testing.assert_close(flat(inside.state.actor.parameters), flat(outside.state.actor.parameters), rtol=0, atol=0)


def test_rows_that_have_ended_bring_nothing_into_a_gradient():
    """From the step after its end on, the gradient of the reward function is not a number for such a row."""
    steps = []

    def after_two(obs, actions, next_obs):
        return (th.arange(BATCH) < 4) & (len(steps) >= 2)

    def root(obs, actions, next_obs):
        steps.append(0)
        # 0 of what has ended, and a root has no derivative there
        from_here = (th.arange(BATCH) < 4) & (len(steps) > 2)
        size = (actions[:, 0] * obs[:, 0]).square() * ~from_here
        return 0.1 * obs[:, 1] + th.where(from_here, size.sqrt(), 0.0)

    problem = Problem()
    results = joint_update(*problem.arguments(after_two, root))
    assert len(steps) == HORIZON
    assert results.isfinite().all() and results[4] < 1
    assert flat(problem.state.actor.parameters).isfinite().all()
    assert flat(gradient(problem.state.actor)).abs().max() > 0


def test_what_is_no_number_ends_a_rollout_and_is_counted():
    def with_infinity(obs, actions, next_obs):
        return th.where(obs[:, 1] > 0.5, th.inf, obs[:, 0])

    problem = Problem()
    rollout = problem.rollout(far_away, with_infinity)
    lost = rollout.lost > 0
    assert lost.any() and rollout.rewards.isfinite().all()
    assert (rollout.alive[1:][lost] == 0).all() and (rollout.alive[:-1][lost] == 1).all()
    assert joint_update(*problem.arguments(far_away, with_infinity))[-1] == lost.sum()
    assert problem.rollout().lost.sum() == 0
    # What the networks make is not the reward's fault
    problem.start[0, 0] = th.nan
    rollout = problem.rollout(far_away, lambda obs, actions, next_obs: next_obs[:, 0])
    assert rollout.lost.sum() == 0 and rollout.alive[1, 0] == 0


def test_reward_in_another_precision():
    problem = Problem().cast(th.float32)
    rollout = problem.rollout(far_away, lambda obs, actions, next_obs: -next_obs[:, 0].double())
    assert rollout.rewards.dtype == th.float32
    assert joint_update(*problem.arguments(far_away, lambda obs, actions, next_obs: -next_obs[:, 0].double())).isfinite().all()


def test_goals_stay_and_bits_are_bits():
    problem = Problem()
    goal, bit = th.tensor([False, True, False]), th.tensor([False, False, True])
    problem.model = problem.model._replace(constant=goal, binary=bit)
    rollout = problem.rollout()
    assert (rollout.obs[:, :, 1] == problem.start[:, 1]).all()
    later = rollout.obs[1:, :, 2][rollout.alive[1:] > 0]
    assert set(later.tolist()) <= {0.0, 1.0}
    assert joint_update(*problem.arguments())[:2].isfinite().all()


def test_far_from_all_data_gradients_are_finite():
    problem = Problem()
    problem.start[0] = 1e30
    never = th.zeros(HORIZON, BATCH, dtype=th.bool)
    single = problem.cast(th.float32)
    results = joint_update(*single.arguments(termination=never))
    assert results.isfinite().all()
    assert flat(gradient(single.state.actor)).isfinite().all()


@pytest.mark.parametrize("update", [critic_update, joint_update])
def test_compiled_is_eager(update):
    problem = Problem(horizon=2).cast(th.float32)
    eager, fast = deepcopy(problem), deepcopy(problem)
    results = update(*eager.arguments()), compiled(update, "cpu")(*fast.arguments())
    th.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    for own, other in ((eager.state.actor, fast.state.actor), (eager.state.critic, fast.state.critic)):
        th.testing.assert_close(flat(own.first), flat(other.first), rtol=1e-4, atol=1e-6)
    th.testing.assert_close(flat(eager.state.target), flat(fast.state.target), rtol=1e-4, atol=1e-4)
    th.testing.assert_close(eager.state.bounds, fast.state.bounds)


@pytest.mark.parametrize("termination", [far_away, None])
def test_a_step_of_a_distribution_rollout_is_one_of_a_training_rollout(termination):
    problem = Problem()
    rollout = problem.rollout()
    noise = RolloutNoise(*(each[0] for each in problem.noise.rollout))
    arguments = problem.networks.actor, problem.state.actor.parameters, problem.model, problem.start, noise, termination
    actions, next_obs, goes_on = state_step(*arguments)
    th.testing.assert_close(actions, rollout.actions[0], rtol=0, atol=0)
    alive = rollout.alive[1] > 0
    th.testing.assert_close(next_obs[alive], rollout.obs[1][alive], rtol=0, atol=0)
    assert (goes_on == (alive if termination else th.ones_like(alive))).all() and not alive.all()


def test_compiled_step_is_eager():
    problem = Problem().cast(th.float32)
    noise = RolloutNoise(*(each[0] for each in problem.noise.rollout))
    arguments = problem.networks.actor, problem.state.actor.parameters, problem.model, problem.start, noise, far_away
    with th.no_grad():
        for own, fast in zip(state_step(*arguments), compiled(state_step, "cpu")(*arguments), strict=True):
            th.testing.assert_close(own, fast)


def test_update_critics_uses_two_of_the_targets():
    """Each other pair, and each order, gives what that pair says."""
    problem = Problem(dropout=0.0)
    rollout, ent_coef = problem.rollout(), th.tensor([ENT_COEF], dtype=th.float64)

    def targets(*two):
        return critic_targets(
            problem.networks.critic, problem.state, rollout, th.tensor(two), ent_coef, problem.settings.gamma
        )

    th.testing.assert_close(targets(3, 1), targets(1, 3), rtol=0, atol=0)
    assert (targets(3, 1) != targets(0, 2)).any()
    assert (targets(3, 1) <= th.minimum(targets(3, 3), targets(1, 1)) + 1e-12).all()
    loss = update_critics(problem.networks, problem.state, rollout, problem.noise, ent_coef, problem.settings)
    assert loss > 0
