"""
What should training of the model stop by? Train an ensemble again and again on a growing part of a replay buffer, as MBPO
does, by several criteria on the holdout, and measure its errors on the transitions that come next.

    python -m benchmarks.stopping runs/HalfCheetah-v5_mbpo_0/checkpoint-000020000/replay_buffer.pkl \\
        --first 5000 --begin 2000 --end 4000 --every 500

The authors' release, and MBPO here, go by the mean squared error in raw units.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl

from sb3_mbpo.command_line import at_least
from sb3_mbpo.compilation import compiled
from sb3_mbpo.dynamics.ensemble import Ensemble, gaussian_nll
from sb3_mbpo.dynamics.open_loop import spread
from sb3_mbpo.dynamics.training import fit, train_step, try_step

# Transitions after those of a training on which it is measured
N_NEXT = 1_000
TRIMMED = 0.05

# (squared errors in standard deviations, log-variances in them) -> one number for each member
Criterion = Callable[[th.Tensor, th.Tensor], th.Tensor]


def standardised(squares: th.Tensor, log_var: th.Tensor) -> th.Tensor:
    """Mean squared error, each dimension in units of its standard deviation."""
    return squares.mean(dim=(1, 2))


def trimmed(squares: th.Tensor, log_var: th.Tensor) -> th.Tensor:
    """The same without the rows of the 5 % largest errors."""
    rows = squares.mean(dim=2).sort(dim=1).values
    return rows[:, : max(1, int((1 - TRIMMED) * rows.shape[1]))].mean(dim=1)


def median(squares: th.Tensor, log_var: th.Tensor) -> th.Tensor:
    """The median row's."""
    return squares.mean(dim=2).median(dim=1).values


def likelihood(squares: th.Tensor, log_var: th.Tensor) -> th.Tensor:
    """A variance of the same likelihood: 1 % less of it is as much as 1 % less of a squared error."""
    return gaussian_nll(squares.sqrt(), log_var, th.zeros_like(squares)).exp()


CRITERIA: dict[str, Criterion | None] = {
    "raw": None,
    "standardised": standardised,
    "trimmed": trimmed,
    "median": median,
    "likelihood": likelihood,
}


