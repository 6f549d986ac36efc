"""
How good is the model on what comes next, and how long does it take? Nothing here depends on what a policy makes of it.

    python -m benchmarks.model error --tasks Hopper-v5 --ways budget paper
    python -m benchmarks.model cost

``error`` collects a replay buffer for each task by SAC (once: it is kept in ``--buffers``). It trains an ensemble again and
again on a growing part of it, as MBPO does, in several ways, and measures it each time on the transitions that come next.
``cost`` times trainings beside ``SAC.train``, and short runs.
"""

import argparse
import csv
import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.save_util import load_from_pkl
from torch.nn import functional as F

from benchmarks.machine import processor
from sb3_mbpo import MBPO
from sb3_mbpo.common.buffers import real_transitions
from sb3_mbpo.common.command_line import at_least
from sb3_mbpo.common.compilation import compiled
from sb3_mbpo.dynamics import training
from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.dynamics.rollouts import Transitions
from sb3_mbpo.dynamics.training import (
    BATCH_SIZE,
    NLL_BETAS,
    Step,
    budget,
    draw_batches,
    fit,
    holdout_errors,
    split_for_good,
    train_on,
    train_step,
    try_step,
    weight_decay,
)
from sb3_mbpo.dynamics.units import operands_of, spread

# Transitions after those of a training on which it is measured, environment steps from one training to the next, and steps of
# the longer rollouts
N_NEXT, TRAIN_EVERY, HORIZON = 1_000, 250, 5


# --- Tasks --------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """
    :param begin: Transitions of the first training
    :param end: Transitions of the last training
    :param kwargs: For the agent that collects them, SAC with several updates for each step
    """

    begin: int
    end: int
    kwargs: dict[str, Any]


TASKS = {
    "Hopper-v5": Task(5_000, 30_000, {"gradient_steps": 6, "learning_starts": 2_000, "target_entropy": -1}),
    "HalfCheetah-v5": Task(2_000, 10_000, {"gradient_steps": 10, "learning_starts": 1_000, "target_entropy": -3}),
    "InvertedPendulum-v5": Task(500, 5_000, {"gradient_steps": 5, "learning_starts": 500, "target_entropy": -0.05}),
    "Pendulum-v1": Task(500, 5_000, {"gradient_steps": 5, "learning_starts": 500}),
    "LunarLanderContinuous-v3": Task(2_000, 10_000, {"gradient_steps": 5, "learning_starts": 1_000}),
    "dm_control/cartpole-swingup-v0": Task(2_000, 7_000, {"gradient_steps": 5, "learning_starts": 1_000}),
    "dm_control/hopper-stand-v0": Task(2_000, 10_000, {"gradient_steps": 5, "learning_starts": 1_000}),
    "dm_control/quadruped-run-v0": Task(2_000, 10_000, {"gradient_steps": 5, "learning_starts": 1_000}),
}


class RepeatAction(gym.Wrapper[Any, Any, Any, Any]):
    """Each action twice, as is usual for DeepMind Control; rewards are added."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(2):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def make_env(task: str) -> gym.Env[Any, Any]:
    """
    :param task: Gymnasium's id; those of DeepMind Control by shimmy, flat and with each action twice
    :return: The environment
    """
    if not task.startswith("dm_control/"):
        return gym.make(task)
    # Not an import statement: mypy would want types
    gym.register_envs(importlib.import_module("shimmy"))
    env = gym.wrappers.FlattenObservation(gym.make(task))
    return RepeatAction(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))


def collect(task: str, file: Path, device: str) -> Transitions:
    """
    :param task: Key of ``TASKS``
    :param file: Where its replay buffer is, or is put
    :param device: Where to put the tensors
    :return: Its transitions, in their order
    """
    if not file.exists():
        steps = TASKS[task].end + N_NEXT + HORIZON
        agent = MBPO("MlpPolicy", make_env(task), real_ratio=1.0, seed=0, buffer_size=steps, **TASKS[task].kwargs)
        agent.learn(steps)
        agent.save_replay_buffer(file)
    buffer = load_from_pkl(file)
    assert isinstance(buffer, ReplayBuffer)
    return real_transitions(buffer, device)


