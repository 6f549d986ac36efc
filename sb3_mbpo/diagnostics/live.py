"""What is measured at each training of the model, just before it: on transitions that the model has not seen yet."""

import copy
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.common.buffers import normalized, recent_trajectories
from sb3_mbpo.common.spaces import unflatten
from sb3_mbpo.dynamics.open_loop import OpenLoopError, data_scale, open_loop_error, windows
from sb3_mbpo.dynamics.rollouts import Transitions, concatenate
from sb3_mbpo.theory import error_slope, gaussian_kl, model_error_from_nll, optimal_rollout_length, policy_shift_from_kl

if TYPE_CHECKING:
    from stable_baselines3.sac.policies import Actor

    from sb3_mbpo.common.model_based import ModelBasedSAC
    from sb3_mbpo.common.model_env import ModelEnv

# Steps of a rollout at which errors are logged
LOGGED_STEPS = (1, 2, 5, 10, 20)
# Enough for two digits, and cheap beside a training
MAX_WINDOWS = 200
N_PARTICLES = 25
# Transitions of the last training (a tenth of them held out), for the likelihood that those not trained on are compared
# with
N_REFERENCE = 1_000


class PolicySnapshot(NamedTuple):
    """
    What decides on actions, at some time.

    :param actor: The network
    :param vec_normalize: With the statistics that it sees observations with, if any
    """

    actor: "Actor"
    vec_normalize: VecNormalize | None


def gaussian_of(agent: "ModelBasedSAC", obs: th.Tensor, policy: PolicySnapshot | None = None) -> tuple[th.Tensor, th.Tensor]:
    """
    :param agent: The agent
    :param obs: Raw and flat, ``(n, obs_dim)``
    :param policy: The agent's from before, its present one if None
    :return: Mean and standard deviation of the policy before it is squashed, each ``(n, action_dim)``
    """
    actor, vec_normalize = policy or PolicySnapshot(agent.actor, agent.get_vec_normalize_env())
    with th.no_grad():
        seen = normalized(unflatten(agent.observation_space, obs), vec_normalize)
        mean, log_std, kwargs = actor.get_action_dist_params(seen)
        distribution = actor.action_dist.proba_distribution(mean, log_std, **kwargs).distribution
    assert isinstance(distribution, th.distributions.Normal)
    return distribution.mean, distribution.stddev


class LiveDiagnostics:
    """
    Between two trainings of the model the agent collects transitions with its latest policies. Before they are trained on,
    they show how the model generalises to them: no data are held back for it, and none are collected.

    :param agent: The agent
    :param model_env: Its model
    """

    def __init__(self, agent: "ModelBasedSAC", model_env: "ModelEnv") -> None:
        self.agent, self.model_env = agent, model_env
        # Of the last training: the policy, and what the model knew of the transitions that it was trained on
        self._policy: PolicySnapshot | None = None
        self._reference_nll: th.Tensor | None = None

    def before_training(self, transitions: Transitions, horizon: int) -> OpenLoopError | None:
        """
        :param transitions: All real transitions, the same as the model is trained on next
        :param horizon: Up to which step of a rollout
        :return: Errors of the trained model at all steps up to the horizon that were reached; None if there is nothing that it
            has not been trained on
        """
        agent = self.agent
        assert agent.replay_buffer is not None
        n_new = agent.lifetime_timesteps - agent.last_model_training
        recent = recent_trajectories(agent.replay_buffer, n_new, agent.device, agent.get_vec_normalize_env())
        if not recent:
            return None
        error = open_loop_error(
            self.model_env.open_loop,
            windows(recent, horizon, MAX_WINDOWS),
            range(1, horizon + 1),
            data_scale(transitions),
            N_PARTICLES,
        )
        log_open_loop_error(agent.logger, error)
        new = concatenate(recent)
        self._log_theory(new)
        if self.model_env.termination_fn is None:
            self._log_learned_termination(new)
        return error

    def _log_learned_termination(self, recent: Transitions) -> None:
        obs, actions, next_obs, _, terminated = recent
        ends = self.model_env.termination(obs, actions, next_obs)
        if terminated.any():
            self.agent.logger.record("model/termination_seen", ends[terminated].float().mean().item())
        if not terminated.all():
            self.agent.logger.record("model/termination_invented", ends[~terminated].float().mean().item())

    def _log_theory(self, recent: Transitions) -> None:
        agent = self.agent
        if self._policy is None or self._reference_nll is None:
            return
        kl = gaussian_kl(*gaussian_of(agent, recent.obs), *gaussian_of(agent, recent.obs, self._policy))
        shift = policy_shift_from_kl(kl)
        error = model_error_from_nll(self._nll(recent), self._reference_nll)
        agent.logger.record("theory/model_error", error)
        agent.logger.record("theory/policy_shift", shift)
        if shift > 0:
            # From no shift and no error, where the model was trained, to here
            agent.logger.record("theory/error_slope", error_slope(np.array([0, shift]), np.array([0, error])))
        if 0 <= agent.gamma < 1:
            # Rollouts beyond the effective horizon change nothing
            longest = 1 / (1 - agent.gamma)
            agent.logger.record(
                "theory/optimal_rollout_length", min(optimal_rollout_length(error, shift, agent.gamma), longest)
            )

    def after_training(self, transitions: Transitions) -> None:
        """
        :param transitions: What the model has been trained on
        """
        # Not a deepcopy, which torch refuses for gSDE's exploration matrix
        with th.random.fork_rng(devices=[]):
            actor = self.agent.policy.make_actor()
        actor.load_state_dict(self.agent.actor.state_dict())
        # As it acts
        actor.set_training_mode(False)
        # As it is saved: without the environments
        self._policy = PolicySnapshot(actor, copy.deepcopy(self.agent.get_vec_normalize_env()))
        rows = th.randint(len(transitions.obs), (N_REFERENCE,), device=transitions.obs.device)
        self._reference_nll = self._nll(Transitions(*(column[rows] for column in transitions)))

    def _nll(self, transitions: Transitions) -> th.Tensor:
        obs, actions, next_obs, rewards, _ = transitions
        return self.agent.dynamics.nll(th.cat([obs, actions], dim=1), th.cat([rewards[:, None], next_obs - obs], dim=1))


def log_open_loop_error(logger: Logger, error: OpenLoopError) -> None:
    """
    :param logger: SB3's
    :param error: What was measured. Infinite predictions are logged as such; what does not exist, such as the share of a
        variance of 0, is not.
    """
    varies = error.varies()
    if not varies.any():
        return
    relative_error, relative_std, r2 = error.relative(), error.relative("std"), error.r2()
    for row, step in enumerate(error.steps):
        if step not in LOGGED_STEPS:
            continue
        values = {
            "error": relative_error[row],
            "std": relative_std[row],
            "inside_1_sigma": error.inside[0, row, 1:][varies].mean(),
            "inside_2_sigma": error.inside[1, row, 1:][varies].mean(),
            "r2": r2[row, 1:][varies].nanquantile(0.5),
            "reward_r2": r2[row, 0],
        }
        for name, value in values.items():
            if not value.isnan():
                logger.record(f"open_loop/{name}_{step}", value.item())
