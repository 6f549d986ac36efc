"""``python -m sb3_mbpo.diagnostics {open-loop,exploitation,policy-shift,report} agent.zip --env ID``"""

import argparse
import importlib
import json
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

import sb3_mbpo
from sb3_mbpo.common.buffers import n_transitions, real_transitions
from sb3_mbpo.common.checkpoints import saved_attributes
from sb3_mbpo.common.command_line import at_least
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.diagnostics import figures, report
from sb3_mbpo.diagnostics.exploitation import Returns, returns
from sb3_mbpo.diagnostics.open_loop import error_by_step, replay, varying_columns
from sb3_mbpo.diagnostics.policy_shift import PolicyShift, continued, policy_shift
from sb3_mbpo.diagnostics.terminations import terminations
from sb3_mbpo.diagnostics.trajectories import collect
from sb3_mbpo.diagnostics.values import value_check
from sb3_mbpo.dynamics.rollouts import concatenate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sb3_mbpo.common.model_based import ModelBasedSAC


# Makes --seed 0 another seed than an agent's 0
SEED_OF_DIAGNOSTICS = (4, 3)


def parser() -> argparse.ArgumentParser:
    """
    :return: Of the command line
    """
    result = argparse.ArgumentParser(prog="python -m sb3_mbpo.diagnostics", description="Can the model be trusted?")
    commands = result.add_subparsers(dest="command", required=True)
    for name, help_ in (
        ("open-loop", "the model's error by step of a rollout, and a real action sequence under the model"),
        ("exploitation", "returns of the policy under the model and in the environment"),
        ("policy-shift", "the model's error on data of other policies; needs --replay-buffer"),
        ("report", "all of it, and the values, as one HTML page"),
    ):
        command = commands.add_parser(name, help=help_)
        command.add_argument("agent", help="zip of a trained agent")
        command.add_argument("--env", required=True, help="id of its environment")
        command.add_argument("--env-kwargs", type=json.loads, default={}, help="as JSON: '{\"render_mode\": null}'")
        command.add_argument("--gym-packages", nargs="+", default=[], help="packages to import that register environments")
        command.add_argument("--replay-buffer", help="the agent's, as written by save_replay_buffer")
        command.add_argument("--vec-normalize", help="statistics of VecNormalize, if the agent was trained with it")
        command.add_argument("--later", nargs="+", default=[], help="zips of later agents, for policy-shift")
        if name == "report":
            command.add_argument("--policy-shift", action="store_true", help="measure that, too: some minutes more")
        command.add_argument("--data-sizes", nargs="+", type=at_least(2), default=[500, 1_000, 2_000], help="for policy-shift")
        command.add_argument("--steps", type=at_least(1), default=2_000, help="environment steps to collect")
        command.add_argument("--horizon", type=at_least(1), default=25, help="steps of a rollout")
        command.add_argument("--return-horizon", type=at_least(1), default=200, help="steps of a return")
        command.add_argument(
            "--columns", nargs="+", type=at_least(0), help="dimensions of the observation to show; the first four that vary"
        )
        command.add_argument("--seed", type=at_least(0), default=0)
        command.add_argument("--out", default=".", help="folder for what is written")
    return result


def load(path: str, env: VecEnv) -> "ModelBasedSAC":
    """
    :param path: Zip of an agent
    :param env: Its environment
    :return: The agent, of the algorithm that saved it
    """
    algorithm = saved_attributes(path).get("algorithm", "MBPO")
    agent: ModelBasedSAC = getattr(sb3_mbpo, algorithm).load(path, env=env, verbose=0)
    return agent