def scaled(transitions: Transitions, factor: float, dims: slice = slice(None)) -> Transitions:
    """
    :param transitions: Real ones
    :param factor: Of these dimensions of the observation
    :param dims: Dimensions
    :return: The same in other units
    """
    obs, next_obs = transitions.obs.clone(), transitions.next_obs.clone()
    for each in (obs, next_obs):
        each[:, dims] *= factor
    return transitions._replace(obs=obs, next_obs=next_obs)


def shifted(transitions: Transitions, shift: float) -> Transitions:
    """
    :param transitions: Real ones
    :param shift: Of the first dimension of the observation
    :return: The same in float64
    """
    obs, next_obs = transitions.obs.double(), transitions.next_obs.double()
    for each in (obs, next_obs):
        each[:, 0] += shift
    return transitions._replace(obs=obs, next_obs=next_obs)


def beside(transitions: Transitions, column: th.Tensor) -> Transitions:
    """
    :param transitions: Real ones in their order
    :param column: A further dimension of the observation, ``(n + 1, 1)``
    :return: The same with it, in float64
    """
    column = column.to(transitions.obs.device)
    obs = th.cat([transitions.obs.double(), column[:-1]], dim=1)
    return transitions._replace(obs=obs, next_obs=th.cat([transitions.next_obs.double(), column[1:]], dim=1))


def with_noise(transitions: Transitions, std: float) -> Transitions:
    """
    :param transitions: Real ones in their order
    :param std: Of the noise
    :return: The same with a dimension of mere noise
    """
    generator = th.Generator().manual_seed(0)
    return beside(transitions, std * th.randn(len(transitions.obs) + 1, 1, generator=generator).double())


def with_a_clock(transitions: Transitions) -> Transitions:
    """
    :param transitions: Real ones in their order
    :return: The same with Unix time in seconds, a minute for each step
    """
    return beside(transitions, 1.7e9 + 60 * th.arange(len(transitions.obs) + 1).double()[:, None])


# The model's error must be the same in all of them; with noise, in both of these
UNITS: dict[str, Callable[[Transitions], Transitions]] = {
    "as they are": lambda transitions: transitions,
    "observations x 1e-4": lambda transitions: scaled(transitions, 1e-4),
    "observations x 1e4": lambda transitions: scaled(transitions, 1e4),
    "first dimension x 1e-4": lambda transitions: scaled(transitions, 1e-4, slice(1)),
    "first dimension x 1e4": lambda transitions: scaled(transitions, 1e4, slice(1)),
    "first dimension + 1e6": lambda transitions: shifted(transitions, 1e6),
    "reward x 1e-3": lambda transitions: transitions._replace(rewards=1e-3 * transitions.rewards),
    "reward x 1e3": lambda transitions: transitions._replace(rewards=1e3 * transitions.rewards),
    "and Unix time": with_a_clock,
    "and noise of 0.3": lambda transitions: with_noise(transitions, 0.3),
    "and noise of 300": lambda transitions: with_noise(transitions, 300.0),
}


# --- Ways to train ------------------------------------------------------------------------------------------------------

# (ensemble, inputs, targets, rows for training, gradient steps, compiled step) -> losses of the gradient steps that were made
Train = Callable[[Ensemble, th.Tensor, th.Tensor, th.Tensor, int, Step], th.Tensor]
# (ensemble, inputs, targets, gradient steps of the budget, compiled step) -> gradient steps that were made
Way = Callable[[Ensemble, th.Tensor, th.Tensor, int, Step], int]


def by_budget(ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor, n_steps: int, step: Step) -> int:
    """MBPO's default."""
    return fit(ensemble, inputs, targets, n_steps, step).gradient_steps


def by_the_paper(ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor, n_steps: int, step: Step) -> int:
    """Until no member improves."""
    return fit(ensemble, inputs, targets, None, step).gradient_steps


