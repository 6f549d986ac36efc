"""
The paper's bounds on what a policy returns that was trained in a model (section 4), and estimates of what they need.

Units: errors and shifts are total variation distances in [0, 1]; returns are discounted sums of rewards.
"""

import math

import numpy as np
import torch as th


def _check(gamma: float, **others: float) -> None:
    if not 0 <= gamma < 1:
        raise ValueError(f"`gamma` must be a number from 0 to below 1, not {gamma!r}")
    for name, value in others.items():
        is_distance = name in ("model_error", "policy_shift")
        if not 0 <= value <= (1 if is_distance else math.inf):
            allowed = "a total variation distance, from 0 to 1" if is_distance else "0 or more"
            raise ValueError(f"`{name}` must be {allowed}, not {value!r}")
        if name == "rollout_length" and value not in (math.inf, value // 1):
            raise ValueError(f"`rollout_length` must be a whole number or infinity, not {value!r}")


def _k_times(rollout_length: float, error: float) -> float:
    """A model without error may be followed for ever."""
    return rollout_length * error if error > 0 else 0.0


def return_gap(model_error: float, policy_shift: float, reward_max: float, gamma: float) -> float:
    """
    By how much the true return may fall short of the return in the model, if whole episodes are rolled out in it
    (paper, Theorem 4.1).

    :param model_error: Largest expected total variation distance between the true and the model's next state, under the policy
        that collected the data, in [0, 1]
    :param policy_shift: Largest total variation distance between that policy and the present one, in [0, 1]
    :param reward_max: Largest absolute reward
    :param gamma: Discount, in [0, 1)
    :return: The gap, in units of return; not limited to what returns can differ by at all, ``2 * reward_max / (1 - gamma)``
    :raises ValueError: if an argument is not in its range
    """
    _check(gamma, model_error=model_error, policy_shift=policy_shift, reward_max=reward_max)
    compounding = 2 * gamma * reward_max * (model_error + 2 * policy_shift) / (1 - gamma) ** 2
    return compounding + 4 * reward_max * policy_shift / (1 - gamma)


def branched_return_gap(
    model_error: float, policy_shift: float, reward_max: float, gamma: float, rollout_length: float
) -> float:
    """
    The same for rollouts of ``k`` steps that branch from real states (paper, Theorem 4.2). It never decreases with ``k``:
    taken literally, no model is best.

    :param model_error: As in :func:`return_gap`, under the policy that collected the data
    :param policy_shift: As in :func:`return_gap`
    :param reward_max: Largest absolute reward
    :param gamma: Discount, in [0, 1)
    :param rollout_length: ``k``, 0 or more, or infinity
    :return: The gap, in units of return
    :raises ValueError: if an argument is not in its range
    """
    _check(gamma, model_error=model_error, policy_shift=policy_shift, reward_max=reward_max, rollout_length=rollout_length)
    k = rollout_length
    before = gamma ** (k + 1) * policy_shift / (1 - gamma) ** 2
    within = (gamma**k + 2) * policy_shift / (1 - gamma)
    return 2 * reward_max * (before + within + _k_times(k, model_error + 2 * policy_shift) / (1 - gamma))


def branched_return_gap_current(
    model_error: float, policy_shift: float, reward_max: float, gamma: float, rollout_length: float
) -> float:
    """
    The same with the model's error under the present policy (paper, Theorem 4.3), which can make a model worth its use: see
    :func:`optimal_rollout_length`.

    :param model_error: Largest expected total variation distance between the true and the model's next state under the
        present policy, in [0, 1]
    :param policy_shift: As in :func:`return_gap`
    :param reward_max: Largest absolute reward
    :param gamma: Discount, in [0, 1)
    :param rollout_length: ``k``, 0 or more, or infinity
    :return: The gap, in units of return
    :raises ValueError: if an argument is not in its range
    """
    _check(gamma, model_error=model_error, policy_shift=policy_shift, reward_max=reward_max, rollout_length=rollout_length)
    k = rollout_length
    before = gamma ** (k + 1) * policy_shift / (1 - gamma) ** 2
    within = gamma**k * policy_shift / (1 - gamma)
    return 2 * reward_max * (before + within + _k_times(k, model_error) / (1 - gamma))


def optimal_rollout_length(model_error: float, policy_shift: float, gamma: float) -> float:
    """
    The ``k`` for which :func:`branched_return_gap_current` is smallest (paper, below Theorem 4.3). One more step changes the
    gap by ``2 * reward_max * (model_error - gamma**k * policy_shift) / (1 - gamma)``, which is negative up to
    ``k = ln(model_error / policy_shift) / ln(gamma)``.

    :param model_error: Under the present policy, in [0, 1]
    :param policy_shift: As in :func:`return_gap`
    :param gamma: Discount, in [0, 1)
    :return: A whole number, the smaller one where two are equally good; 0, no model, if its error is not below the policy
        shift; infinity for a model without error
    :raises ValueError: if an argument is not in its range
    """
    _check(gamma, model_error=model_error, policy_shift=policy_shift)
    if model_error >= policy_shift:
        return 0.0
    if gamma == 0:
        # Nothing after the first step counts
        return 1.0
    if model_error == 0:
        return math.inf
    k = max(math.ceil(math.log(model_error / policy_shift) / math.log(gamma)), 1)
    # Logarithms of numbers whose ratio is a power of gamma may miss a whole number by one rounding error
    return float(k - 1 if k > 1 and policy_shift * gamma ** (k - 1) <= model_error * (1 + 1e-12) else k)


def current_model_error(model_error: float, policy_shift: float, slope: float) -> float:
    """
    The model's error under the present policy, as a straight line from its error under the policy that collected the data
    (paper, section 4.3).

    :param model_error: Under the policy that collected the data, in [0, 1]
    :param policy_shift: As in :func:`return_gap`
    :param slope: ``d model_error / d policy_shift``, measured with :func:`error_slope`
    :return: In [0, 1]
    """
    return float(np.clip(model_error + slope * policy_shift, 0, 1))


def error_slope(policy_shifts: np.ndarray, model_errors: np.ndarray) -> float:
    """
    How fast the model's error grows with the policy's distance from the data, by least squares (paper, Figure 1b: the local
    change at no shift; pass small shifts).

    :param policy_shifts: ``(n,)``, at least two different ones
    :param model_errors: Error of one model on data of each of these policies, ``(n,)``
    :return: Model error per policy shift
    :raises ValueError: if there are not two different shifts
    """
    if len(policy_shifts) < 2 or np.ptp(policy_shifts) == 0:
        raise ValueError(f"The slope needs at least two different `policy_shifts`, not {policy_shifts!r}")
    return float(np.polynomial.polynomial.polyfit(policy_shifts, model_errors, deg=1)[1])


def total_variation_from_kl(kl: th.Tensor) -> th.Tensor:
    """
    Pinsker's inequality: an upper bound of the total variation distance.

    :param kl: Kullback-Leibler divergences in nats, of any shape
    :return: ``sqrt(kl / 2)``, at most 1
    """
    return (kl.clamp(min=0) / 2).sqrt().clamp(max=1)


def gaussian_kl(mean: th.Tensor, std: th.Tensor, other_mean: th.Tensor, other_std: th.Tensor) -> th.Tensor:
    """
    Kullback-Leibler divergence of diagonal Gaussians. For squashed Gaussians, SAC's policies, it is that of the Gaussians
    before the squashing, which is a bijection.

    :param mean: ``(n, dim)``
    :param std: ``(n, dim)``
    :param other_mean: ``(n, dim)``
    :param other_std: ``(n, dim)``
    :return: KL(first || other) in nats, ``(n,)``
    """
    variance_ratio = (std / other_std).square()
    distance = ((mean - other_mean) / other_std).square()
    return 0.5 * (variance_ratio + distance - 1 - variance_ratio.log()).sum(dim=1)


def policy_shift_from_kl(kl: th.Tensor) -> float:
    """
    An estimate of the policy shift: the mean over states of Pinsker's bound. The theorems have the largest over all states,
    which no sample shows.

    :param kl: Divergence of the two policies in each state, nats, ``(n,)``
    :return: In [0, 1]
    """
    return total_variation_from_kl(kl).mean().item()


def model_error_from_nll(nll: th.Tensor, reference_nll: th.Tensor) -> float:
    """
    A surrogate of the model's error. Pinsker's bound needs KL(true || model), the negative log-likelihood of true transitions
    less the entropy of the true dynamics. That entropy nobody knows, and for a deterministic simulator it is minus infinity:
    the total variation distance to any density is 1. In its place stands the likelihood of the transitions that the model
    was trained on: what is measured is how much less the model knows here than there, its error of generalisation.

    :param nll: Negative log-likelihood of transitions not trained on, nats, ``(n,)``
    :param reference_nll: The same of transitions that the model was trained on, ``(m,)``. If these are of other states, where
        the dynamics are more or less random, that difference counts as well.
    :return: In [0, 1]
    """
    return total_variation_from_kl(nll.mean() - reference_nll.mean()).item()
