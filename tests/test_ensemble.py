"""The networks and their training, against computations that share no code with them."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_mbpo.dynamics import training
from sb3_mbpo.dynamics.ensemble import Ensemble, nll_shares, weight_decays
from sb3_mbpo.dynamics.training import (
    MAX_MEASURED,
    bootstrap,
    budget,
    fit,
    holdout_errors,
    holdout_nll,
    r2,
    shuffle_rows,
    split_at_random,
    split_for_good,
    weight_decay,
)


def make_ensemble(obs_dim=3, action_dim=2, hidden_sizes=(16, 16, 16, 16), n_members=4, n_elites=2, learning_rate=1e-3):
    return Ensemble(obs_dim, action_dim, hidden_sizes, n_members, n_elites, learning_rate)


def constant_ensemble(obs_dim, action_dim, means, log_var=-30.0, n_elites=None):
    """Member m predicts ``means[m]`` for the reward and every difference, whatever the input."""
    ensemble = make_ensemble(obs_dim, action_dim, (4,), len(means), n_elites or len(means))
    with th.no_grad():
        for parameter in [*ensemble.weights, *ensemble.biases]:
            parameter.zero_()
        ensemble.min_log_var.fill_(-40.0)
        ensemble.biases[-1][:, :, : 1 + obs_dim] = th.tensor(means)[:, None, None]
        ensemble.biases[-1][:, :, 1 + obs_dim :] = log_var
    return ensemble


def linear_ensemble(matrix, sigma, drift=None):
    """
    An ensemble that predicts ``matrix.T @ (obs, action) + drift`` with standard deviation ``sigma``: far from 0, SiLU is a
    straight line.

    :param matrix: ``(obs_dim + action_dim, 1 + obs_dim)``, the reward first
    """
    matrix, far = th.as_tensor(matrix, dtype=th.float32), 50.0
    n_in, n_out = matrix.shape
    drift = th.zeros(n_out) if drift is None else th.as_tensor(drift, dtype=th.float32)
    ensemble = Ensemble(n_out - 1, n_in - n_out + 1, [n_in], n_members=3, n_elites=2, learning_rate=1e-3)
    with th.no_grad():
        for parameter, value in (
            (ensemble.weights[0], th.eye(n_in)),
            (ensemble.biases[0], th.tensor(far)),
            (ensemble.weights[1], th.cat([matrix, th.zeros_like(matrix)], dim=1)),
            (ensemble.biases[1], th.cat([drift - far * matrix.sum(dim=0), th.full((n_out,), 1e3)])),
            (ensemble.max_log_var, th.tensor(2 * math.log(sigma))),
            (ensemble.min_log_var, th.tensor(-100.0)),
        ):
            parameter.copy_(value.expand_as(parameter))
        ensemble.n_fits += 1
    return ensemble


# An oracle in float64 NumPy, one member, one row and one weight at a time


def softplus(x):
    return np.logaddexp(0.0, x)


def oracle_loss(parameters, x, y, betas, fixed):
    """
    :param fixed: Parameters that the weights of the likelihood are from, which have no gradient
    """
    weights, _, upper, lower, (mean, std, target_mean, target_std), decays = parameters
    varies = target_std > 0

    def predict(row, member, parameters):
        weights, biases, upper, lower, *_ = parameters
        hidden = (row - mean) / std
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            hidden = hidden @ weight[member] + bias[member, 0]
            if layer < len(weights) - 1:
                hidden = hidden / (1 + np.exp(-hidden))
        mu, log_var = np.split(hidden, 2)
        log_var = upper - softplus(upper - log_var)
        return mu, lower + softplus(log_var - lower)

    total, shares = 0.0, []
    for member in range(len(weights[0])):
        losses = []
        share_of_rows = np.exp([predict(row, member, fixed)[1] for row in x[member]])
        share_of_rows **= [betas[0], *[betas[1]] * (len(varies) - 1)]
        share_of_rows[:, 0] /= share_of_rows[:, 0].mean()
        share_of_rows[:, 1:] /= share_of_rows[:, 1:][:, varies[1:]].mean()
        shares += list(share_of_rows)
        for row, target, share in zip(x[member], y[member], share_of_rows, strict=True):
            mu, log_var = predict(row, member, parameters)
            errors = mu[varies] - ((target - target_mean)[varies] / target_std[varies])
            squares = errors**2 / np.exp(log_var[varies])
            # The reward comes first, and is always Gaussian
            far = (squares > 25) & (np.flatnonzero(varies) > 0)
            squares[far] = 10 * np.sqrt(squares[far]) - 25
            losses.append(np.mean(share[varies] * (squares + log_var[varies])))
        total += np.mean(losses)
        total += sum(decay * np.sum(weight[member] ** 2) / 2 for decay, weight in zip(decays, weights, strict=True))
    return total + 0.01 * np.sum((np.mean(shares, axis=0) * (upper - lower))[varies])


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.5, 0.25)])
def test_loss_and_gradients_against_float64(betas):
    ensemble = make_ensemble().double()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 5, 5)), rng.normal(size=(4, 5, 4))
    # Further than five standard deviations
    y[:, 0] *= 100
    assert np.abs(y[:, 0] - 5).max() / 7 > 10
    targets = rng.normal(5, 7, size=(50, 4))
    # Constant: it does not count
    targets[:, 2] = 3.0
    ensemble.set_stats(th.tensor(rng.normal(2, 3, size=(50, 5))), th.tensor(targets))
    with th.no_grad():
        for parameter in ensemble.parameters():
            parameter += 0.1 * th.randn_like(parameter)
    loss = ensemble.loss(ensemble.unit_inputs(th.tensor(x)), ensemble.unit_targets(th.tensor(y)), nll_betas=betas)
    loss.backward()

    arrays = [parameter.detach().numpy().copy() for parameter in [*ensemble.weights, *ensemble.biases]]
    arrays += [ensemble.max_log_var.detach().numpy().copy(), ensemble.min_log_var.detach().numpy().copy()]
    gradients = [p.grad.numpy() for p in [*ensemble.weights, *ensemble.biases, ensemble.max_log_var, ensemble.min_log_var]]

    def parameters():
        stats = ensemble.input_mean, ensemble.input_std, ensemble.target_mean, ensemble.target_std
        decays = [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]
        return arrays[:5], arrays[5:10], arrays[10], arrays[11], [each.numpy() for each in stats], decays

    fixed = deepcopy(parameters())

    def oracle():
        return oracle_loss(parameters(), x, y, betas, fixed)

    assert loss.item() == pytest.approx(oracle(), rel=1e-12)
    for array, gradient in zip(arrays, gradients, strict=True):
        for index in rng.choice(array.size, size=min(array.size, 6), replace=False):
            index = np.unravel_index(index, array.shape)
            value, step = array[index], 1e-6
            array[index] = value + step
            above = oracle()
            array[index] = value - step
            below = oracle()
            array[index] = value
            assert gradient[index] == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-7)


def test_weight_decays():
    assert weight_decays(5) == [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]
    assert weight_decays(2) == [2.5e-5, 1e-4]
    assert weight_decays(3) == [2.5e-5, 5e-5, 1e-4]


def test_initialisation():
    ensemble = make_ensemble(11, 3, (200, 200, 200, 200), 7, 5)
    for weight, bias in zip(ensemble.weights, ensemble.biases, strict=True):
        std = 1 / (2 * np.sqrt(weight.shape[1]))
        assert weight.abs().max() <= 2 * std
        # The standard deviation of a normal cut off at two of its own
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.03)
        assert (bias == 0).all()
        assert not th.equal(weight[0], weight[1])
    assert (ensemble.max_log_var == 0.5).all() and (ensemble.min_log_var == -10).all()
    assert not ensemble.is_fitted


def test_construction_leaves_the_random_state_alone():
    th.manual_seed(0)
    expected = th.rand(3)
    th.manual_seed(0)
    make_ensemble()
    assert th.equal(th.rand(3), expected)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 + 0.1, -1e-20])
def test_constant_input_does_not_divide_by_zero(constant):
    ensemble = make_ensemble()
    inputs = th.randn(100, 5) * 3 + 1
    inputs[:, 2] = constant
    ensemble.set_stats(inputs, th.randn(100, 4))
    varying = [0, 1, 3, 4]
    np.testing.assert_allclose(ensemble.input_mean, inputs.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(ensemble.input_std[varying], inputs.double().numpy().std(0)[varying], rtol=1e-12)
    mean, std = ensemble.predict(inputs)
    assert th.isfinite(mean).all() and th.isfinite(std).all()
    # What it was not trained on, it takes for what it was
    inputs[:, 2] = 17.0
    assert th.equal(ensemble.predict(inputs)[0], mean)


@settings(deadline=None, max_examples=25)
@given(
    obs_dim=st.integers(1, 5),
    action_dim=st.integers(1, 4),
    hidden_sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    n_members=st.integers(1, 4),
    n_rows=st.integers(1, 40),
    data=st.data(),
)
def test_shapes(obs_dim, action_dim, hidden_sizes, n_members, n_rows, data):
    n_elites = data.draw(st.integers(1, n_members))
    ensemble = make_ensemble(obs_dim, action_dim, hidden_sizes, n_members, n_elites)
    obs, actions = th.randn(n_rows, obs_dim), th.randn(n_rows, action_dim)
    next_obs, rewards = ensemble.sample(obs, actions)
    assert next_obs.shape == obs.shape and rewards.shape == (n_rows,)
    inputs = th.cat([obs, actions], dim=1)
    targets = th.randn(n_rows, 1 + obs_dim)
    assert holdout_errors(ensemble, inputs, targets).shape == (n_members,)
    assert ensemble.nll(inputs, targets).shape == (n_rows,) and r2(ensemble, inputs, targets).shape == (1 + obs_dim,)
    mean, std = ensemble.predict(inputs)
    assert mean.shape == std.shape == (n_members, n_rows, 1 + obs_dim)
    # Softly clamped between the bounds
    log_var = 2 * std.log()
    assert (log_var < 0.5 + 1e-3).all() and (log_var > -10 - 1e-3).all()


def test_bounds_clamp_extreme_log_variances():
    ensemble = make_ensemble()
    with th.no_grad():
        ensemble.biases[-1][:, :, 4:] = 1e4
    assert th.allclose(ensemble(th.zeros(4, 1, 5))[1], th.tensor(0.5), atol=1e-3)
    with th.no_grad():
        ensemble.biases[-1][:, :, 4:] = -1e4
    assert th.allclose(ensemble(th.zeros(4, 1, 5))[1], th.tensor(-10.0), atol=1e-3)


def test_samples_come_from_elites_only_and_uniformly():
    th.manual_seed(0)
    ensemble = constant_ensemble(2, 1, means=[0.0, 1.0, 2.0, 3.0, 4.0], n_elites=3)
    ensemble.elites.copy_(th.tensor([1.0, 4.0, 2.0]))
    n = 30_000
    draws = []
    for _ in range(2):
        next_obs, rewards = ensemble.sample(th.full((n, 2), 10.0), th.zeros(n, 1))
        # One member for the whole transition
        assert th.allclose(next_obs - 10, rewards[:, None].expand(n, 2), atol=1e-4)
        draws.append(rewards.round().int())
    members, counts = draws[0].unique(return_counts=True)
    assert members.tolist() == [1, 2, 4]
    # Five standard deviations of a binomial
    assert np.abs(counts.numpy() - n / 3).max() < 5 * np.sqrt(n * 2 / 9)
    # Drawn anew at each step
    agreement = (draws[0] == draws[1]).float().mean().item()
    assert abs(agreement - 1 / 3) < 5 * np.sqrt(2 / 9 / n)


def test_samples_have_the_predicted_distribution():
    th.manual_seed(0)
    ensemble = make_ensemble(3, 2, n_members=1, n_elites=1)
    ensemble.set_stats(th.randn(100, 5) * 4, th.randn(100, 4) * th.tensor([1.0, 20.0, 0.1, 3.0]) + 5)
    row = th.randn(1, 5)
    mean, std = (each[0, 0] for each in ensemble.predict(row))
    n = 200_000
    next_obs, rewards = ensemble.sample(row[:, :3].expand(n, 3), row[:, 3:].expand(n, 2))
    output = th.cat([rewards[:, None], next_obs - row[:, :3]], dim=1)
    np.testing.assert_allclose((output - mean).mean(0) / std, 0, atol=5 / np.sqrt(n))
    np.testing.assert_allclose(output.std(0), std, rtol=0.02)
    # Independent over dimensions and rows
    correlation = np.corrcoef(output.T.numpy())
    assert np.abs(correlation - np.eye(4)).max() < 5 / np.sqrt(n)


def test_split_and_bootstrap():
    for n, n_holdout in [(2, 1), (4, 1), (10, 2), (1_000, 200), (25_000, 5_000), (100_000, 5_000)]:
        train, holdout = split_at_random(n)
        assert len(holdout) == n_holdout
        assert th.cat([train, holdout]).sort().values.equal(th.arange(n))
    indices = bootstrap(10_000, 3)
    assert indices.shape == (3, 10_000)
    for rows in indices:
        # With replacement a share of 1/e is never drawn
        assert len(rows.unique()) / 10_000 == pytest.approx(1 - np.exp(-1), abs=0.02)
    assert (indices[0] == indices[1]).float().mean() < 0.01
    shuffled = shuffle_rows(indices)
    assert shuffled.sort(dim=1).values.equal(indices.sort(dim=1).values)
    assert (shuffled == indices).float().mean() < 0.01


def test_budget():
    assert [budget(1.0, 250, n) for n in (1_000, 5_000, 250_000)] == [500, 300, 251] and budget(0.5, 250, 5_000) == 150
    # Everything is new to the first training
    assert budget(1.0, 501, 501) == 1_501 and budget(1.0, 5_001, 5_001) == 6_001
    assert budget(0.01, 10, 1_000) == 1
    assert budget(None, 250, 250) is None
    # A replay buffer that was loaded
    assert budget(1.0, 500_000, 500_000) == 20_000 and budget(0.1, 500_000, 1_000_000) == 2_000


@given(st.integers(1_000, 20_000), st.integers(1, 50), st.sampled_from([10, 50, 250]))
def test_gradient_steps_do_not_depend_on_how_often_the_model_is_trained(n, n_trainings, every):
    """One for each transition, and another 1,000 whenever they become e times as many."""
    sizes = range(n + every, n + every * n_trainings + 1, every)
    steps = sum(budget(1.0, every, size) for size in sizes)
    expected = sizes[-1] - n + 1_000 * np.log(sizes[-1] / n)
    # A sum for an integral, each part rounded
    assert abs(steps - expected) <= every * 1_000 * (1 / n - 1 / sizes[-1]) + 0.5 * n_trainings


def test_weight_decay_is_that_of_a_prior():
    assert [weight_decay(n) for n in (10, 3_000, 6_000, 100_000)] == [0.1, 0.1, 0.05, 0.003]


@given(st.integers(2, 5_000), st.integers(1, 500))
def test_what_is_held_out_stays_held_out(n, more):
    train, holdout = split_for_good(n)
    assert th.cat([train, holdout]).sort().values.equal(th.arange(n)) and len(train) > 0 and len(holdout) > 0
    if n > 10:
        assert set(holdout.tolist()) <= set(split_for_good(n + more)[1].tolist())


@pytest.mark.parametrize("n_envs", range(1, 21))
def test_parallel_environments_are_held_out_alike(n_envs):
    _, holdout = split_for_good(2_000 * n_envs)
    shares = np.bincount(holdout.numpy() % n_envs, minlength=n_envs) / 2_000
    assert np.abs(shares - 0.1).max() < 0.02


def numbered_data(n, obs_dim=3, action_dim=2, seed=0):
    """A random nonlinear system; the first input is the number of the row, scaled down."""
    rng = th.Generator().manual_seed(seed)
    inputs = th.randn(n, obs_dim + action_dim, generator=rng)
    inputs[:, 0] = th.arange(n) / n
    matrix = th.randn(obs_dim + action_dim, 1 + obs_dim, generator=rng)
    return inputs, th.tanh(inputs @ matrix) + 0.1 * th.randn(n, 1 + obs_dim, generator=rng)


def test_fit_follows_the_paper(monkeypatch):
    """Watch a whole training: which rows each member saw, when it stopped, which weights and elites it kept."""
    th.manual_seed(1)
    n, n_members = 600, 4
    inputs, targets = numbered_data(n)
    ensemble = make_ensemble(n_members=n_members, n_elites=2, learning_rate=5e-3)
    step, holdout_error = training.train_step, training.holdout_errors
    seen, errors, weights, held_out = [], [], [], []

    def watched_step(self, state, x, y, numbers):
        # The likelihood itself, and no decay but that in the loss
        assert numbers[7:].tolist() == [1, 0, 0]
        number = x[:, :, 0] * self.input_std[0] + self.input_mean[0]
        seen.append((number * n).round().int())
        return step(self, state, x, y, numbers)

    def watched_error(self, x, y):
        held_out.append((x, y))
        errors.append(holdout_error(self, x, y).numpy().copy())
        weights.append([parameter.detach().clone() for parameter in [*self.weights, *self.biases]])
        return holdout_error(self, x, y)

    monkeypatch.setattr(training, "train_step", watched_step)
    monkeypatch.setattr(training, "holdout_errors", watched_error)
    result = fit(ensemble, inputs, targets)
    # After each epoch, and once more with the weights that are kept
    n_epochs, last_error = len(errors) - 1, errors.pop()

    # Bootstraps: every epoch shows a member the same rows, its own, and none of the holdout
    assert held_out[0][0].shape == (120, 5)
    holdout_rows = set((held_out[0][0][:, 0] * n).round().int().tolist())
    per_epoch = len(seen) // n_epochs
    epochs = [th.cat(seen[i * per_epoch : (i + 1) * per_epoch], dim=1) for i in range(n_epochs)]
    # 480 rows, gone through nine times, each time in another order
    assert epochs[0].shape == (n_members, 9 * 480) and seen[0].shape[1] == 256
    passes = [one for epoch in epochs for one in epoch.split(480, dim=1)]
    for one in passes:
        assert one.sort(dim=1).values.equal(passes[0].sort(dim=1).values)
    assert not passes[0].equal(passes[1]) and not passes[0].equal(passes[9])
    for member in range(n_members):
        assert holdout_rows.isdisjoint(epochs[0][member].tolist())
        assert len(epochs[0][member].unique()) == pytest.approx(480 * (1 - np.exp(-1)), abs=30)
        for other in range(member):
            assert not epochs[0][member].sort().values.equal(epochs[0][other].sort().values)

    # Early stopping and best weights, replayed: more than 1 % counts, five epochs of patience
    best, best_epoch, idle, stop = np.full(n_members, np.inf), np.zeros(n_members, dtype=int), 0, None
    for epoch, error in enumerate(errors):
        improved = [(best[m] - error[m]) > 0.01 * best[m] if np.isfinite(best[m]) else True for m in range(n_members)]
        for member in np.flatnonzero(improved):
            best[member], best_epoch[member] = error[member], epoch
        idle = 0 if any(improved) else idle + 1
        if idle == 5:
            stop = epoch + 1
            break
    assert n_epochs == stop
    assert result.gradient_steps == len(seen)
    assert len(set(best_epoch)) > 1, "the members should have their best epochs at different times for this test to tell"
    for parameters in range(len(weights[0])):
        now = [*ensemble.weights, *ensemble.biases][parameters]
        for member in range(n_members):
            assert th.equal(now[member], weights[best_epoch[member]][parameters][member])
    np.testing.assert_allclose(last_error, best, rtol=1e-6)
    assert ensemble.elites.long().tolist() == np.argsort(best)[:2].tolist()
    assert not ensemble.training and ensemble.is_fitted


def test_fit_within_a_budget(monkeypatch):
    """Watch it: what each member saw, by what steps it learned, and what is kept."""
    th.manual_seed(1)
    n, n_members = 600, 4
    inputs, targets = numbered_data(n)
    ensemble = make_ensemble(n_members=n_members, n_elites=2, learning_rate=5e-3)
    step, seen, states, after = training.train_step, [], [], []

    def watched_step(self, state, x, y, numbers):
        seen.append(((x[:, :, 0] * self.input_std[0] + self.input_mean[0]) * n).round().int())
        states.append(({name: tensor.clone() for name, tensor in state.parameters.items()}, x, y))
        loss = step(self, state, x, y, numbers)
        after.append({name: tensor.clone() for name, tensor in state.parameters.items()})
        return loss

    monkeypatch.setattr(training, "train_step", watched_step)
    # A decay of 27 / 540 = 0.05
    monkeypatch.setattr(training, "ROWS_OF_PRIOR", 27)
    result = fit(ensemble, inputs, targets, n_steps=90)
    _, holdout = split_for_good(n)
    assert result.gradient_steps == len(seen) == 90 and result.n_measured == len(holdout) == 60
    rows = th.stack(seen)
    assert rows.shape == (90, n_members, 256) and set(holdout.tolist()).isdisjoint(rows.unique().tolist())
    assert len(rows.unique()) == 540 and not rows[0, 0].equal(rows[0, 1]) and not rows[0].equal(rows[1])

    # The steps are those of torch's AdamW, whose decay is for the weights
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in states[0][0].items()}
    weights = [tensor for name, tensor in parameters.items() if name.startswith("weights.")]
    others = [tensor for name, tensor in parameters.items() if not name.startswith("weights.")]
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    adamw = th.optim.AdamW(groups, lr=5e-3)
    for _, x, y in states[:20]:
        adamw.zero_grad()
        ensemble.loss(x, y, parameters, training.NLL_BETAS).backward()
        adamw.step()
    for name, tensor in states[20][0].items():
        np.testing.assert_allclose(tensor, parameters[name].detach(), rtol=1e-3, atol=1e-5, err_msg=name)

    errors = holdout_errors(ensemble, inputs[holdout], targets[holdout])
    assert ensemble.elites.long().tolist() == errors.argsort()[:2].tolist()
    # A second training goes on with Adam as it is, and ends in the mean of the weights from half of it on
    after.clear()
    fit(ensemble, inputs, targets, n_steps=11)
    assert ensemble.optimizer.state_dict()["state"][0]["step"] == 101
    for name, parameter in ensemble.named_parameters():
        np.testing.assert_allclose(parameter.detach(), th.stack([each[name] for each in after[5:]]).mean(dim=0), atol=1e-6)


def test_nll_shares():
    log_var, varies = th.randn(2, 5, 3), th.tensor([True, False, True])
    share = nll_shares(log_var, 0.5, varies)
    np.testing.assert_allclose(share[:, :, varies].mean(dim=(1, 2)), 1, rtol=1e-6)
    np.testing.assert_allclose(share[1, :, 2] / share[1, 0, 0], th.exp(0.5 * (log_var[1, :, 2] - log_var[1, 0, 0])), rtol=1e-6)
    # The likelihood itself, bit for bit; nothing of a constant
    assert th.equal(nll_shares(th.randn(2, 300, 3), 0.0, varies), varies.float().expand(2, 300, 3))
    assert th.equal(nll_shares(log_var, 0.5, ~th.ones(3, dtype=th.bool)), th.zeros(2, 5, 3))


@pytest.mark.parametrize(("betas", "is_learned"), [(training.NLL_BETAS, True), ((0.0, 0.0), False)])
def test_a_rare_reward_is_learned(betas, is_learned, monkeypatch):
    """Not by the likelihood itself, for which it is noise: a reward of 0 in 2 % of the rows, beside clean changes."""
    monkeypatch.setattr(training, "NLL_BETAS", betas)
    th.manual_seed(0)
    inputs = 2 * th.rand(1500, 4) - 1
    a, b, c, action = inputs.split(1, dim=1)
    targets = th.cat([(a + b < 1.6).float(), 0.1 * b, 0.05 * th.sin(2 * c) + 0.02 * action, 0.02 * a * b], dim=1)
    assert targets[:, 0].mean() == pytest.approx(0.98, abs=0.01)
    ensemble = Ensemble(3, 1, (64, 64), 3, 2, 2e-3)
    of_reward, *of_changes = fit(ensemble, inputs, targets, 1500).r2.tolist()
    assert of_reward > 0.5 if is_learned else of_reward < 0.2
    assert min(of_changes) > 0.95


def test_the_first_training_ends_where_nothing_is_left_to_learn(monkeypatch):
    """Of noise there is nothing to learn but how much there is. Each member ends with the weights that were best."""
    th.manual_seed(0)
    inputs, targets = th.randn(300, 5), th.randn(300, 4)
    ensemble = make_ensemble(hidden_sizes=(100, 100), learning_rate=2e-3)
    looks, weights = [], []

    def look(*args):
        looks.append(holdout_nll(*args))
        weights.append(ensemble.weights[1].detach().clone())
        return looks[-1]

    monkeypatch.setattr(training, "holdout_nll", look)
    result = fit(ensemble, inputs, targets, 3_000)
    scores = th.stack(looks)
    assert result.gradient_steps == 100 * len(scores) < 3_000
    best, at = scores.min(dim=0)
    assert len(scores) - 1 - at.max() == 5
    assert all(th.equal(ensemble.weights[1][member], weights[look][member]) for member, look in enumerate(at.tolist()))
    # Of the true distribution it is 1; of weights that know the 270 rows by heart it is far more
    assert best.max() < 1.5 < 3 < scores[-1].min()
    # Later trainings are short, and make all of their steps
    looks.clear()
    assert fit(ensemble, inputs, targets, 700).gradient_steps == 700 and not looks


def test_measures_against_numpy():
    """R2 of the elites' mean, the error that members are judged by, and the likelihood that ends the first training."""
    rng = np.random.default_rng(0)
    inputs, targets = numbered_data(500)
    targets[:, 2] = 4.0
    targets[:5, 1] += 1e3
    ensemble = make_ensemble()
    fit(ensemble, inputs, targets, 30)
    rows = rng.choice(500, 80, replace=False)
    mean, std = ensemble.predict(inputs.double()[rows])
    truth = targets.double()[rows].numpy()
    errors = (mean.numpy() - truth)[:, :, [0, 1, 3]] / ensemble.target_std.numpy()[[0, 1, 3]]
    size = np.abs(errors)
    expected = np.where(size < 5, size**2, 10 * size - 25).sum(2).mean(1) / 4
    np.testing.assert_allclose(holdout_errors(ensemble, inputs[rows], targets[rows]), expected, rtol=1e-4)
    unit_std = std.numpy()[:, :, [0, 1, 3]] / ensemble.target_std.numpy()[[0, 1, 3]]
    size = np.abs(errors) / unit_std
    expected = (np.where(size < 5, size**2, 10 * size - 25) + 2 * np.log(unit_std)).sum(2).mean(1) / 4
    assert (size > 5).any()
    np.testing.assert_allclose(holdout_nll(ensemble, inputs[rows], targets[rows]), expected, rtol=1e-4)
    of_elites = mean.numpy()[ensemble.elites.long()].mean(0)
    with np.errstate(invalid="ignore"):
        expected = 1 - ((of_elites - truth) ** 2).mean(0) / truth.var(0)
    expected[2] = np.nan
    np.testing.assert_allclose(r2(ensemble, inputs[rows], targets[rows]), expected, rtol=1e-3, atol=1e-4)
    assert MAX_MEASURED / 2 < fit(ensemble, *numbered_data(30_000), 1).n_measured <= MAX_MEASURED