def changed(train: Train, first_too: bool = False) -> Way:
    """
    :param train: Gradient steps that differ in one thing from those of the budget
    :param first_too: Whether the first training makes these, too, and all of them
    :return: A training with these
    """

    def way(ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor, n_steps: int, step: Step) -> int:
        if not (ensemble.is_fitted or first_too):
            return by_budget(ensemble, inputs, targets, n_steps, step)
        ensemble.set_stats(inputs, targets)
        rows, holdout = split_for_good(len(inputs), inputs.device)
        n_steps = len(train(ensemble, inputs, targets, rows, n_steps, step))
        ensemble.elites.copy_(holdout_errors(ensemble, inputs[holdout], targets[holdout]).argsort()[: len(ensemble.elites)])
        ensemble.n_fits += 1
        return n_steps

    return way


def all_steps(
    ensemble: Ensemble,
    inputs: th.Tensor,
    targets: th.Tensor,
    rows: th.Tensor,
    n_steps: int,
    step: Step | None,
    batches: Iterable[th.Tensor] | None = None,
    average: bool = True,
) -> th.Tensor:
    """
    Nothing ends a training before its budget.

    :param batches: In place of the budget's
    :param average: Whether trainings but the first end in the mean of the weights of their second half
    """
    batches = draw_batches(rows, ensemble.n_members, n_steps) if batches is None else batches
    average = average and ensemble.is_fitted
    return train_on(ensemble, inputs, targets, batches, n_steps, step, weight_decay(len(rows)), NLL_BETAS, average)


def rate_to_zero(
    ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor, rows: th.Tensor, n_steps: int, step: Step
) -> th.Tensor:
    """The learning rate falls to zero in each training, and the last weights stay."""
    group = ensemble.optimizer.param_groups[0]
    rate, losses = group["lr"], []
    for i in range(n_steps):
        group["lr"] = rate * (1 - i / n_steps)
        losses.append(all_steps(ensemble, inputs, targets, rows, 1, step, average=False))
    group["lr"] = rate
    return th.cat(losses)


def adam_anew(
    ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor, rows: th.Tensor, n_steps: int, step: Step
) -> th.Tensor:
    """Adam's moments begin anew in each training."""
    ensemble.optimizer.state.clear()
    return all_steps(ensemble, inputs, targets, rows, n_steps, step)


def newest_more_often(
    ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor, rows: th.Tensor, n_steps: int, step: Step
) -> th.Tensor:
    """A quarter of each batch is of the newest 1,000 transitions."""
    n_new = BATCH_SIZE // 4
    old = draw_batches(rows, ensemble.n_members, n_steps, BATCH_SIZE - n_new)
    new = draw_batches(rows[-900:], ensemble.n_members, n_steps, n_new)
    batches = (th.cat(parts, dim=1) for parts in zip(old, new, strict=True))
    return all_steps(ensemble, inputs, targets, rows, n_steps, step, batches)


