"""The model's units: whatever those of the environment are, training, errors and calibration are the same."""

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import special, stats

from sb3_mbpo.dynamics import units
from sb3_mbpo.dynamics.training import budget, fit, split_for_good
from sb3_mbpo.dynamics.units import input_stats, lost_in_float32, spread, target_stats
from tests.test_ensemble import make_ensemble

# Spreads that grow by less than three times, as random data vary a little
FACTORS = st.floats(1e-4, 2)


def system(n=1_500, seed=0):
    """A nonlinear system with noise, float64: (obs, action) and (reward, change)."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(0, 1, (n, 4))
    matrix = rng.normal(0, 1, (4, 4))
    targets = np.tanh(inputs @ matrix) + [0.1, 0.3, 0.05, 0.02] * rng.normal(0, 1, (n, 4))
    return th.tensor(inputs), th.tensor(targets)


def trained(inputs, targets, n_steps):
    """Its result on held-out rows, and the share of the truth within one predicted standard deviation."""
    th.manual_seed(1)
    ensemble = make_ensemble(3, 1, (32,), learning_rate=5e-3)
    result = fit(ensemble, inputs, targets, n_steps)
    _, holdout = split_for_good(len(inputs))
    mean, std = ensemble.predict(inputs[holdout])
    inside = ((mean - targets[holdout]).abs() < std)[ensemble.elites.long()].double().mean(dim=(0, 1))
    return result, inside


@pytest.mark.parametrize("n_steps", [400, None], ids=["budget", "paper"])
def test_the_same_in_any_units(n_steps):
    """Any dimension in 1e-4 or 1e4 times its units, or 1e6 further; the reward in 1e-3 or 1e3 times its units."""
    inputs, targets = system()
    result, inside = trained(inputs, targets, n_steps)
    assert result.r2.min() > 0.5
    changes = {
        "scaled down": ([1, 1e-4, 1, 1], 0),
        "scaled up": ([1, 1, 1e4, 1e-4], 0),
        "small reward": ([1e-3, 1, 1, 1], 0),
        "large reward": ([1e3, 1, 1, 1e4], 0),
        "shifted": ([1, 1, 1, 1], 1e6),
    }
    for name, (factors, shift) in changes.items():
        factors = th.tensor(factors, dtype=th.float64)
        of_inputs = th.cat([factors[1:], th.ones(1)])
        shifts = th.tensor([0, shift, 0, 0], dtype=th.float64)
        other, other_inside = trained(inputs * of_inputs + shifts, targets * factors, n_steps)
        # The same random numbers: what differs is rounding, which in epochs may add up to another stop
        tolerance = 0.01 if n_steps else 0.05
        np.testing.assert_allclose(other.r2, result.r2, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(other_inside, inside, atol=2 * tolerance, err_msg=name)
        assert other.gradient_steps == pytest.approx(result.gradient_steps, rel=0 if n_steps else 0.3), name
        assert other.train_loss == pytest.approx(result.train_loss, abs=tolerance * 20), name


@settings(deadline=None, max_examples=30)
@given(
    arrays(float, (2, 4), elements=FACTORS),
    arrays(float, (2, 4), elements=st.floats(-5, 5)),
    st.integers(0, 1_000),
)
def test_predictions_stay_when_units_change(factors, shifts, seed):
    """Both statistics move at once, and what a fitted ensemble says in raw units does not."""
    th.manual_seed(seed)
    ensemble = make_ensemble(3, 1, (8, 8)).double()
    data = [th.randn(50, 4).double(), th.randn(50, 4).double()]
    ensemble.set_stats(*data)
    ensemble.n_fits += 1
    with th.no_grad():
        for parameter in ensemble.parameters():
            parameter += 0.1 * th.randn_like(parameter)
    inputs = th.randn(20, 4).double()
    before, scale = ensemble.predict(inputs), ensemble.target_std.clone()
    data = [each * th.tensor(factor) + th.tensor(shift) for each, factor, shift in zip(data, factors, shifts, strict=True)]
    ensemble.set_stats(*data)
    np.testing.assert_allclose(ensemble.target_std, data[1].std(0, correction=0), rtol=1e-9)
    (mean, std), (new_mean, new_std) = before, ensemble.predict(inputs)
    np.testing.assert_allclose(new_mean, mean, rtol=1e-6, atol=1e-9)
    # Where its bounds would get narrower than they began, they do not, and it may grow
    grows = ensemble.target_std > scale
    np.testing.assert_allclose(new_std[:, :, ~grows], std[:, :, ~grows], rtol=0.1)
    np.testing.assert_allclose(new_std[:, :, grows], std[:, :, grows], rtol=0.5)


def test_bounds_of_variances_stay_learned():
    """Where units do not change nothing does, and where one grows or shrinks its bounds get no narrower."""
    inputs, targets = system()
    th.manual_seed(1)
    ensemble = make_ensemble(3, 1, (32, 32), learning_rate=2e-3)
    fit(ensemble, inputs, targets, 600)
    upper, lower = ensemble.max_log_var.detach().clone(), ensemble.min_log_var.detach().clone()
    assert (upper < 0.4).any() and (lower > -9.9).any()
    before = ensemble.predict(inputs)
    ensemble.set_stats(inputs, targets)
    assert all(th.equal(new, old) for new, old in zip(ensemble.predict(inputs), before, strict=True))

    narrowest_upper, narrowest_lower = upper.clamp(max=0.5), lower.clamp(min=-10)
    for factor in (2, 0.1):
        ensemble.set_stats(inputs, factor * targets)
        assert (ensemble.max_log_var >= narrowest_upper).all() and (ensemble.min_log_var <= narrowest_lower).all()
    # Shrunk to a tenth of the first spread, a twentieth of the last one
    np.testing.assert_allclose(ensemble.max_log_var.detach(), narrowest_upper + 2 * np.log(20), rtol=1e-4)


@pytest.mark.parametrize("factor", [100, 0.01])
def test_a_spread_that_jumps_is_learned_anew(factor):
    """Of the targets: after another thousand transitions the noise is known again."""
    inputs, targets = system()
    _, holdout = split_for_good(len(inputs))
    th.manual_seed(1)
    ensemble = make_ensemble(3, 1, (32, 32), learning_rate=2e-3)
    fit(ensemble, inputs, targets, 600)
    for _ in range(4):
        result = fit(ensemble, inputs, factor * targets, budget(1.0, 250, len(inputs)))
    mean, std = ensemble.predict(inputs[holdout])
    inside = ((mean - factor * targets[holdout]).abs() < std)[ensemble.elites.long()].double().mean(dim=(0, 1))
    assert result.r2.min() > 0.6 and inside.min() > 0.55, (result.r2, inside)


@pytest.mark.parametrize("std", [1e-9, 1e-4, 0.03])
def test_an_input_that_hardly_varied_may_vary(std):
    """Weights that fit a tiny spread would be huge ones in the next."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(0, 1, (1_250, 4))
    inputs[:1_000, 1] *= std
    inputs, targets = th.tensor(inputs), th.tensor(np.tanh(inputs @ rng.normal(0, 1, (4, 4))))
    th.manual_seed(1)
    ensemble = make_ensemble(3, 1, (32, 32), learning_rate=2e-3)
    fit(ensemble, inputs[:1_000], targets[:1_000], 600)
    assert fit(ensemble, inputs, targets, 250).r2.min() > 0.2
    for _ in range(3):
        result = fit(ensemble, inputs, targets, 250)
    assert result.r2.median() > 0.8, result.r2


