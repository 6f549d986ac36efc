"""When the model is retrained, and what is checked then."""

import time
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.common.buffers import (
    ResidentTransitions,
    in_one_precision,
    max_transitions,
    n_transitions,
    relabelled,
)
from sb3_mbpo.common.compilation import compiled
from sb3_mbpo.common.errors import DivergenceError
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.common.spaces import arrays, dim_names
from sb3_mbpo.diagnostics.live import LOGGED_STEPS, LiveDiagnostics
from sb3_mbpo.dynamics.open_loop import OpenLoopError
from sb3_mbpo.dynamics.rollouts import Transitions
from sb3_mbpo.dynamics.training import FitResult, budget, fit, train_step
from sb3_mbpo.dynamics.units import lost_in_float32
from sb3_mbpo.dynamics.user_functions import describe_row

if TYPE_CHECKING:
    from sb3_mbpo.common.model_based import ModelBasedSAC

# Share of the real transitions, and of those that end an episode, on which a known function may disagree without a warning
MAX_MISMATCH = 0.01
MAX_TERMINAL_MISMATCH = 0.1
# Share of the transitions in which a dimension may change by the rounding of last observations alone
MAX_ENDS = 0.25
# Held-out transitions on which the model must have been measured for a warning
MIN_MEASURED = 50
# Relative to the reward and to the spread of all rewards
REWARD_TOLERANCE = 0.01


def progress_bars(callback: BaseCallback) -> list[ProgressBarCallback]:
    """
    :param callback: A callback or nested lists of them
    :return: The progress bars in it
    """
    if isinstance(callback, CallbackList):
        return [bar for child in callback.callbacks for bar in progress_bars(child)]
    return [callback] if isinstance(callback, ProgressBarCallback) else []


