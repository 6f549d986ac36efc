"""Diagnostics during a training, in the log and in TensorBoard."""

import math
from typing import TYPE_CHECKING

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure
from stable_baselines3.common.utils import should_collect_more_steps

from sb3_mbpo.common.buffers import recent_trajectories
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.common.spaces import flat_dim
from sb3_mbpo.common.undisturbed import undisturbed
from sb3_mbpo.diagnostics.exploitation import returns
from sb3_mbpo.diagnostics.figures import name_of, plot_dimensions, plot_error, plot_replay, plot_returns, plot_values
from sb3_mbpo.diagnostics.open_loop import error_by_step, replay, varying_columns
from sb3_mbpo.diagnostics.values import value_check
from sb3_mbpo.dynamics.rollouts import Transitions

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

    from sb3_mbpo.common.model_based import ModelBasedSAC

# Real transitions whose values and returns are checked: some episodes, of policies that are not yet old
N_OWN = 2_000


class DiagnosticsCallback(BaseCallback):
    """
    Just before the model is trained again: its error on the transitions that it has not seen, dimension by dimension; and
    Q-values beside the returns that came, and returns under the model beside those in the environment, of the latest
    policies, on transitions most of which the model has been trained on. Nothing is held back from training, no step is made
    in an environment, and the training goes on as it would without. Figures go to
    TensorBoard, and numbers are written at once. What is cheap, :class:`~sb3_mbpo.MBPO` logs without it (``open_loop/``,
    ``theory/``). Without a model (``real_ratio=1``) only values are measured.

    In a YAML of RL Zoo: ``callback: sb3_mbpo.diagnostics.DiagnosticsCallback``.

    :param freq: Environment steps from one time to the next; rounded up to trainings of the model
    :param horizon: Steps of a rollout
    :param return_horizon: Steps of the returns under the model and in the environment
    :param columns: Dimensions of the (flat) observation to replay in a figure, the first four that vary if None
    :param verbose: Verbosity level: 0 for no output, 1 for info messages
    :raises ValueError: if an argument is not in its range
    """

    model: "ModelBasedSAC"

    def __init__(
        self,
        freq: int = 1_000,
        horizon: int = 25,
        columns: list[int] | None = None,
        verbose: int = 0,
        return_horizon: int = 100,
    ) -> None:
        super().__init__(verbose)
        for name, value in (("freq", freq), ("horizon", horizon), ("return_horizon", return_horizon)):
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more, not {value!r}")
        self.freq, self.horizon, self.columns, self.return_horizon = freq, horizon, columns, return_horizon
        self.last_time = 0

    def _on_training_start(self) -> None:
        n_dims = flat_dim(self.model.observation_space)
        for column in self.columns or ():
            if not 0 <= column < n_dims:
                raise ValueError(f"`columns` must be dimensions of the observation, from 0 to {n_dims - 1}, not {column!r}")
        self.model_env = ModelEnv(self.model, self.training_env)
        # It may have served another agent
        self.last_time = min(self.last_time, self.model.lifetime_timesteps)

    def _on_step(self) -> bool:
        agent, now = self.model, self.model.lifetime_timesteps
        # On the last occasion before a training, if there are any: the model is trained where a rollout ends
        is_due = agent.dynamics.is_fitted and now - agent.last_model_training >= agent.model_train_freq
        is_before_training = is_due and self._ends_rollout()
        if now - self.last_time >= self.freq and (is_before_training if agent.uses_model else agent.is_warmed_up):
            self.last_time = now
            with undisturbed(agent):
                self._measure(now)
            # Written now, as by SB3's EvalCallback: later values would take the place of these
            self.logger.dump(self.num_timesteps)
        return True

    def _ends_rollout(self) -> bool:
        """Whether this step is the last one before the agent learns."""
        # Episodes that end with it are not counted yet
        n_episodes = self.locals["num_collected_episodes"] + int(self.locals["dones"].sum())
        return not should_collect_more_steps(self.locals["train_freq"], self.locals["num_collected_steps"], n_episodes)

    def _measure(self, now: int) -> None:
        agent = self.model
        if agent.uses_model:
            # This step's transitions are not stored yet
            self._measure_error(self._recent(now - agent.last_model_training - agent.n_envs))
        # Not of the random warm-up, whose actions no policy would take
        n_acted = now - agent.learning_starts - agent.n_envs
        self._measure_own(self._recent(min(N_OWN, n_acted)) if n_acted > 0 else [])

    def _recent(self, n: int) -> list[Transitions]:
        agent = self.model
        assert agent.replay_buffer is not None
        return recent_trajectories(agent.replay_buffer, n, agent.device, agent.get_vec_normalize_env())

    def _measure_error(self, trajectories: list[Transitions]) -> None:
        if not trajectories:
            return
        error = error_by_step(self.model_env, trajectories, self.horizon)
        for column, (rmse, r2) in enumerate(zip(error.rmse[0].tolist(), error.r2()[0].tolist(), strict=True)):
            self.logger.record(f"diagnostics/rmse_{name_of(column)}", rmse)
            # There is none of what does not vary
            if not math.isnan(r2):
                self.logger.record(f"diagnostics/r2_{name_of(column)}", r2)
        longest = max(trajectories, key=lambda trajectory: len(trajectory.rewards))
        columns = varying_columns(longest.obs) if self.columns is None else self.columns
        self._show("error", plot_error(error))
        self._show("dimensions", plot_dimensions(error))
        self._show("replay", plot_replay(replay(self.model_env, longest), [0, *(1 + column for column in columns)]))

    def _measure_own(self, trajectories: list[Transitions]) -> None:
        """What depends on who acted: on trajectories of the latest policies."""
        measures = [self._measure_values, *([self._measure_returns] if self.model.uses_model else [])]
        for measure in measures:
            try:
                if trajectories:
                    measure(trajectories)
            except ValueError as error:
                if self.verbose >= 1:
                    print(f"Not measured: {error}")

    def _measure_values(self, trajectories: list[Transitions]) -> None:
        check = value_check(self.model, trajectories)
        for name, values in (("q_real", check.q_real), ("q_model", check.q_model), ("returns", check.returns)):
            if len(values) > 0:
                self.logger.record(f"diagnostics/{name}", float(values.mean()))
        self.logger.record("diagnostics/q_bias", check.bias())
        if len(check.promised) > 0:
            self.logger.record("diagnostics/promised", float(check.promised.mean()))
            self.logger.record("diagnostics/gained", float(check.gained.mean()))
        self._show("values", plot_values(check))

    def _measure_returns(self, trajectories: list[Transitions]) -> None:
        measured = returns(self.model_env, trajectories, self.return_horizon)
        self.logger.record("diagnostics/real_return", float(measured.real.mean()))
        self.logger.record("diagnostics/model_return", float(measured.model.mean()))
        if not math.isnan(measured.correlation()):
            self.logger.record("diagnostics/return_correlation", measured.correlation())
        self._show("exploitation", plot_returns(measured))

    def _show(self, name: str, figure: "MatplotlibFigure") -> None:
        self.logger.record(f"figures/{name}", Figure(figure, close=False), exclude=("stdout", "log", "json", "csv"))