def test_r2_is_unknown_where_there_is_only_rounding():
    """Held-out rows may lack the few in which a dimension changed: what is left of it is no variance to explain."""
    inputs, targets = numbered_data(500)
    targets[:, 2] = 1e-8 * th.randn(500)
    targets[:5, 2] = 1.0
    ensemble = make_ensemble()
    fit(ensemble, inputs, targets, 30)
    assert ensemble.varies.all()
    assert r2(ensemble, inputs[5:], targets[5:]).isnan().tolist() == [False, False, True, False]
    assert not r2(ensemble, inputs, targets).isnan().any()


@pytest.mark.parametrize(
    "n, steps", [(2, 16 * [1]), (300, 16 * [240]), (5_100, 15 * [256] + [240]), (30_000, 97 * [256] + [168])]
)
def test_an_epoch_has_at_least_sixteen_steps(n, steps, monkeypatch):
    """80 % of few transitions are gone through several times, and the patience is five epochs; the first one improves."""
    sizes = []
    monkeypatch.setattr(training, "holdout_errors", lambda ensemble, x, y: th.ones(ensemble.n_members))
    step = training.train_step
    monkeypatch.setattr(training, "train_step", lambda *args: sizes.append(args[2].shape[1]) or step(*args))
    fit(make_ensemble(hidden_sizes=(4,)), *numbered_data(n))
    assert sizes == steps * 6


