import math
from fractions import Fraction

import numpy as np
import pytest
import torch as th
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import integrate, stats

from sb3_mbpo.theory import (
    branched_return_gap,
    branched_return_gap_current,
    current_model_error,
    error_slope,
    gaussian_kl,
    model_error_from_nll,
    optimal_rollout_length,
    policy_shift_from_kl,
    return_gap,
    total_variation_from_kl,
)

distances = st.floats(0, 1)
discounts = st.floats(0, 0.999)


def test_formulas_of_the_paper():
    """By hand, with gamma = 1/2, so that 1 / (1 - gamma) = 2: r = 3, e_m = 1/10, e_pi = 1/5, k = 2."""
    r, e_m, e_pi, g, k = Fraction(3), Fraction(1, 10), Fraction(1, 5), Fraction(1, 2), 2
    first = 2 * g * r * (e_m + 2 * e_pi) * 4 + 4 * r * e_pi * 2
    second = 2 * r * (g**3 * e_pi * 4 + (g**2 + 2) * e_pi * 2 + k * (e_m + 2 * e_pi) * 2)
    third = 2 * r * (g**3 * e_pi * 4 + g**2 * e_pi * 2 + k * e_m * 2)
    assert (first, second, third) == (Fraction("10.8"), Fraction("18"), Fraction("3.6"))
    assert return_gap(0.1, 0.2, 3, 0.5) == pytest.approx(10.8)
    assert branched_return_gap(0.1, 0.2, 3, 0.5, 2) == pytest.approx(18)
    assert branched_return_gap_current(0.1, 0.2, 3, 0.5, 2) == pytest.approx(3.6)


@given(distances, discounts, st.floats(0, 100))
def test_limits(distance, gamma, reward_max):
    # Nothing is wrong and nothing has changed
    assert return_gap(0, 0, reward_max, gamma) == 0
    for k in (0, 1, 7):
        assert branched_return_gap(0, 0, reward_max, gamma, k) == 0
        assert branched_return_gap_current(0, 0, reward_max, gamma, k) == 0
    # Without a model its error does not matter
    assert branched_return_gap(distance, 0.3, reward_max, gamma, 0) == branched_return_gap(0, 0.3, reward_max, gamma, 0)
    # ... and without a shift nothing but its error does
    expected = 2 * reward_max * 5 * distance / (1 - gamma)
    assert branched_return_gap_current(distance, 0, reward_max, gamma, 5) == pytest.approx(expected)
    # A perfect model used for ever leaves no gap by Theorem 4.3
    assert branched_return_gap_current(0, distance, reward_max, gamma, 100_000) == pytest.approx(0)
    assert branched_return_gap_current(0, distance, reward_max, gamma, math.inf) == 0
    if distance > 0 and reward_max > 1e-6:
        assert branched_return_gap_current(distance, 0.3, reward_max, gamma, math.inf) == math.inf
        assert branched_return_gap(distance, 0.3, reward_max, gamma, math.inf) == math.inf


def _rows(rng, *shape):
    """Random distributions, some of them nearly certain."""
    return rng.dirichlet(np.full(shape[-1], rng.choice([0.05, 0.5, 3])), shape[:-1])


def _path(start, policy, dynamics, n_steps=300):
    """Distributions over states."""
    states = [start]
    for _ in range(n_steps):
        states.append(np.einsum("s,sa,sat->t", states[-1], policy, dynamics))
    return states


def _expected(states, policy, of):
    return np.einsum("ts,sa,sa->t", np.array(states), policy, of)


def test_bounds_hold_in_small_random_worlds():
    """Exact returns and distances in tabular Markov decision processes of four states and two actions."""
    rng, closest = np.random.default_rng(0), np.zeros(3)
    for _ in range(60):
        gamma, reward, start = rng.uniform(0.3, 0.9), rng.choice([-1.0, 1.0], (4, 2)), _rows(rng, 4)
        world, old = _rows(rng, 4, 2, 4), _rows(rng, 4, 2)
        model_mix, policy_mix = rng.uniform(size=2) ** 2
        model = (1 - model_mix) * world + model_mix * _rows(rng, 4, 2, 4)
        new = (1 - policy_mix) * old + policy_mix * _rows(rng, 4, 2)
        distance = np.abs(world - model).sum(axis=2) / 2
        shift = np.abs(new - old).sum(axis=1).max() / 2
        visited, powers = _path(start, old, world), gamma ** np.arange(301)
        error = min(_expected(visited, old, distance).max(), 1)
        in_world, in_model = (powers @ _expected(_path(start, new, where), new, reward) for where in (world, model))
        pairs = [(0, abs(in_world - in_model), return_gap(error, shift, 1, gamma))]
        for k in (0, 1, 2, 5):
            # At each time: the old policy in the world, but for the last k steps, the new policy's in the model
            last_steps = [_path(visited[max(t - k, 0)], new, model, min(t, k)) for t in range(301)]
            branched = powers @ _expected([states[-1] for states in last_steps], new if k else old, reward)
            rolled_out = [state for states in last_steps for state in states[: max(len(states) - 1, 1)]]
            current_error = min(_expected(rolled_out, new, distance).max(), 1)
            gap = abs(in_world - branched)
            pairs.append((1, gap, branched_return_gap(error, shift, 1, gamma, k)))
            pairs.append((2, gap, branched_return_gap_current(current_error, shift, 1, gamma, k)))
        for theorem, gap, bound in pairs:
            assert gap <= bound * (1 + 1e-6)
            closest[theorem] = max(closest[theorem], gap / bound)
    # They are no larger than they need to be by orders of magnitude
    assert (closest > [0.2, 0.2, 0.4]).all()