def small_batches(
    ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor, rows: th.Tensor, n_steps: int, step: Step
) -> th.Tensor:
    """Batches of half the size, twice as many."""
    batches = draw_batches(rows, ensemble.n_members, 2 * n_steps, BATCH_SIZE // 2)
    # Not the compiled step, which is for batches of the whole size
    return all_steps(ensemble, inputs, targets, rows, 2 * n_steps, None, batches)


class LayerNormEnsemble(Ensemble):
    """Layer norm, without weights, before each activation but the first."""

    def layers(
        self, hidden: th.Tensor, weights: Sequence[th.Tensor], biases: Sequence[th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor]:
        for layer, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
            hidden = th.bmm(hidden, weight) + bias
            hidden = F.silu(hidden if layer == 0 else F.layer_norm(hidden, hidden.shape[-1:]))
        mean, log_var = (th.bmm(hidden, weights[-1]) + biases[-1]).chunk(2, dim=-1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)


class Variant(NamedTuple):
    """
    :param way: How it is trained
    :param rate: Learning rate
    :param steps: Gradient steps for each environment step
    :param network: What is trained
    :param constants: Of ``sb3_mbpo.dynamics.training``, in place of its own
    """

    way: Way = by_budget
    rate: float = 2e-3
    steps: float = 1.0
    network: type[Ensemble] = Ensemble
    constants: Mapping[str, Any] = {}


VARIANTS = {
    "budget": Variant(),
    "paper": Variant(by_the_paper, rate=1e-3),
    # One thing changed
    "rate 1e-3": Variant(rate=1e-3),
    "rate 4e-3": Variant(rate=4e-3),
    "rate to zero": Variant(changed(rate_to_zero)),
    "Adam anew": Variant(changed(adam_anew)),
    "last weights": Variant(changed(partial(all_steps, average=False))),
    "newest more often": Variant(changed(newest_more_often)),
    "small batches": Variant(changed(small_batches)),
    "whole first training": Variant(changed(all_steps, first_too=True)),
    "no weight decay": Variant(constants={"MAX_WEIGHT_DECAY": 0.0}),
    "weight decay 0.3": Variant(constants={"MAX_WEIGHT_DECAY": 0.3, "ROWS_OF_PRIOR": 1_000}),
    "the likelihood itself": Variant(constants={"NLL_BETAS": (0.0, 0.0)}),
    "layer norm": Variant(network=LayerNormEnsemble),
    "no extra steps": Variant(constants={"EXTRA_STEPS": 0}),
    "2,000 extra steps": Variant(constants={"EXTRA_STEPS": 2_000}),
    "2 steps": Variant(steps=2.0),
    "half a step": Variant(steps=0.5),
}


# --- Errors -------------------------------------------------------------------------------------------------------------


class Errors(NamedTuple):
    """
    Of the elites on the transitions that come next; all errors in standard deviations of a step.

    :param steps: Gradient steps of the training
    :param mean: Root mean square error of the mean prediction
    :param typical: The same of the median transition
    :param sample: Root mean square error of a sample, as rollouts draw them
    :param sample_5: That of the median rollout of five steps with the actions that were taken, of the observation
    :param inside: Share of the true values within one predicted standard deviation, 0.683 if calibrated
    :param nll: Negative log-likelihood of the median transition under the mixture of the elites, in nats, in these units
    """

    steps: float
    mean: float
    typical: float
    sample: float
    sample_5: float
    inside: float
    nll: float


def as_regression(transitions: Transitions) -> tuple[th.Tensor, th.Tensor]:
    """
    :return: What the model learns: (obs, action) and (reward, next_obs - obs)
    """
    obs, actions, next_obs, rewards, _ = transitions
    return th.cat([obs, actions], dim=1), th.cat([rewards[:, None], next_obs - obs], dim=1)


@th.no_grad()
def errors(ensemble: Ensemble, following: Transitions, scale: th.Tensor, steps: int) -> Errors:
    """
    :param ensemble: Fitted
    :param following: Transitions to measure on, in their order
    :param scale: Standard deviations of (reward, next_obs - obs), ``(1 + obs_dim,)``
    :param steps: Gradient steps of its training
    :return: What it gets wrong
    """
    inputs, targets = as_regression(following)
    elites, varies = ensemble.elites.long(), scale > 0
    unit = th.where(varies, scale, 1.0)
    mean, std = ((each[elites] / unit)[:, :, varies] for each in ensemble.predict(inputs))
    squares, variances = (mean - (targets / unit)[:, varies]).square(), std.square()
    # Starts from which the next steps belong to the same episode
    goes_on = (following.next_obs[:-1] == following.obs[1:]).all(dim=1)
    starts = goes_on.unfold(0, HORIZON - 1, 1).all(dim=1).nonzero().squeeze(1)
    obs = following.obs[starts]
    for step in range(HORIZON):
        obs, _ = ensemble.sample(obs, following.actions[starts + step])
    off = ((obs - following.next_obs[starts + HORIZON - 1]) / unit[1:])[:, varies[1:]]
    return Errors(
        steps,
        squares.mean().sqrt().item(),
        squares.mean(dim=2).sqrt().median(dim=1).values.mean().item(),
        (squares + variances).mean().sqrt().item(),
        off.square().mean(dim=1).sqrt().median().item() if len(starts) else math.nan,
        (squares < variances).float().mean().item(),
        ensemble.nll(inputs, targets).median().item() - scale[varies].log().sum().item(),
    )


def measure(transitions: Transitions, variant: Variant, rows: range, seed: int) -> Iterator[Errors]:
    """
    :param transitions: Real ones in their order
    :param variant: What is trained, and how
    :param rows: Numbers of transitions that the trainings, each from the weights of the last, are made on
    :param seed: Of the networks and their batches
    :return: Errors after each training
    """
    inputs, targets = as_regression(transitions)
    first = slice(0, rows[0])
    scale = spread(targets[first], operands_of(inputs[first], targets[first]))
    th.manual_seed(seed)
    obs_dim, action_dim = transitions.obs.shape[1], transitions.actions.shape[1]
    ensemble = variant.network(obs_dim, action_dim, [200] * 4, 7, 5, variant.rate).to(inputs.device)
    step = compiled(train_step, inputs.device.type)
    try_step(ensemble, step)
    before = 0
    for n in rows:
        with patch.dict(vars(training), variant.constants):
            n_steps = budget(variant.steps, n - before, n)
            assert n_steps is not None
            made = variant.way(ensemble, inputs[:n], targets[:n], n_steps, step)
        yield errors(ensemble, Transitions(*(column[n : n + N_NEXT] for column in transitions)), scale, made)
        before = n


def print_errors(args: argparse.Namespace) -> None:
    """``error``: a line for each training as CSV, then the table of means."""
    args.buffers.mkdir(parents=True, exist_ok=True)
    means = []
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "units", "way", "seed", "transitions", *Errors._fields])
        for task, units, seed, way in itertools.product(args.tasks, args.units, args.seeds, args.ways):
            transitions = collect(task, args.buffers / f"{task.replace('/', '_')}.pkl", args.device)
            begin, end = args.begin or TASKS[task].begin, args.end or TASKS[task].end
            rows, found = range(begin, end + 1, args.every), []
            for n, each in zip(rows, measure(UNITS[units](transitions), VARIANTS[way], rows, seed), strict=True):
                found.append(each)
                writer.writerow([task, units, way, seed, n, *(f"{value:.5g}" for value in each)])
                file.flush()
            mean = Errors(*np.mean(found, axis=0).tolist())
            means.append([task, units, way, str(seed), *(f"{value:.3g}" for value in mean)])
            print(*means[-1], flush=True)
    columns = ["task", "units", "way", "seed", *Errors._fields]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in means:
        print(f"| {' | '.join(row)} |")