def test_fit_learns_the_bounds_and_restandardises():
    th.manual_seed(0)
    inputs, targets = numbered_data(300)
    ensemble = make_ensemble()
    fit(ensemble, inputs, targets, 100)
    assert not th.allclose(ensemble.max_log_var, th.tensor(0.5), atol=1e-3)
    assert not th.allclose(ensemble.min_log_var, th.tensor(-10.0), atol=1e-3)
    std = ensemble.input_std.clone()
    fit(ensemble, inputs * 10, targets, 10)
    np.testing.assert_allclose(ensemble.input_std / std, 10, rtol=0.15)
    assert ensemble.n_fits == 2


def test_second_fit_starts_from_the_first():
    th.manual_seed(0)
    inputs, targets = numbered_data(2_000)
    ensemble = make_ensemble(hidden_sizes=(64, 64), learning_rate=3e-3)
    first = fit(ensemble, inputs, targets)
    second = fit(ensemble, inputs, targets)
    assert second.gradient_steps < first.gradient_steps / 2
    assert (second.r2 > first.r2 - 0.02).all()


def test_recovers_a_noisy_linear_system():
    """Mean and variance, both known: x' = x + Ax + Bu + noise, with a noise of its own in each dimension."""
    th.manual_seed(0)
    n, noise = 6_000, th.tensor([0.5, 0.1, 0.3, 0.05])
    matrix = th.tensor(
        [[0.5, -0.2, 0.1, 0.3], [0.0, 0.4, -0.3, 0.1], [0.2, 0.0, 0.3, -0.2], [1.0, 0.5, 0.0, 0.2], [-0.5, 0.0, 0.4, 0.0]]
    )

    def system(rows):
        inputs = th.randn(rows, 5) * th.tensor([1.0, 3.0, 0.5, 1.0, 1.0]) + th.tensor([0.0, 5.0, 0.0, 0.0, 0.0])
        return inputs, inputs @ matrix

    inputs, mean = system(n)
    ensemble = Ensemble(3, 2, (64, 64), 5, 3, 2e-3)
    fit(ensemble, inputs, mean + noise * th.randn(n, 4), n_steps=2_000)
    test_inputs, test_mean = system(2_000)
    predicted, std = ensemble.predict(test_inputs)
    for member in ensemble.elites.long():
        error = (predicted[member] - test_mean).square().mean(0).sqrt()
        assert (error < 0.3 * noise + 0.02).all(), error
        np.testing.assert_allclose(std[member].mean(0), noise, rtol=0.15)
    # Next observations and rewards on their proper sides
    rows = test_inputs[:1].expand(20_000, 5)
    next_obs, rewards = ensemble.sample(rows[:, :3], rows[:, 3:])
    expected = test_mean[0] + th.cat([th.zeros(1), test_inputs[0, :3]])
    sampled = th.cat([rewards[:, None], next_obs], dim=1)
    np.testing.assert_allclose(sampled.mean(0), expected, atol=0.2)
    np.testing.assert_allclose(sampled.std(0), noise, rtol=0.3)