class DynamicsCallback(BaseCallback):
    """
    Every ``model_train_freq`` environment steps, fit the ensemble to all real transitions. The agent adds it to the user's
    callbacks by itself.

    It also refuses what the environment must not return: observations or rewards that are not finite.

    :param verbose: Verbosity level: 0 for no output, 1 for info messages
    """

    model: "ModelBasedSAC"

    def _init_callback(self) -> None:
        agent = self.model
        self.warned: set[str] = set()
        if not agent.uses_model:
            return
        # Anew in every `learn()`, because between two of them users may change what is in the replay buffer
        self.real, self.last_update = ResidentTransitions(agent.device), agent.lifetime_timesteps
        # At every `learn()`, because `set_env` may have brought another environment
        self.model_env = ModelEnv(agent, self.training_env)
        self.live = LiveDiagnostics(agent, self.model_env)
        termination_fn = self.model_env.termination_fn
        if termination_fn is None and agent.optimize_memory_usage:
            raise ValueError(
                "`optimize_memory_usage=True` loses the transitions that end episodes, so that the termination condition of "
                "this environment cannot be learned. Pass `termination_fn`, or leave `optimize_memory_usage` at False."
            )
        if self.verbose >= 1:
            if agent.termination_fn is not None:
                source = "given by the user"
            elif termination_fn is not None:
                source = "derived from the environment"
            else:
                source = (
                    "learned from the replay buffer, as it is not known for this environment or its wrappers. If you know it, "
                    "pass `termination_fn(obs, action, next_obs)`, which returns an array of bools. How right the learned one "
                    "is on new data is in the log: `model/termination_seen`, `model/termination_invented`"
                )
            print(f"Termination of model rollouts: {source}")

    def _on_training_start(self) -> None:
        # What the first reset returned, which is stored with the first step
        vec_normalize = self.model.get_vec_normalize_env()
        observation = self.model._last_obs if vec_normalize is None else vec_normalize.get_original_obs()
        assert observation is not None
        self._refuse_non_finite("Observations", arrays(observation), "its `reset()`")

    def _on_step(self) -> bool:
        # Here, before the transition is stored
        new_obs, rewards = self.locals["new_obs"], self.locals["rewards"]
        if (vec_normalize := self.model.get_vec_normalize_env()) is not None:
            # Normalised values are clipped: an infinity would not show
            new_obs, rewards = vec_normalize.get_original_obs(), vec_normalize.get_original_reward()
        last_obs = [info["terminal_observation"] for info in self.locals["infos"] if "terminal_observation" in info]
        if vec_normalize is not None and self.model.uses_model:
            self._warn_of_clipping(vec_normalize, last_obs)
        observations = [array for observation in (new_obs, *last_obs) for array in arrays(observation)]
        self._refuse_non_finite("Observations", observations, "its `step()`")
        self._refuse_non_finite("Rewards", [rewards], "its `step()`")
        return True

    def _refuse_non_finite(self, name: str, values: Iterable[np.ndarray], where: str) -> None:
        for value in values:
            if not np.isfinite(value).all():
                raise ValueError(
                    f"{name} must be finite numbers, but at step {self.num_timesteps} the environment returned {value}. "
                    f"Check {where}, for instance with `stable_baselines3.common.vec_env.VecCheckNan`. If it was normalised "
                    "(`VecNormalize`), make a new environment: its statistics are not finite any more."
                )

    def _warn_of_clipping(self, vec_normalize: VecNormalize, last_obs: list[Any]) -> None:
        """SB3 stores what it can undo of the normalisation of an episode's last observation."""
        if not vec_normalize.norm_obs:
            return
        keys = vec_normalize.norm_obs_keys
        normalised = [array for obs in last_obs for array in ([obs[key] for key in keys] if keys else [obs])]
        if any((np.abs(array) >= vec_normalize.clip_obs).any() for array in normalised):
            self._warn_once(
                "clip_obs",
                f"The last observation of the episode that ended at step {self.num_timesteps} lies {vec_normalize.clip_obs} "
                "standard deviations or more from the mean. SB3 stores it clipped, so the model learns from a wrong "
                "successor: raise `clip_obs` of `VecNormalize`.",
            )

    def _on_rollout_end(self) -> None:
        agent = self.model
        if not agent.uses_model or not agent.is_warmed_up:
            return
        assert agent.replay_buffer is not None
        if max_transitions(agent.replay_buffer) < 2:
            raise ValueError(
                f"`buffer_size` must be 2 or more to learn, not {agent.buffer_size!r}: with one transition there is nothing "
                "to fit a model to and to check it with"
            )
        # After loading without the replay buffer, too few transitions would spoil the loaded model
        enough = n_transitions(agent.replay_buffer) >= max(2, min(agent.learning_starts, max_transitions(agent.replay_buffer)))
        is_fitted, now = agent.dynamics.is_fitted, agent.lifetime_timesteps
        retrain = enough and (not is_fitted or now - agent.last_model_training >= agent.model_train_freq)
        if retrain or (is_fitted and self._needs_rollouts()):
            transitions = self.real.update(agent.replay_buffer, now - self.last_update)
            self.last_update = now
            vec_normalize = agent.get_vec_normalize_env()
            normalises = vec_normalize is not None and vec_normalize.norm_obs
            if retrain:
                self._warn_of_rounding(transitions, normalises)
            transitions = in_one_precision(transitions, vec_normalize)
            if retrain:
                if is_fitted:
                    self._measure_model(transitions)
                self._train_model(transitions)
                agent.last_model_training = now
            self._use_model(transitions)

    @abstractmethod
    def _needs_rollouts(self) -> bool:
        """Whether the trained model is to be used again though it was not trained."""

    @abstractmethod
    def _use_model(self, transitions: Transitions) -> None:
        """What there is to do with the model before the next updates, with all real transitions."""

    def _measure_model(self, transitions: Transitions, horizon: int = max(LOGGED_STEPS)) -> OpenLoopError | None:
        """On transitions that it has not been trained on yet, up to this step of a rollout."""
        with self._timed("model", "Measuring the model's error"):
            error = self.live.before_training(transitions, horizon)
        if error is not None:
            self.model.open_loop_error = error
        return error

    def _train_model(self, transitions: Transitions) -> None:
        agent = self.model
        obs, actions, next_obs, rewards, _ = self._with_goals(transitions)
        # A loaded optimizer brings the rate that it was saved with
        update_learning_rate(agent.dynamics.optimizer, float(agent.model_learning_rate))
        n_new = agent.lifetime_timesteps - agent.last_model_training if agent.dynamics.is_fitted else len(obs)
        n_steps = budget(agent.model_gradient_steps, n_new, max(len(obs), agent.lifetime_timesteps))
        if self.verbose >= 1 and not agent.dynamics.is_fitted:
            # It takes the longest, and nothing else is printed meanwhile
            until = "until no network improves" if n_steps is None else f"{n_steps:,} gradient steps or fewer"
            print(f"First training of the model, on {len(obs):,} transitions: {until}")
        seconds = agent.seconds["model"]
        with self._timed("model", "Training the dynamics model"):
            try:
                result = fit(
                    agent.dynamics,
                    th.cat([obs, actions], dim=1),
                    th.cat([rewards[:, None], next_obs - obs], dim=1),
                    n_steps,
                    compiled_step=compiled(train_step, agent.device.type) if agent.is_compiled["model"] else None,
                )
            except DivergenceError:
                agent.log_divergence("model")
                raise
            # On the goals that were pursued: whether an episode ended may be about them
            if self.model_env.termination_fn is None:
                agent.termination_classifier.fit(transitions.next_obs, transitions.terminated)
            self._compare_with_environment(transitions)
            self.live.after_training(transitions)
        seconds = agent.seconds["model"] - seconds
        quality = self._quality(result)
        if self.verbose >= 1:
            # The log keeps only the last one before it is written
            print(
                f"Model training at step {agent.lifetime_timesteps:,} on {len(obs):,} transitions: "
                f"{result.gradient_steps:,} gradient steps, {seconds:.1f} s, {quality}"
            )
        self.logger.record("model/train_loss", result.train_loss)
        self.logger.record("model/gradient_steps", result.gradient_steps)
        self.logger.record("model/training_seconds", seconds)

    def _quality(self, result: FitResult) -> str:
        """How good the model is on held-out transitions, in the log and as a text; a warning if it is no good."""
        agent, (reward, changes) = self.model, result.r2.split([1, len(result.r2) - 1])
        parts, poor, advice = [], [], []
        # Constant dimensions are known exactly
        if not changes.isnan().all():
            median, worst = changes.nanquantile(0.5).item(), int(changes.nan_to_num(nan=th.inf).argmin())
            name = dim_names(agent.observation_space)[worst]
            self.logger.record("model/r2", median)
            self.logger.record("model/r2_worst", changes[worst].item())
            parts.append(f"of the changes {median:.2f} (worst: {name} {changes[worst].item():.2f})")
            if median <= 0:
                poor.append("the change of the observation")
                advice.append(
                    "an observation that has all that decides on what comes next (velocities; otherwise "
                    "`gymnasium.wrappers.FrameStackObservation`) and does not jump (sine and cosine in place of an angle)"
                )
        if not reward.isnan() and self.model_env.reward is None:
            self.logger.record("model/reward_r2", reward.item())
            parts.append(f"of the reward {reward.item():.2f}")
            if reward.item() <= 0:
                poor.append("the reward")
                advice.append("a `reward_fn` if the reward is known, or an observation that shows what it depends on")
        quality = f"R2 {', '.join(parts)}" if parts else "R2 unknown: nothing varies in what is held out"
        if poor and result.n_measured >= MIN_MEASURED:
            self._warn_once(
                "r2",
                f"The model predicts {' and '.join(poor)} no better than a constant: on {result.n_measured:,} held-out "
                f"transitions, {quality} (1 is perfect, 0 a constant). More data may help (`learning_starts`), "
                f"more training (`model_gradient_steps`), and {'; '.join(advice)}. If nothing does, SAC learns without a "
                "model (MBPO with `real_ratio=1`).",
            )
        return quality

    def _warn_of_rounding(self, transitions: Transitions, ends_are_rounded: bool) -> None:
        """
        Policies and model rollouts are in float32.

        :param transitions: Real ones
        :param ends_are_rounded: Whether last observations of episodes are, so that what is constant changes there
        """
        obs, next_obs = transitions.obs, transitions.next_obs
        lost = lost_in_float32(obs, next_obs, MAX_ENDS if ends_are_rounded else 0.0).nonzero().squeeze(1).tolist()
        if lost:
            dim = lost[0]
            size = (next_obs - obs)[:, dim].double().square().mean().sqrt().item()
            self._warn_once(
                "rounding",
                f"{dim_names(self.model.observation_space)[dim]}"
                f"{f' and {len(lost) - 1} more dimensions' if len(lost) > 1 else ''} of the observation cannot be told apart "
                f"from one step to the next in float32, in which policies and model rollouts compute: values are up to "
                f"{obs[:, dim].abs().max().item():.3g} and change by about {size:.3g}. Subtract a constant, or leave "
                "the dimension out (`gymnasium.wrappers.TransformObservation`).",
            )

    def _compare_with_environment(self, transitions: Transitions) -> None:
        """How far functions of transitions are from what the environment really did, in the log and, if too far, a warning."""
        obs, actions, next_obs, rewards, terminated = transitions
        predicted = self.model_env.termination(obs, actions, next_obs)
        differs = predicted != terminated
        self.logger.record("model/termination_mismatch", differs.float().mean().item())
        # Without it, timeouts are stored as terminations
        buffer = self.model.replay_buffer
        is_comparable = buffer is None or getattr(buffer, "handle_timeout_termination", True)
        # A learned condition knows no better than the data
        is_rare = differs.sum() <= MAX_TERMINAL_MISMATCH * (predicted | terminated).sum()
        is_right = is_rare and differs.float().mean() <= MAX_MISMATCH
        if self.model_env.termination_fn is not None and is_comparable and not is_right:
            self._report_mismatch("termination_fn", "a terminal transition", predicted, terminated, differs, transitions)
        if self.model.reward_fn is not None:
            assert self.model_env.reward is not None
            predicted = self.model_env.reward(obs, actions, next_obs)
            differs = (predicted - rewards).abs() > REWARD_TOLERANCE * (rewards.abs() + rewards.std(correction=0))
            self.logger.record("model/reward_mismatch", differs.float().mean().item())
            if differs.float().mean() > MAX_MISMATCH:
                self._report_mismatch("reward_fn", "the reward", predicted, rewards, differs, transitions)

    def _warn_once(self, key: str, message: str) -> None:
        """Once in each ``learn()``."""
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(message, stacklevel=2)

    def _report_mismatch(
        self, name: str, what: str, predicted: th.Tensor, real: th.Tensor, differs: th.Tensor, transitions: Transitions
    ) -> None:
        row = slice(int(differs.int().argmax()), int(differs.int().argmax()) + 1)
        example = describe_row(*self.model_env.as_environment(*(column[row] for column in transitions[:3])), 0)
        which = f"`{name}`" if getattr(self.model, name) is not None else "The termination derived from the environment"
        self._warn_once(
            name,
            f"{which} disagrees with the environment on {int(differs.sum()):,} of {len(differs):,} real transitions. For "
            f"{example} {what} is {predicted[row].item()} by the function and {real[row].item()} by the environment.",
        )

    def _with_goals(self, transitions: Transitions) -> Transitions:
        buffer = self.model.replay_buffer
        return relabelled(transitions, buffer) if isinstance(buffer, HerReplayBuffer) else transitions

    @contextmanager
    def _timed(self, what: str, description: str) -> Iterator[None]:
        """Count the seconds, and tell whoever watches a progress bar why it stands still."""
        start = time.perf_counter()
        try:
            with self.model.described(description):
                yield
        finally:
            self.model.seconds[what] += time.perf_counter() - start