class Measured:
    """What the commands measure, each once, on the same trajectories."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        for package in arguments.gym_packages:
            importlib.import_module(package)
        for path in filter(None, (arguments.replay_buffer, arguments.vec_normalize)):
            if not Path(path).is_file():
                raise FileNotFoundError(f"There is no file {path}")
        self.arguments = arguments
        is_asked = arguments.command == "policy-shift" or (arguments.command == "report" and arguments.policy_shift)
        if is_asked and arguments.replay_buffer is None and not arguments.later:
            raise ValueError("policy-shift needs --replay-buffer, to train the policy further, or --later")
        if arguments.later and arguments.vec_normalize is not None:
            raise ValueError(
                "--later does not go with --vec-normalize: each agent saw the world through statistics of its own. With "
                "--replay-buffer and without --later, the policy is trained further instead."
            )
        # A replay buffer has a column for each environment of the training
        self.env, n_envs = self._make_env(), saved_attributes(arguments.agent).get("n_envs", 1)
        self.agent = load(arguments.agent, self.env if n_envs == 1 else self._make_env(n_envs))
        if not self.agent.dynamics.is_fitted:
            raise ValueError(f"The model of {arguments.agent} has not been trained yet")
        if self.agent.uses_vec_normalize and arguments.vec_normalize is None:
            raise ValueError(f"{arguments.agent} was trained in VecNormalize: pass its statistics with --vec-normalize")
        if arguments.replay_buffer is not None:
            self.agent.load_replay_buffer(arguments.replay_buffer)
        self.later = [load(path, self.env) for path in arguments.later]
        # Each agent that is loaded seeds everything with its own seed. With another one, no episode begins as one did that the
        # model was trained on.
        seed = int(np.random.SeedSequence([*SEED_OF_DIAGNOSTICS, arguments.seed]).generate_state(1)[0])
        set_random_seed(seed)
        self.env.seed(seed)
        self.model_env = ModelEnv(self.agent, self.env)
        print(f"Collecting {arguments.steps:,} steps of {arguments.env} with the agent's stochastic policy")
        self.trajectories = collect(self.agent, self.env, arguments.steps)
        self.longest = max(self.trajectories, key=lambda trajectory: len(trajectory.rewards))
        varying = varying_columns(self.longest.obs) if arguments.columns is None else arguments.columns
        self.columns = [0, *(1 + column for column in varying if column < self.longest.obs.shape[1])]

    def _make_env(self, n_envs: int = 1) -> VecEnv:
        arguments = self.arguments
        try:
            env: VecEnv = make_vec_env(arguments.env, n_envs, env_kwargs=arguments.env_kwargs)
        except TypeError as error:
            raise ValueError(f"{arguments.env} cannot be made with --env-kwargs {arguments.env_kwargs}: {error}") from error
        if arguments.vec_normalize is not None:
            try:
                env = VecNormalize.load(arguments.vec_normalize, env)
            # What else a pickle may be
            except (pickle.UnpicklingError, AttributeError, EOFError, AssertionError) as error:
                raise ValueError(f"{arguments.vec_normalize} has no statistics of VecNormalize for it: {error}") from error
            env.training = False
        return env

    def start_states(self) -> th.Tensor:
        """
        :return: In which model rollouts may start: those of the replay buffer or, without it, of the trajectories
        """
        buffer = self.agent.replay_buffer
        assert buffer is not None
        if n_transitions(buffer) > 0:
            return real_transitions(buffer, self.agent.device).obs
        return th.cat([trajectory.obs for trajectory in self.trajectories])

    def returns(self) -> Returns:
        """
        :return: Under the model and in the environment
        """
        return returns(self.model_env, self.trajectories, self.arguments.return_horizon)

    def policy_shift(self) -> PolicyShift:
        """
        :return: Models of data of the agent's own policy, under the policies of later agents, or of the agent trained further
        """
        arguments = self.arguments
        policies = self.later or continued(self.model_env)
        n_more = max(arguments.data_sizes) - sum(len(trajectory.obs) for trajectory in self.trajectories)
        more = collect(self.agent, self.env, n_more) if n_more > 0 else []
        data = concatenate([*self.trajectories, *more])
        return policy_shift(self.agent, data, policies, self.env, arguments.data_sizes)


def main(argv: Sequence[str] | None = None) -> None:
    """
    :param argv: Arguments, those of the process if None
    """
    arguments = parser().parse_args(argv)
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        measured = Measured(arguments)
        {"open-loop": _open_loop, "exploitation": _exploitation, "policy-shift": _policy_shift, "report": _report}[
            arguments.command
        ](measured, out)
    except (ValueError, OSError, ImportError, gym.error.Error) as error:
        raise SystemExit(f"error: {error}") from error


def _save(figure: "Figure", path: Path) -> None:
    figure.savefig(path, dpi=150)
    print(f"Written: {path}")


def _open_loop(measured: Measured, out: Path) -> None:
    error = error_by_step(measured.model_env, measured.trajectories, measured.arguments.horizon)
    print(f"{'step':>4} {'error':>8} {'std':>8} {'in 1 std':>8} {'in 2 std':>8} {'R2':>8} {'reward R2':>9}")
    varies, r2 = error.varies(), error.r2()
    for row, step in enumerate(error.steps):
        inside = [share[row, 1:][varies].mean().item() for share in error.inside]
        numbers = [error.relative()[row].item(), error.relative("std")[row].item(), *inside]
        median, reward = r2[row, 1:][varies].nanquantile(0.5).item(), r2[row, 0].item()
        # There is none of a reward that does not vary
        last = f"{'-':>9}" if math.isnan(reward) else f"{reward:>9.3f}"
        print(f"{step:>4} " + " ".join(f"{number:>8.3f}" for number in [*numbers, median]) + f" {last}")
    _save(figures.plot_error(error), out / "open_loop.png")
    _save(figures.plot_dimensions(error), out / "dimensions.png")
    _save(figures.plot_replay(replay(measured.model_env, measured.longest), measured.columns), out / "replay.png")


def _exploitation(measured: Measured, out: Path) -> None:
    result = measured.returns()
    print(
        f"Return of {measured.arguments.return_horizon} steps from {len(result.real)} states: {result.real.mean():.4g} in the "
        f"environment, {result.model.mean():.4g} under the model, correlation {result.correlation():.3f}"
    )
    _save(figures.plot_returns(result), out / "exploitation.png")


def _policy_shift(measured: Measured, out: Path) -> None:
    shift = measured.policy_shift()
    print(f"{'policy':>6} {'KL':>9} {'shift':>6} " + " ".join(f"{f'error, {size:,}':>13}" for size in shift.data_sizes))
    for i, (kl, distance) in enumerate(zip(shift.kl, shift.shift, strict=True)):
        print(f"{i:>6} {kl:>9.4f} {distance:>6.3f} " + " ".join(f"{errors[i]:>13.4f}" for errors in shift.error))
    slopes = ", ".join(f"{slope:.3f} ({size:,})" for size, slope in zip(shift.data_sizes, shift.slopes(), strict=True))
    print(f"d error / d policy shift: {slopes}")
    _save(figures.plot_policy_shift(shift), out / "policy_shift.png")


Part = tuple[list["report.Finding"], list["report.Section"]]


def _error_part(measured: Measured) -> Part:
    found, section = report.of_error(
        measured.agent, error_by_step(measured.model_env, measured.trajectories, measured.arguments.horizon)
    )
    return found, [section, report.of_replay(replay(measured.model_env, measured.longest), measured.columns)]


def _returns_part(measured: Measured) -> Part:
    found, section = report.of_returns(measured.returns(), measured.arguments.return_horizon)
    return found, [section]


def _terminations_part(measured: Measured) -> Part:
    found, section = report.of_terminations(terminations(measured.model_env, measured.trajectories))
    return found, [section]


def _values_part(measured: Measured) -> Part:
    agent = measured.agent
    if agent.model_buffer.size() == 0 and agent.uses_generated_data:
        # A zip does not hold it
        agent.fill_model_buffer(measured.model_env, measured.start_states())
    found, section = report.of_values(value_check(agent, measured.trajectories))
    return found, [section]


def _shift_part(measured: Measured) -> Part:
    arguments = measured.arguments
    if not arguments.policy_shift and not arguments.later:
        raise ValueError("It takes minutes, as models and policies are trained: --policy-shift, with --replay-buffer.")
    found, section = report.of_shift(measured.policy_shift(), measured.agent.gamma)
    return found, [section]


# Name, what it asks, and the part itself
PARTS: list[tuple[str, str, Callable[[Measured], Part]]] = [
    ("Model error", "Does the model know what happens next?", _error_part),
    ("Returns under the model", "Does the policy exploit the model?", _returns_part),
    ("Where episodes end", "Does it see where episodes end?", _terminations_part),
    ("Values", "Are Q-values right?", _values_part),
    ("Policy shift", "What would the paper's bound say?", _shift_part),
]


def _report(measured: Measured, out: Path) -> None:
    path = out / "report.html"
    findings: list[report.Finding] = []
    sections: list[report.Section] = []
    for number, (name, question, part) in enumerate(PARTS, start=1):
        print(f"{number}/{len(PARTS)} {name}", flush=True)
        try:
            found, added = part(measured)
        except ValueError as error:
            # Of episodes that are too short, for instance
            found, added = [report.Finding(question, "not measured", str(error))], []
        findings += found
        sections += added
        # As it goes: whoever stops it has what there is so far
        report.write_report(path, measured.agent, measured.arguments.env, findings, sections)
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