# --- Cost ---------------------------------------------------------------------------------------------------------------


def seconds_by_size(sizes: Sequence[int], rounds: int) -> Iterator[tuple[int, float, float]]:
    """
    Model trainings of Hopper's sizes in alternation with ``SAC.train``.

    :param sizes: Numbers of transitions
    :param rounds: How often each is timed
    :return: For each size, seconds of model training for 1,000 environment steps, and of 20,000 updates by ``SAC.train``:
        medians
    """
    sac = SAC("MlpPolicy", gym.make("Hopper-v5"), seed=0, device="cpu", buffer_size=10_000)
    sac.learn(300)
    sac.set_logger(configure(None, []))
    space = spaces.Box(-np.inf, np.inf, (11,), np.float64)
    assert sac.observation_space == space
    trainings = {}
    for size in sizes:
        ensemble = Ensemble(11, 3, [200] * 4, 7, 5, 2e-3)
        try_step(ensemble, compiled(train_step, "cpu"))
        inputs, targets = th.randn(size, 14, dtype=th.float64), th.randn(size, 12, dtype=th.float64)
        trainings[size] = (ensemble, inputs, targets, budget(1.0, TRAIN_EVERY, size), compiled(train_step, "cpu"))
        fit(*trainings[size])
    seconds: dict[int, list[float]] = {size: [] for size in [0, *sizes]}
    for _ in range(rounds):
        start = time.perf_counter()
        sac.train(100, 256)
        seconds[0].append(200 * (time.perf_counter() - start))
        for size, arguments in trainings.items():
            start = time.perf_counter()
            fit(*arguments)
            seconds[size].append(1_000 / TRAIN_EVERY * (time.perf_counter() - start))
    for size in sizes:
        yield size, float(np.median(seconds[size])), float(np.median(seconds[0]))