def test_bounds_of_a_constant_stay():
    """It has no likelihood that would hold them."""
    inputs, targets = system(300)
    targets[:, 0] = -1.0
    ensemble = make_ensemble(3, 1, (16,), learning_rate=0.1)
    fit(ensemble, inputs, targets, 1_000)
    assert ensemble.max_log_var[0] == 0.5 and ensemble.min_log_var[0] == -10
    assert not th.allclose(ensemble.max_log_var[1:], th.tensor(0.5), atol=0.2)
    targets[:, 0] = inputs[:, 0]
    assert fit(ensemble, inputs, targets, 300).r2[0] > 0.3


def test_constant_dimensions_are_predicted_exactly():
    """A clock that advances by 0.25, a dimension that stays, a reward of -1: also in samples, and wherever they are."""
    th.manual_seed(0)
    inputs, targets = system(300)
    targets[:, 0], targets[:, 1], targets[:, 2] = -1.0, 0.25, 0.0
    ensemble = make_ensemble(3, 1, (16,))
    result = fit(ensemble, inputs, targets, 50)
    assert result.r2[:3].isnan().all() and not result.r2[3].isnan()
    next_obs, rewards = ensemble.sample(inputs[:, :3], inputs[:, 3:])
    assert (rewards == -1).all()
    assert th.equal(next_obs[:, 0], inputs[:, 0] + 0.25) and th.equal(next_obs[:, 1], inputs[:, 1])
    assert (next_obs[:, 2] != inputs[:, 2]).all()
    assert ensemble.nll(inputs, targets).isfinite().all()