@pytest.mark.parametrize("where", ["inputs", "targets"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_data_never_reach_the_weights(where, value):
    inputs, targets = numbered_data(100)
    (inputs if where == "inputs" else targets)[17, 1] = value
    ensemble = make_ensemble()
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    with pytest.raises(ValueError, match="transition 17 are not finite"):
        fit(ensemble, inputs, targets)
    assert all(th.equal(tensor, before[name]) for name, tensor in ensemble.state_dict().items())


@pytest.mark.parametrize("n_steps", [None, 20])
def test_divergence_is_an_error_and_keeps_the_weights(n_steps):
    inputs, targets = numbered_data(300)
    ensemble = make_ensemble()
    fit(ensemble, inputs, targets, 20)
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    with pytest.raises(ValueError, match=r"diverged.*model_learning_rate"):
        ensemble.optimizer.param_groups[0]["lr"] = 1e30
        fit(ensemble, inputs, targets, n_steps)
    assert all(th.equal(tensor, before[name]) for name, tensor in ensemble.state_dict().items())
    # And it can go on
    ensemble.optimizer.param_groups[0]["lr"] = 1e-3
    assert fit(ensemble, inputs, targets, 20).r2.isfinite().all()


def test_too_few_transitions():
    with pytest.raises(ValueError, match=r"at least 2 transitions.*not 1"):
        fit(make_ensemble(), *numbered_data(1))
    for n_steps in (None, 7):
        assert fit(make_ensemble(), *numbered_data(2), n_steps).n_measured == 1


def test_state_dict_is_all_floats_and_restores_exactly():
    """SB3's tools fill every entry of a state dict with random floats."""
    inputs, targets = numbered_data(200)
    ensemble, other = make_ensemble(), make_ensemble()
    fit(ensemble, inputs, targets, 50)
    other.load_state_dict(ensemble.state_dict())
    other.optimizer.load_state_dict(deepcopy(ensemble.optimizer.state_dict()))
    assert other.is_fitted and th.equal(other.elites, ensemble.elites)
    results = []
    for each in (ensemble, other):
        th.manual_seed(0)
        results.append(fit(each, inputs, targets, n_steps=20))
    assert results[0].train_loss == results[1].train_loss and th.equal(results[0].r2, results[1].r2)
    for (name, tensor), copy in zip(ensemble.state_dict().items(), other.state_dict().values(), strict=True):
        assert th.equal(tensor, copy), name
    ensemble.load_state_dict({name: th.rand_like(tensor) for name, tensor in ensemble.state_dict().items()})
    ensemble.sample(inputs[:, :3], inputs[:, 3:])