class Judged(Ensemble):
    """
    An ensemble whose training goes by another criterion.

    :param obs_dim: Size of the observation
    :param action_dim: Size of the action
    :param criterion: In place of the mean squared error in raw units
    :param scale: Standard deviations of the targets, ``(1 + obs_dim,)``
    """

    def __init__(self, obs_dim: int, action_dim: int, criterion: Criterion | None, scale: th.Tensor) -> None:
        super().__init__(obs_dim, action_dim, [200] * 4, 7, 5, 1e-3)
        self.criterion, self.scale = criterion, scale

    @th.no_grad()
    def mse(self, inputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """What training stops by, in place of the mean squared error."""
        if self.criterion is None:
            return super().mse(inputs, targets)
        mean, log_var = self(inputs.expand(self.n_members, -1, -1))
        return self.criterion(((mean - targets) / self.scale).square(), log_var - 2 * self.scale.log())


class Errors(NamedTuple):
    """
    Of the elites on the transitions that come next; all errors in standard deviations of a step.

    :param epochs: Until training stopped
    :param mean: Root mean square error of the mean prediction
    :param typical: The same of the median transition
    :param sample: Root mean square error of a sample, as rollouts draw them
    :param inside: Share of the true values within one predicted standard deviation, 0.683 if calibrated
    :param nll: Negative log-likelihood of the median transition under the mixture of the elites, nats
    """

    epochs: float
    mean: float
    typical: float
    sample: float
    inside: float
    nll: float


@th.no_grad()
def errors(ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor, scale: th.Tensor, epochs: int) -> Errors:
    """
    :param ensemble: Fitted
    :param inputs: (obs, action) of the transitions to measure on, ``(n, obs_dim + action_dim)``
    :param targets: (reward, next_obs - obs), ``(n, 1 + obs_dim)``
    :param scale: Standard deviations of the targets
    :param epochs: Of its training
    :return: What it gets wrong
    """
    elites = ensemble.elites.long()
    mean, log_var = (each[elites] for each in ensemble(inputs.expand(ensemble.n_members, -1, -1)))
    squares, variances = ((mean - targets) / scale).square(), log_var.exp() / scale.square()
    return Errors(
        epochs,
        squares.mean().sqrt().item(),
        squares.mean(dim=2).sqrt().median(dim=1).values.mean().item(),
        (squares + variances).mean().sqrt().item(),
        (squares < variances).float().mean().item(),
        ensemble.nll(inputs, targets).median().item(),
    )


def measure(buffer: ReplayBuffer, criterion: Criterion | None, first: int, rows: range, seed: int, max_epochs: int) -> Errors:
    """
    :param buffer: Real transitions in their order, of one environment
    :param criterion: What training stops by, None for the raw mean squared error
    :param first: Transition that all trainings begin with
    :param rows: Numbers of transitions that the trainings, each from the weights of the last, are made on
    :param seed: Of the networks and their batches
    :param max_epochs: Limit of a training
    :return: Means over the trainings
    """
    size = buffer.size()
    obs, actions, next_obs, rewards = (
        th.as_tensor(array[first:size], dtype=th.float32).reshape(size - first, -1)
        for array in (buffer.observations, buffer.actions, buffer.next_observations, buffer.rewards)
    )
    inputs, targets = th.cat([obs, actions], dim=1), th.cat([rewards, next_obs - obs], dim=1)
    scale = spread(targets[: rows[0]], th.cat([rewards, obs], dim=1)[: rows[0]])
    scale[scale == 0] = 1
    th.manual_seed(seed)
    ensemble = Judged(obs.shape[1], actions.shape[1], criterion, scale)
    step = compiled(train_step, "cpu")
    try_step(ensemble, step)
    results = []
    for n in rows:
        epochs = fit(ensemble, inputs[:n], targets[:n], max_epochs, step).epochs
        results.append(errors(ensemble, inputs[n : n + N_NEXT], targets[n : n + N_NEXT], scale, epochs))
    return Errors(*np.mean(results, axis=0).tolist())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stopping", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("buffer", type=Path, help="replay_buffer.pkl of a checkpoint")
    parser.add_argument("--first", type=at_least(0), default=0, help="transition to begin with")
    parser.add_argument("--begin", type=at_least(2), default=2_000, help="transitions of the first training")
    parser.add_argument("--end", type=at_least(2), default=4_000, help="transitions of the last training")
    parser.add_argument("--every", type=at_least(1), default=500, help="transitions between two trainings")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--max-epochs", type=at_least(1), default=300, help="limit of a training")
    args = parser.parse_args()
    buffer = load_from_pkl(args.buffer)
    rows = range(args.begin, args.end + 1, args.every)
    if not isinstance(buffer, ReplayBuffer) or buffer.n_envs != 1 or isinstance(buffer.observations, dict):
        parser.error(f"{args.buffer} is not a replay buffer of one environment with array observations")
    if not rows or buffer.size() < args.first + rows[-1] + N_NEXT:
        parser.error(
            f"{args.buffer} has {buffer.size():,} transitions, {args.first:,} + {args.end:,} + {N_NEXT:,} are needed, and "
            "`--end` must not be below `--begin`"
        )
    th.set_num_threads(1)
    print("| criterion | seed | epochs | error | typical error | error of a sample | inside 1 std | typical nll |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        for name in args.criteria:
            found = measure(buffer, CRITERIA[name], args.first, rows, seed, args.max_epochs)
            print(
                f"| {name} | {seed} | {found.epochs:.0f} | {found.mean:.4f} | {found.typical:.4f} | {found.sample:.4f} "
                f"| {found.inside:.2f} | {found.nll:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