def test_likelihood_is_that_of_raw_units():
    """Of the mixture of the elites, with a dimension that is constant and one in 1e4 times its units."""
    inputs, targets = system(300)
    targets = targets * th.tensor([1.0, 1.0, 1e4, 1e-3]) + 5
    targets[:, 1] = 0.25
    ensemble = make_ensemble(3, 1, (16,))
    fit(ensemble, inputs, targets, 50)
    mean, std = (each[ensemble.elites.long()][:, :, [0, 2, 3]].numpy() for each in ensemble.predict(inputs))
    each = stats.norm.logpdf(targets[:, [0, 2, 3]].numpy(), mean, std).sum(axis=2)
    np.testing.assert_allclose(ensemble.nll(inputs, targets), -special.logsumexp(each, axis=0) + np.log(2), rtol=1e-4)


def test_nothing_varies():
    ensemble = make_ensemble(3, 1, (16,))
    inputs = th.ones(100, 4)
    result = fit(ensemble, inputs, th.zeros(100, 4), 20)
    assert result.r2.isnan().all() and np.isfinite(result.train_loss)
    next_obs, rewards = ensemble.sample(inputs[:, :3], inputs[:, 3:])
    assert th.equal(next_obs, inputs[:, :3]) and (rewards == 0).all()


def test_what_was_constant_is_learned_when_it_varies():
    th.manual_seed(0)
    inputs, targets = system(600)
    still_inputs, still_targets = inputs.clone(), targets.clone()
    still_inputs[:, 1], still_targets[:, 2] = 0.5, 0.0
    ensemble = make_ensemble(3, 1, (32, 32))
    fit(ensemble, still_inputs, still_targets, 300)
    before = ensemble.predict(still_inputs)[0]
    ensemble.set_stats(inputs, targets)
    # Only the scale has changed yet
    np.testing.assert_allclose(ensemble.predict(still_inputs)[0], before, atol=1e-4)
    fit(ensemble, inputs, targets, 600)
    assert fit(ensemble, inputs, targets, 1).r2.min() > 0.6


def test_what_is_constant_for_a_while_is_not_forgotten():
    """As after loading without the replay buffer, where a good policy gets the same reward at every step."""
    inputs, targets = system(600)
    th.manual_seed(0)
    ensemble = make_ensemble(3, 1, (32, 32))
    fit(ensemble, inputs, targets, 300)
    before = ensemble.predict(inputs)
    still_inputs, still_targets = inputs.clone(), targets.clone()
    still_inputs[:, 1], still_targets[:, 0], still_targets[:, 2] = 0.5, 1.0, -2.0
    ensemble.set_stats(still_inputs, still_targets)
    # What varies is as it was, at the input that stays
    elsewhere, at_half = inputs.clone(), inputs.clone()
    elsewhere[:, 1], at_half[:, 1] = 7.0, 0.5
    of_still = ensemble.predict(elsewhere)[0]
    assert (of_still[:, :, 0] == 1).all() and (of_still[:, :, 2] == -2).all()
    ensemble.set_stats(inputs, targets)
    for now, then in zip(ensemble.predict(inputs), before, strict=True):
        np.testing.assert_allclose(now, then, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(of_still[:, :, [1, 3]], ensemble.predict(at_half)[0][:, :, [1, 3]], rtol=1e-3, atol=1e-4)


def test_rounding_noise_is_no_target():
    """Numbers that were float32 have its rounding also where other columns make a float64 tensor of them."""
    th.manual_seed(0)
    inputs, targets = th.randn(400, 4).double(), th.randn(400, 4).double()
    for noise in (1e-22, 1e-7):
        targets[:, 2] = noise * th.randn(400)
        for data in ([inputs.float(), targets.float()], [inputs, targets]):
            ensemble = make_ensemble(3, 1, (4,))
            ensemble.set_stats(*data)
            assert ensemble.varies.tolist() == [True, True, False, True]
    # In float64, changes of 1e-7 are 500 million times its rounding
    inputs[:, 1] += 1e-12
    ensemble.set_stats(inputs, targets)
    assert ensemble.varies.all()


def test_spread_and_stats_against_numpy():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, (1_000, 3))
    values[:, 1] = 7.1
    mean, std = input_stats(th.tensor(values))
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std[[0, 2]], values.std(0)[[0, 2]], rtol=1e-12)
    assert std[1] == 0
    operands = th.tensor(values) * 1e3
    mean, std = target_stats(th.tensor(values), operands)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, [values[:, 0].std(), 0, values[:, 2].std()], rtol=1e-12)
    np.testing.assert_allclose(spread(th.tensor(values), operands), std, rtol=1e-12)


