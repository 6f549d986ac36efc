"""How far the model is rolled out, and when."""

from typing import TYPE_CHECKING

import torch as th

from sb3_mbpo.common.buffers import begins_episode, model_buffer_size
from sb3_mbpo.common.callbacks import DynamicsCallback
from sb3_mbpo.diagnostics.live import LOGGED_STEPS
from sb3_mbpo.dynamics.open_loop import OpenLoopError
from sb3_mbpo.dynamics.rollouts import Transitions
from sb3_mbpo.mbpo.schedules import AUTO_MAX, auto_rollout_length

if TYPE_CHECKING:
    from sb3_mbpo.mbpo import MBPO


class MBPOCallback(DynamicsCallback):
    """
    After each training of the model, fill the model buffer with rollouts of the current policy (paper, Algorithm 2).

    :param verbose: Verbosity level: 0 for no output, 1 for info messages
    """

    model: "MBPO"

    def _needs_rollouts(self) -> bool:
        agent = self.model
        is_due = agent.lifetime_timesteps - agent.last_rollouts >= agent.model_train_freq
        return agent.uses_generated_data and (is_due or agent.model_buffer.size() == 0)

    def _measure_model(self, transitions: Transitions, horizon: int = max(LOGGED_STEPS)) -> OpenLoopError | None:
        agent = self.model
        if not isinstance(agent.rollout_schedule, str):
            return super()._measure_model(transitions, horizon)
        error = super()._measure_model(transitions, AUTO_MAX)
        if error is not None:
            errors = error.relative("sample_rmse").tolist()
            agent.auto_rollout_length = auto_rollout_length(errors, agent.auto_rollout_length)
        return error

    def _use_model(self, transitions: Transitions) -> None:
        if self.model.uses_generated_data:
            self._generate_rollouts(transitions)
            self.model.last_rollouts = self.model.lifetime_timesteps

    def _generate_rollouts(self, transitions: Transitions) -> None:
        agent = self.model
        length = agent.rollout_length
        with self._timed("rollouts", "Generating model rollouts"):
            agent.model_buffer.resize(
                model_buffer_size(agent.model_retain_epochs, agent.model_train_freq, agent.rollout_batch_size, length)
            )
            n_generated = agent.fill_model_buffer(self.model_env, self._start_states(transitions))
        self.logger.record("model/model_buffer_gb", agent.model_buffer.n_bytes / 1e9)
        self.logger.record("model/rollout_length", length)
        self.logger.record("model/rollout_length_mean", n_generated / agent.rollout_batch_size)

    def _start_states(self, transitions: Transitions) -> th.Tensor:
        """Of which model rollouts start in any with the same probability."""
        obs, buffer = self._with_goals(transitions).obs, self.model.replay_buffer
        if self.model.rollout_start == "replay":
            return obs
        assert buffer is not None
        obs = obs[th.as_tensor(begins_episode(buffer), device=obs.device)]
        if len(obs) == 0:
            raise ValueError(
                f"There is no beginning of an episode among the {len(transitions.obs):,} real transitions, for model rollouts "
                "to start in (`rollout_start='initial'`). Raise `buffer_size` above the length of an episode."
            )
        return obs