@given(distances, distances, discounts, st.integers(0, 100))
def test_relations_of_the_theorems(model_error, shift, gamma, k):
    gap = branched_return_gap(model_error, shift, 1, gamma, k)
    # Taken literally, the model is never used (paper, section 4.3)
    assert branched_return_gap(model_error, shift, 1, gamma, k + 1) >= gap * (1 - 1e-9)
    # The error under the present policy, bounded by e_m + 2 e_pi, tightens it
    current = min(model_error + 2 * shift, 1)
    assert branched_return_gap_current(current, shift, 1, gamma, k) <= gap * (1 + 1e-9)
    # Linear in the largest reward
    assert branched_return_gap(model_error, shift, 3, gamma, k) == pytest.approx(3 * gap)


@given(distances, distances, discounts)
@example(0.25, 1, 0.5)
@example(0.9**7, 1, 0.9)
@example(0, 1, 0)
@example(0, 0, 0.9)
@example(math.nextafter(0.5, 0), 0.5, 0.9)
def test_optimal_rollout_length_is_the_best_of_all(model_error, shift, gamma):
    best = optimal_rollout_length(model_error, shift, gamma)
    assert (best > 0) == (model_error < shift)
    lengths = np.arange(200)
    gaps = np.array([branched_return_gap_current(model_error, shift, 1, gamma, int(k)) for k in lengths])
    if best < len(lengths):
        assert best == int(best)
        assert gaps[int(best)] <= gaps.min() * (1 + 1e-9) + 1e-12
    else:
        # Still falling, or level where one more step is less than rounding
        assert (np.diff(gaps) <= gaps[:-1] * 1e-9).all()


def test_optimal_rollout_length_of_two_equally_good_ones_is_the_smaller():
    assert optimal_rollout_length(0.25, 1, 0.5) == 2
    assert branched_return_gap_current(0.25, 1, 1, 0.5, 2) == branched_return_gap_current(0.25, 1, 1, 0.5, 3)
    assert [optimal_rollout_length(0.9**k, 1, 0.9) for k in range(1, 30)] == list(range(1, 30))
    assert optimal_rollout_length(0, 0.1, 0.99) == math.inf


@pytest.mark.parametrize("function", [return_gap, branched_return_gap, branched_return_gap_current])
@pytest.mark.parametrize(
    "name, value", [("model_error", 1.5), ("policy_shift", -0.1), ("reward_max", -1), ("gamma", 1), ("gamma", math.nan)]
)
def test_arguments_out_of_range(function, name, value):
    arguments = dict(model_error=0.1, policy_shift=0.1, reward_max=1.0, gamma=0.9)
    if function is not return_gap:
        arguments["rollout_length"] = 1
        with pytest.raises(ValueError, match=r"`rollout_length` must be 0 or more, not -1"):
            function(**{**arguments, "rollout_length": -1})
        with pytest.raises(ValueError, match=r"`rollout_length` must be a whole number or infinity, not 1.5"):
            function(**{**arguments, "rollout_length": 1.5})
    with pytest.raises(ValueError, match=f"`{name}` must be .*, not {value}"):
        function(**{**arguments, name: value})


def test_error_slope_and_the_line_that_it_belongs_to():
    shifts = np.array([0.0, 0.1, 0.2, 0.4])
    assert error_slope(shifts, 0.05 + 0.5 * shifts) == pytest.approx(0.5)
    # Least squares: residuals that are orthogonal to the line do not tilt it
    assert error_slope(np.array([0.0, 1, 2]), np.array([1.0, -2, 1]) + 3 * np.array([0.0, 1, 2])) == pytest.approx(3)
    assert error_slope(shifts, np.full(4, 0.1)) == pytest.approx(0, abs=1e-12)
    assert error_slope(np.array([0, 0.1]), np.zeros(2)) == 0
    assert current_model_error(0.05, 0.4, 0.5) == pytest.approx(0.25)
    assert current_model_error(0.5, 1, 2) == 1
    with pytest.raises(ValueError, match="two different"):
        error_slope(np.array([0.1, 0.1]), np.array([1.0, 2.0]))


def test_kl_of_gaussians_and_pinsker():
    mean, std, other_mean, other_std = (th.tensor([[value]], dtype=th.float64) for value in (0.3, 0.5, -0.2, 0.9))
    p, q = stats.norm(0.3, 0.5), stats.norm(-0.2, 0.9)
    kl, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -10, 10)
    assert gaussian_kl(mean, std, other_mean, other_std).item() == pytest.approx(kl)
    # Dimensions are independent
    twice = [value.expand(5, 2) for value in (mean, std, other_mean, other_std)]
    assert gaussian_kl(*twice).tolist() == pytest.approx([2 * kl] * 5)
    total_variation, _ = integrate.quad(lambda x: abs(p.pdf(x) - q.pdf(x)) / 2, -10, 10, limit=200)
    bound = total_variation_from_kl(th.tensor(kl)).item()
    assert total_variation <= bound == pytest.approx(math.sqrt(kl / 2))


def test_estimates_are_distances():
    assert total_variation_from_kl(th.tensor([0.0, 0.02, 50.0, -1e-9])).tolist() == pytest.approx([0, 0.1, 1, 0])
    # The mean of the distances, not the distance of the mean
    assert policy_shift_from_kl(th.tensor([0.0, 0.02])) == pytest.approx(0.05)
    assert model_error_from_nll(th.tensor([1.0, 1.04]), th.tensor([1.0])) == pytest.approx(0.1)
    assert model_error_from_nll(th.tensor([0.5]), th.tensor([1.0])) == 0