def test_what_float32_cannot_hold():
    """A clock in Unix time, in either precision; not what stays, and not the rounding of what stays."""
    rng = np.random.default_rng(0)
    seconds = 1.7e9 + 60 * np.arange(500.0)
    still = np.full(500, 1e6)
    jitter = 0.3 + 1e-16 * rng.integers(0, 2, 500)
    angle = np.cumsum(rng.normal(0, 0.01, 500))
    far = 1e6 + np.cumsum(rng.normal(0, 0.5, 500))
    columns = np.stack([seconds, still, jitter, angle, far], axis=1)
    for dtype in (th.float64, th.float32):
        data = th.tensor(columns, dtype=dtype)
        assert lost_in_float32(data[:-1], data[1:]).tolist() == [True, False, False, False, True]
    # Changed by a rounding in one of five rows, as at the ends of short episodes: a matter of the share that counts
    obs = th.rand(500, 1, dtype=th.float64)
    next_obs = th.where(th.arange(500)[:, None] % 5 == 4, obs.float().double(), obs)
    assert [lost_in_float32(obs, next_obs, share).item() for share in (0.0, 0.19, 0.25)] == [True, True, False]


@pytest.mark.parametrize("size", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_a_swing_far_from_zero_is_lost_in_float32(size, dtype):
    """In float32 some numbers are left of it, more than rounding makes of a constant."""
    obs = (1e6 + size * th.sin(0.05 * th.arange(30_001).double()))[:, None].to(dtype)
    assert lost_in_float32(obs[:-1], obs[1:]).item()
    # Once in a while a rounding more or less
    constant = 1e6 + 0.06 * th.randint(-1, 2, (30_001, 1), dtype=dtype)
    assert lost_in_float32(constant[:-1], constant[1:]).item() == (dtype is th.float64)


def test_jumps_do_not_set_the_scale():
    """Of an angle that wraps: its bulk, and the geometric mean of it and of all."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.05, (6_000, 3))
    jumps = rng.random(6_000) < 1 / 60
    values[jumps, 0] -= 2 * np.pi
    values[jumps, 1] -= 2 * np.pi
    # Nothing but jumps
    values[:, 2] = np.where(jumps, 1.0, 0.0)
    targets = th.tensor(values)
    bulk = units.bulk_std(targets)
    np.testing.assert_allclose(bulk[1], values[~jumps, 1].std(), rtol=1e-6)
    _, scale = target_stats(targets, targets)
    std = values.std(0)
    # The reward's, the geometric mean, and the standard deviation where there is no bulk
    np.testing.assert_allclose(scale, [std[0], np.sqrt(std[1] * bulk[1]), std[2]], rtol=1e-9)
    assert scale[1] < 0.3 * std[1]
    # One glitch in a thousand is not seen in the bulk at all
    glitch = th.tensor(rng.normal(0, 1, (1_000, 1)))
    before = units.bulk_std(glitch)
    glitch[17] = 1e6
    np.testing.assert_allclose(units.bulk_std(glitch), before, rtol=0.05)


def test_the_bulk_is_that_of_all_environments():
    """Rows of two environments take turns."""
    values = th.randn(15_000, 1, dtype=th.float64)
    values[1::2] *= 10
    assert units.bulk_std(values).item() == pytest.approx(values.std().item(), rel=0.1)


def test_what_moves_rarely_is_within_reach():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1e-9, (5_000, 2))
    values[rng.random(5_000) < 0.02, 1] += 1
    _, scale = target_stats(th.tensor(values), th.zeros(5_000, 2, dtype=th.float64))
    assert scale[1] == pytest.approx(values[:, 1].std() / 25, rel=1e-6)


def test_an_angle_that_wraps_does_no_harm():
    rng = np.random.default_rng(0)
    n = 3_000
    angle, speed, action = rng.uniform(-np.pi, np.pi, n), rng.normal(0, 1, n), rng.uniform(-1, 1, n)
    moved = angle + 0.05 * speed
    wrapped = (moved + np.pi) % (2 * np.pi) - np.pi
    inputs = np.stack([angle, speed, action], axis=1)
    targets = np.stack([np.cos(angle), wrapped - angle, 0.1 * action], axis=1)
    th.manual_seed(0)
    ensemble = make_ensemble(2, 1, (64, 64), learning_rate=2e-3)
    fit(ensemble, th.tensor(inputs), th.tensor(targets), 1_500)
    error = (ensemble.predict(th.tensor(inputs))[0].mean(0)[:, 1] - th.tensor(targets[:, 1])).abs()
    # In standard deviations of a step without a jump
    assert error[np.abs(wrapped - moved) < 1].median() / 0.05 < 0.1
