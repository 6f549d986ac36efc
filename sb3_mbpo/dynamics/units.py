"""The units in which the ensemble learns: each input and each target has a mean of 0 and a spread of 1, whatever its own."""

import math

import torch as th

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
# What is further from the mean than this many standard deviations is a jump. To find them, values are brought that near, again
# and again, which leaves the scale of the rest if fewer than 1 / 5**2 = 4 % are jumps.
MAX_DEVIATION = 5.0
N_CLIPPINGS = 20
# Rows that are looked at, evenly among all, where all of them would take a second
MAX_ROWS = 10_000
# Roundings in the arithmetic of an environment
ROUNDINGS = 4


def rounding(values: th.Tensor) -> th.Tensor:
    """
    :param values: ``(n, dim)``
    :return: By how much the largest number of each column may be off in its own precision, after some arithmetic, float64,
        ``(dim,)``. Where all are float32 numbers, as one part of a ``Dict`` may be, that is float32's.
    """
    is_float32 = (values == values.float()).all(dim=0)
    eps = th.where(is_float32, th.finfo(th.float32).eps, th.finfo(values.dtype).eps)
    return ROUNDINGS * values.abs().amax(dim=0).double() * eps


def spread(values: th.Tensor, operands: th.Tensor) -> th.Tensor:
    """
    :param values: ``(n, dim)``
    :param operands: What they are differences of, or the values themselves, ``(n, dim)``
    :return: Standard deviation of each column, ``(dim,)``. What varies by no more than the rounding of the operands has none.
    """
    std = values.double().std(dim=0, correction=0)
    return th.where(std > rounding(operands), std, 0.0).to(values)


def huber(z: th.Tensor) -> th.Tensor:
    """
    :param z: Errors in standard deviations
    :return: Their squares, which go on as straight lines beyond five standard deviations (Huber 1964), so that a few rows do
        not outweigh all others
    """
    size = z.abs()
    return th.where(size <= MAX_DEVIATION, z.square(), MAX_DEVIATION * (2 * size - MAX_DEVIATION))


def standardised(values: th.Tensor, mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    :param values: ``(..., dim)``
    :param mean: ``(dim,)``
    :param std: 0 where values were constant, ``(dim,)``
    :return: Distance from the mean in standard deviations; 0 where values were constant, whatever they are now
    """
    return (values - mean) / th.where(std > 0, std, th.inf)


def input_stats(inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    What inputs are standardised with: mean, and standard deviation, which is 0 where an input is constant.

    :param inputs: ``(n, dim)``
    :return: Mean and standard deviation, float64, each ``(dim,)``
    """
    std, mean = th.std_mean(inputs.double(), dim=0, correction=0)
    return mean, th.where(std > rounding(inputs), std, 0.0)


def operands_of(inputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """
    :param inputs: (obs, action), ``(n, obs_dim + action_dim)``
    :param targets: (reward, next_obs - obs), ``(n, 1 + obs_dim)``
    :return: (reward, obs), whose precision limits that of the targets, ``(n, 1 + obs_dim)``
    """
    return th.cat([targets[:, :1], inputs[:, : targets.shape[1] - 1]], dim=1)


def precision(targets: th.Tensor, operands: th.Tensor) -> th.Tensor:
    """
    :param targets: (reward, next_obs - obs), ``(n, dim)``
    :param operands: (reward, obs), ``(n, dim)``
    :return: By how much targets may be off, float64, ``(dim,)``
    """
    return th.maximum(rounding(operands), rounding(targets))


def target_stats(targets: th.Tensor, operands: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    What targets are standardised with: mean, and spread, which is 0 where a target is constant.

    The spread of the reward is its standard deviation, as errors of rewards add up whatever their size. That of a change of
    the observation is the geometric mean of its standard deviation and of that of its bulk, but no less than a 25th of the
    former: an angle that wraps, or an impact, neither makes all else tiny nor is out of reach.

    :param targets: (reward, next_obs - obs), ``(n, dim)``
    :param operands: (reward, obs), whose precision limits that of the targets, ``(n, dim)``
    :return: Mean and spread, float64, each ``(dim,)``
    """
    least = precision(targets, operands)
    std, mean = th.std_mean(targets.double(), dim=0, correction=0)
    of_bulk = bulk_std(targets)
    # Without the jumps it is constant: they are all there is to learn
    scale = th.where(of_bulk > least, th.maximum((std * of_bulk).sqrt(), std / MAX_DEVIATION**2), std)
    scale[0] = std[0]
    return mean, th.where(std > least, scale, 0.0)


def some_rows(values: th.Tensor) -> th.Tensor:
    """
    :param values: ``(n, dim)``
    :return: At most 10,000 of its rows, for the same n the same ones; spread evenly, in no rhythm that parallel environments
        could have
    """
    if len(values) <= MAX_ROWS:
        return values
    share = th.arange(MAX_ROWS, device=values.device).double() * GOLDEN_RATIO % 1
    return values[(share * len(values)).long()]


def bulk_std(values: th.Tensor) -> th.Tensor:
    """
    :param values: ``(n, dim)``
    :return: Standard deviation of each column without its jumps, float64, ``(dim,)``
    """
    some = some_rows(values).double()
    std, mean = th.std_mean(some, dim=0, correction=0)
    for _ in range(N_CLIPPINGS):
        std, mean = th.std_mean(some.clamp(mean - MAX_DEVIATION * std, mean + MAX_DEVIATION * std), dim=0, correction=0)
    is_bulk = (some - mean).abs() <= MAX_DEVIATION * std
    mean = (some * is_bulk).sum(dim=0) / is_bulk.sum(dim=0)
    return (((some - mean) * is_bulk).square().sum(dim=0) / is_bulk.sum(dim=0)).sqrt()


def lost_in_float32(obs: th.Tensor, next_obs: th.Tensor, min_share: float = 0.0) -> th.Tensor:
    """
    Looks at 10,000 rows at most. What varies by no more than rounding does is constant, not lost.

    :param obs: ``(n, obs_dim)``
    :param next_obs: ``(n, obs_dim)``
    :param min_share: Share of the rows in which a dimension must change to count
    :return: Which dimensions change, but by so little beside their values that float32 has less than ten numbers for it, bool,
        ``(obs_dim,)``
    """
    obs, next_obs = some_rows(obs), some_rows(next_obs)
    size = (next_obs - obs).double().square().mean(dim=0).sqrt()
    one_float32 = obs.abs().amax(dim=0).double() * th.finfo(th.float32).eps
    share = (next_obs != obs).double().mean(dim=0)
    varies = (obs.amax(dim=0) - obs.amin(dim=0)).double() > rounding(obs)
    return (share > min_share) & (size < 10 * one_float32) & varies