def seconds_of_loop(n: int, n_steps: int) -> dict[str, float]:
    """
    :param n: Real transitions at the beginning
    :param n_steps: Environment steps
    :return: Seconds that MBPO spends in each part of them, compiled, on Hopper-v5 with 20 updates in each; those of compiling
        are left out
    """
    agent = MBPO("MlpPolicy", "Hopper-v5", learning_starts=n, model_gradient_steps=0.01, compile=True, seed=0, device="cpu")
    # The first training, which is another one, and whatever is compiled
    agent.learn(n + 1)
    agent.model_gradient_steps = 1.0
    agent.learn(n_steps, reset_num_timesteps=False)
    return {name: seconds for name, seconds in agent.seconds.items() if name != "compile"}


def print_cost(args: argparse.Namespace) -> None:
    """``cost``: how long trainings take, alone and in MBPO's loop."""
    print(f"{processor()}, {th.get_num_threads()} threads")
    print("| transitions | s of model training for 1,000 environment steps | 20,000 updates by SAC.train, s |\n|---|---|---|")
    for size, model, sac in seconds_by_size((10_000, 30_000, 100_000, 300_000), args.rounds):
        print(f"| {size:,} | {model:.1f} | {sac:.0f} |", flush=True)
    seconds = seconds_of_loop(20_000, 1_000)
    total = sum(seconds.values())
    print(
        f"1,000 steps of Hopper-v5 after 20,000: {total:.0f} s, of which the model's training {seconds['model'] / total:.1%}"
    )
    print({name: round(each, 1) for name, each in seconds.items()}, flush=True)
    agent = MBPO(
        "MlpPolicy",
        "Pendulum-v1",
        learning_starts=200,
        model_train_freq=100,
        rollout_batch_size=500,
        gradient_steps=2,
        seed=0,
        device="cpu",
    ).learn(650)
    print(f"650 steps of Pendulum-v1 with five trainings: {agent.seconds['model']:.1f} s of them")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=at_least(1), default=1, help="cores to use (default: 1)")
    commands = parser.add_subparsers(required=True)
    error = commands.add_parser("error", help="errors on the transitions that come next")
    error.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    error.add_argument("--ways", nargs="+", choices=VARIANTS, default=["budget", "paper"], metavar="WAY")
    error.add_argument("--seeds", nargs="+", type=int, default=[0])
    error.add_argument("--begin", type=at_least(2), help="transitions of the first training (default: the task's)")
    error.add_argument("--end", type=at_least(2), help="transitions of the last training (default: the task's)")
    error.add_argument("--every", type=at_least(1), default=TRAIN_EVERY, help="environment steps between two trainings")
    error.add_argument(
        "--units", nargs="+", choices=UNITS, default=["as they are"], metavar="UNITS", help=f"of the data: {', '.join(UNITS)}"
    )
    error.add_argument("--buffers", type=Path, default=Path("runs/buffers"), help="folder for the replay buffers")
    error.add_argument("--device", default="cpu", help="where to train (default: cpu)")
    error.add_argument("--out", type=Path, default=Path("errors.csv"), help="table with a line for each training")
    error.set_defaults(run=print_errors)
    cost = commands.add_parser("cost", help="seconds of trainings")
    cost.add_argument("--rounds", type=at_least(1), default=7)
    cost.set_defaults(run=print_cost)
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
