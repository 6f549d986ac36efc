"""DHMBPO as a user of Stable-Baselines3 meets it: constructor, and what is done after each block of steps. No mathematics."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn, Schedule, TrainFreq, TrainFrequencyUnit
from torch import nn

from sb3_mbpo.common.adam import TrainState, coefficients, count_steps, live_tensors
from sb3_mbpo.common.compilation import compiled, updates_per_step
from sb3_mbpo.common.errors import DivergenceError
from sb3_mbpo.common.model_based import ModelBasedSAC
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.common.spaces import flat_dim
from sb3_mbpo.common.undisturbed import undisturbed
from sb3_mbpo.common.update import entropy_coefficient, has_finite_networks, networks_state, optimizers, restore_networks
from sb3_mbpo.dhmbpo.arguments import check_arguments, check_optimizers
from sb3_mbpo.dhmbpo.buffers import StateBuffer
from sb3_mbpo.dhmbpo.callbacks import DHMBPOCallback
from sb3_mbpo.dhmbpo.policies import NO_SDE, ActorLayers, CriticLayers, DHMBPOActor, DHMBPOPolicy, MultiInputPolicy
from sb3_mbpo.dhmbpo.rollouts import Model, RolloutNoise, Termination, draw_rollout_noise, roll_out, state_step
from sb3_mbpo.dhmbpo.update import (
    Networks,
    Noise,
    Settings,
    State,
    critic_update,
    critic_values,
    joint_update,
    soft_returns,
)
from sb3_mbpo.dynamics.user_functions import TensorFn, TransitionFn

__all__ = ["DHMBPO", "DHMBPOPolicy", "MultiInputPolicy"]

SelfDHMBPO = TypeVar("SelfDHMBPO", bound="DHMBPO")

# Joint updates between two distribution rollouts, and how many of these rollouts the buffer of states has room for
UPDATES_PER_ROLLOUT = 20
ROLLOUTS_KEPT = 10
# Steps of a block, below which there is a warning
SHORTEST_BLOCK = 50
# Updates of the critics alone, for the new model, for each joint update that follows
CRITIC_SHARE = 0.25

Update = Callable[..., th.Tensor]


class DHMBPO(ModelBasedSAC):
    """
    Double Horizon Model-Based Policy Optimization (DHMBPO): SAC that learns from short rollouts of the model, through which
    gradients pass, in states of long ones.

    Paper: https://arxiv.org/abs/2512.15439 (Kubo, Parmas, Ishii: Double Horizon Model-Based Policy Optimization, TMLR 2025).

    The policy stays as it is for a block of ``train_freq`` environment steps. Then the model is trained, and policy and
    critics make ``gradient_steps`` updates. Real transitions train the model only.

    The arguments up to ``device`` are those of :class:`stable_baselines3.SAC`, without ``n_steps``,
    ``target_update_interval`` and gSDE, which have no meaning here; the defaults are the paper's.

    :param policy: The policy model to use (MlpPolicy, or MultiInputPolicy for ``Dict`` observations)
    :param env: The environment to learn from (if registered in Gym, can be str). Observations must be a ``Box`` of floats
        of any shape or a ``Dict`` of them, actions a bounded ``Box``. Do not normalise observations (``VecNormalize``): the
        policy does.
    :param learning_rate: learning rate for adam optimizer,
        the same learning rate will be used for all networks (Q-Values, Actor and temperature, but not the model's)
        it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer (real transitions)
    :param learning_starts: how many environment steps of random actions to collect before anything is learned. Counted once
        in the agent's life: not again at the next ``learn()`` or after loading.
    :param batch_size: Number of rollouts that are made side by side, in each gradient update and for the states it starts in
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
    :param gamma: the discount factor, below 1
    :param train_freq: Steps of a block, after which model and policy are trained. Alternatively pass a tuple of frequency and
        unit like ``(1000, "step")`` or ``(2, "episode")``. For tasks of a few thousand steps in all, 250.
    :param gradient_steps: How many updates of actor and critics to do after each block; a quarter as many of the critics alone
        come before. The first time there are as many for each block of random steps. Set to ``-1`` means to do as many as
        there were steps in the block, in all environments.
    :param action_noise: the action noise type (None by default), this can help for hard exploration problem.
        Not used in model rollouts.
    :param replay_buffer_class: Replay buffer class to use for the real transitions.
        If ``None``, it will be automatically selected. With SB3's ``HerReplayBuffer``, model rollouts pursue relabelled
        goals, and the model predicts the reward, as the environment's own has no gradient.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer. It loses the last observation of
        every episode, so that the model cannot learn from those transitions. As in SB3 it needs
        ``replay_buffer_kwargs={"handle_timeout_termination": False}``.
    :param ent_coef: Entropy regularization coefficient. Set it to 'auto' to learn it automatically
        (and 'auto_0.1' for using 0.1 as initial value)
    :param target_entropy: target entropy when learning ``ent_coef`` (``ent_coef = 'auto'``)
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
        (:class:`~sb3_mbpo.dhmbpo.DHMBPOPolicy`)
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param ensemble_size: Number of networks in the dynamics ensemble
    :param num_elites: Number of networks, the best on held-out data, that generate states; None: all
    :param model_hidden_sizes: Units of each hidden layer of each network
    :param model_learning_rate: Learning rate of the ensemble's Adam
    :param termination_fn: See :class:`~sb3_mbpo.MBPO`. A function of arrays cannot be part of a compiled graph: each rollout
        is then made twice.
    :param reward_fn: Reward of transitions, through which gradients pass: ``reward_fn(obs, action, next_obs)`` gets tensors
        of shape ``(n, *space.shape)``, float32 and not normalised (for ``Dict`` observations dictionaries of them), actions in
        the environment's units, and returns a tensor of shape ``(n,)`` made of them by operations of torch. If None, the model
        predicts the reward. Saved with the agent, so it must be picklable. If it disagrees with more than 1 % of the real
        transitions, a warning says so.
    :param model_gradient_steps: See :class:`~sb3_mbpo.MBPO`
    :param compile: Whether gradient updates and model training run as compiled graphs (``torch.compile``). Compiling takes one
        to two minutes, some seconds on the same machine later, and needs a C++ compiler. "auto": if ``learn()`` is going to
        make 2,000 updates or more. Where it cannot be done, the same updates run as they are; why is printed
        (``verbose=1``), or, with True, a warning.
    :param training_horizon: Steps of the rollouts through which gradients pass (paper: 3 to 7 are about as good)
    :param distribution_horizon: States of each of the rollouts whose states training rollouts start in (paper: 40 is better on
        some tasks)
    :raises ValueError: if an argument is not in its range, or a space is not supported
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": DHMBPOPolicy, "MultiInputPolicy": MultiInputPolicy}
    name: ClassVar[str] = "DHMBPO"
    min_updates_to_compile: ClassVar[int] = 2_000
    needs_gradients: ClassVar[bool] = True
    learns_normalised_rewards: ClassVar[bool] = False
    policy: DHMBPOPolicy
    actor: DHMBPOActor
    model_buffer: StateBuffer

    def __init__(
        self,
        policy: str | type[DHMBPOPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 5_000,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.995,
        train_freq: int | tuple[int, str] = 1_000,
        gradient_steps: int = -1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        ent_coef: str | float = "auto_0.1",
        target_entropy: str | float = "auto",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        ensemble_size: int = 5,
        num_elites: int | None = None,
        model_hidden_sizes: Sequence[int] = (200, 200, 200, 200),
        model_learning_rate: float = 2e-3,
        termination_fn: TransitionFn | None = None,
        reward_fn: TensorFn | None = None,
        model_gradient_steps: float | None = 1.0,
        compile: bool | str = "auto",
        training_horizon: int = 5,
        distribution_horizon: int = 20,
    ) -> None:
        if (policy_kwargs or {}).get("use_sde"):
            # SB3 would overwrite it
            raise ValueError(NO_SDE)
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            ent_coef=ent_coef,
            target_entropy=target_entropy,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            ensemble_size=ensemble_size,
            num_elites=ensemble_size if num_elites is None else num_elites,
            model_hidden_sizes=model_hidden_sizes,
            model_learning_rate=model_learning_rate,
            # After each block, see `prepare_to_learn`
            model_train_freq=1,
            termination_fn=termination_fn,
            reward_fn=reward_fn,
            model_gradient_steps=model_gradient_steps,
            compile=compile,
            _init_setup_model=False,
        )
        self.training_horizon = training_horizon
        self.distribution_horizon = distribution_horizon

        # What the model was last trained on, and the model as something to act in; from the callback
        self.real_states: th.Tensor | None = None
        self.model_env: ModelEnv | None = None

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        check_optimizers(self)
        self.prepare_to_learn()
        assert isinstance(self.train_freq, TrainFreq)
        if self.train_freq.unit is TrainFrequencyUnit.STEP and self.model_train_freq < SHORTEST_BLOCK:
            warnings.warn(
                f"`train_freq={self.train_freq.frequency}` makes blocks of {self.model_train_freq} steps, after each of which "
                "the model is trained and Adam begins anew: slow, and hardly tried. DHMBPO is meant for 1,000, or 250 where "
                "some thousand steps are all there are.",
                stacklevel=3,
            )

    def prepare_to_learn(self) -> None:
        """The model is trained after each block, and the buffer of states has room for the same number of rollouts."""
        assert isinstance(self.train_freq, TrainFreq)
        in_steps = self.train_freq.unit is TrainFrequencyUnit.STEP
        self.model_train_freq = max(self.train_freq.frequency * self.n_envs, 1) if in_steps else 1
        capacity = ROLLOUTS_KEPT * self.batch_size * self.distribution_horizon
        if getattr(self, "model_buffer", None) is None or len(self.model_buffer.states) != capacity:
            self.model_buffer = StateBuffer(capacity, flat_dim(self.observation_space), self.device)

    @property
    def rollout_length(self) -> int:
        """How many steps from real states on the model is relied upon."""
        return self.distribution_horizon - 1

    @property
    def about_rollouts(self) -> str:
        """What a report says of them."""
        return f"{self.distribution_horizon} states from real ones on, {self.training_horizon} steps with gradients"

    @property
    def advice_on_long_rollouts(self) -> str:
        """What a report says if they go further than the model is right for."""
        return "lower `distribution_horizon` if it does not learn"

    @property
    def advice_on_divergence(self) -> str:
        """What to do when gradient updates diverge."""
        if self.reward_fn is None:
            return "Lower `learning_rate`."
        return "Lower `learning_rate`, or mend `reward_fn`, whose gradient must be finite: that of a square root at 0 is not."

    def learn(
        self: SelfDHMBPO,
        total_timesteps: int = 50_000,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DHMBPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDHMBPO:
        """
        Return a trained model.

        :param total_timesteps: The total number of environment steps to train on; with the default, the paper's agents are
            above 3,000 on Hopper, Walker2d, HalfCheetah, Ant and Humanoid
        :param callback: callback(s) called at every step with state of the algorithm.
        :param log_interval: Number of episodes before logging
        :param tb_log_name: the name of the run for TensorBoard logging
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging). The warm-up does not
            start again.
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        :raises ValueError: if the environment returns observations or rewards that are not finite
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def check_arguments(self) -> None:
        """
        :raises ValueError: if an argument is not in its range
        """
        super().check_arguments()
        check_arguments(self)

    def make_callback(self) -> DHMBPOCallback:
        """
        :return: What trains the model, in each ``learn()``
        """
        return DHMBPOCallback(self.verbose)

    def _is_over(self, lifetime_timesteps: int) -> bool:
        # With the last of the random blocks: another one would be the untrained policy's
        return lifetime_timesteps >= self.learning_starts

    @property
    def can_update(self) -> bool:
        """Whether there is a model to learn from."""
        return super().can_update and self.real_states is not None

    def updates_after(self, rollout: RolloutReturn) -> int:
        """
        :param rollout: The steps in the environment
        :return: How many updates follow them
        """
        if self._n_updates > 0:
            return super().updates_after(rollout)
        # The random steps count as much as those that follow
        if self.gradient_steps < 0:
            return self.lifetime_timesteps
        assert isinstance(self.train_freq, TrainFreq)
        in_steps = self.train_freq.unit is TrainFrequencyUnit.STEP
        done = self.lifetime_timesteps // self.n_envs if in_steps else self._episodes_before_reset + self._episode_num
        return self.gradient_steps * max(done // self.train_freq.frequency, 1)

    def planned_updates(self, steps: int) -> float:
        """
        :param steps: Environment steps that are to come
        :return: How many joint updates there will be, those for the random steps included; where it depends on the length of
            episodes, one for each step
        """
        if not self._is_over(self.lifetime_timesteps + steps):
            return 0.0
        return (steps + (self.lifetime_timesteps if self._n_updates == 0 else 0)) * updates_per_step(self)

    @property
    def not_copied(self) -> list[object]:
        """What copies of the agent, made to be trained without new data, can share with it: it is only read."""
        return [*super().not_copied, self.real_states, self.model_env and self.model_env.env]

    def combine(self, values: th.Tensor) -> th.Tensor:
        """
        :param values: Of all critics for the same actions, ``(n, n_critics)``
        :return: Their mean, which the actor maximises, ``(n,)``
        """
        return values.mean(dim=1)

    # --- States in which training rollouts start ---

    @th.no_grad()
    def fill_model_buffer(self, model_env: ModelEnv, obs: th.Tensor) -> int:
        """
        Distribution rollouts: add the states that the present policy reaches under the model, those in which it starts
        included, ``batch_size * distribution_horizon`` or more.

        :param model_env: The agent's model
        :param obs: In which they start, these and later ones, any of them with the same probability, ``(n, obs_dim)``
        :return: How many states there were
        """
        self.model_env, self.real_states = model_env, obs
        n_states = 0
        while n_states < self.batch_size * self.distribution_horizon:
            states = self._states_under_the_model(model_env, obs)
            self.model_buffer.extend(states)
            n_states += len(states)
        return n_states

    def _states_under_the_model(self, env: ModelEnv, obs: th.Tensor) -> th.Tensor:
        """Those that are alive, of ``batch_size`` rollouts from some of these on."""
        step = compiled(state_step, self.device.type) if self._runs_compiled() else state_step
        networks, model, termination = self._networks(), self._model(env), env.termination_of_tensors
        parameters = self._live_state(networks).actor.parameters
        noises = self._draw_rollout(self.distribution_horizon - 1, self.batch_size)
        current = obs[th.randint(len(obs), (self.batch_size,), device=self.device)].float()
        goes_on = th.ones(self.batch_size, dtype=th.bool, device=self.device)
        states, alive = [current], [goes_on]
        for i in range(self.distribution_horizon - 1):
            noise = RolloutNoise(*(each[i] for each in noises))
            actions, next_obs, stays_alive = step(networks.actor, parameters, model, current, noise, termination)
            goes_on = goes_on & stays_alive
            next_obs = th.where(goes_on[:, None], next_obs, current)
            if termination is None:
                # A user's function of arrays
                goes_on = goes_on & ~env.termination(current, actions, next_obs)
                next_obs = th.where(goes_on[:, None], next_obs, current)
            current = next_obs
            states.append(current)
            alive.append(goes_on)
        return th.stack(states)[th.stack(alive)]

    def sample_generated(self, n: int) -> tuple[Any, th.Tensor]:
        """
        :param n: How many
        :return: Generated observations, as the critics see them, and actions of the policy in them
        """
        assert self.model_env is not None
        obs = self.model_buffer.sample(n)
        with th.no_grad():
            return self.model_env.as_policy(obs), self.model_env.policy(obs)

    @th.no_grad()
    def promised_values(self, obs: th.Tensor) -> th.Tensor | None:
        """
        :param obs: Raw and flat, ``(n, obs_dim)``
        :return: Soft return of a training rollout from each of these states, with the critics' mean at its end, ``(n,)``; None
            before there is a model
        """
        env = self.model_env
        if env is None:
            return None
        networks, batches = self._networks(), obs.float().split(self.batch_size)
        state, model = self._live_state(networks), self._model(env)
        ent_coef, gamma = entropy_coefficient(state.ent_coef), th.tensor(self.gamma, device=self.device)
        values = []
        for start in batches:
            noise = self._draw_rollout(self.training_horizon, len(start))
            arguments = networks.actor, state.actor.parameters, model, start, noise
            rollout = roll_out(*arguments, env.termination, env.reward_of_tensors)
            last = rollout.obs[-1], rollout.actions[-1]
            last_values = critic_values(networks.critic, state.critic.parameters, state.bounds, *last).mean(dim=0)
            values.append(soft_returns(rollout, ent_coef, gamma, last_values))
        return th.cat(values)

    # --- Updates ---

    @th.no_grad()
    def try_updates(self) -> None:
        """Make the compiled updates on a batch of zeros, and undo them: they are compiled then."""
        assert self.env is not None
        before, device, env = networks_state(self), self.device, ModelEnv(self, self.env)
        with undisturbed(self):
            start = th.zeros(self.batch_size, flat_dim(self.observation_space), device=device)
            networks, model, termination = self._networks(), self._model(env), env.termination_of_tensors
            parameters = self._live_state(networks).actor.parameters
            noise = RolloutNoise(*(each[0] for each in self._draw_rollout(1, self.batch_size)))
            compiled(state_step, device.type)(networks.actor, parameters, model, start, noise, termination)
            ended = th.zeros(self.training_horizon, self.batch_size, dtype=th.bool, device=device)
            for update in (critic_update, joint_update):
                arguments = networks, self._live_state(networks), model, start, self._draw(self.batch_size)
                which = ended if termination is None else termination
                compiled(update, device.type)(*arguments, self._settings(1)[0], which, env.reward_of_tensors)
        restore_networks(self, before)

    def _train_compiled(self, gradient_steps: int, batch_size: int) -> None:
        of_critics, joint = (compiled(update, self.device.type) for update in (critic_update, joint_update))
        self._train(gradient_steps, batch_size, of_critics, joint)

    def _train_eagerly(self, gradient_steps: int, batch_size: int) -> None:
        self._train(gradient_steps, batch_size, critic_update, joint_update)

    def _train(self, gradient_steps: int, batch_size: int, of_critics: Update, joint: Update) -> None:
        if self.real_states is None or self.model_env is None:
            raise ValueError(
                "`train` needs states to start in, which are not saved with an agent: call `learn`, which trains the model "
                "and then calls `train`."
            )
        if self.env is not None and self.model_env.env is not self.env:
            # `set_env` since the last block
            self.model_env = ModelEnv(self, self.env)
        before, start, dim = networks_state(self), time.perf_counter(), flat_dim(self.observation_space)
        if self.verbose >= 1 and self._n_updates == 0:
            # They take the longest, and nothing else is printed meanwhile
            print(f"First updates, for all steps so far: {gradient_steps:,}")
        self._update_learning_rate(optimizers(self))
        # Adam begins anew with each model (paper's code; what it does alone, nobody has published)
        for optimizer in optimizers(self):
            optimizer.state.clear()
        try:
            # What the actor does changes with them, so they belong to the updates
            self.policy.set_statistics(self.dynamics.input_mean[:dim], self.dynamics.input_std[:dim])
            with self.described("Updating policy and critics"):
                results, n_lost = self._run_updates(gradient_steps, batch_size, of_critics, joint)
            if n_lost > 0 and self.reward_fn is not None:
                raise ValueError(
                    f"`reward_fn` must return finite numbers, but {n_lost:,} of those that it returned in model rollouts were "
                    "not: bound what it computes (`torch.clamp`)."
                )
            if not has_finite_networks(self):
                raise DivergenceError
        except BaseException:
            restore_networks(self, before)
            raise
        self._n_updates += gradient_steps
        *losses, alive, _ = results.mean(dim=0).tolist()
        self.log_losses(*losses)
        self.logger.record("train/alive", alive)
        q_low, q_high = self.policy.critic.bounds.tolist()
        self.logger.record("train/q_low", q_low)
        self.logger.record("train/q_high", q_high)
        if self.verbose >= 1:
            print(
                f"Updates at step {self.lifetime_timesteps:,}: {gradient_steps:,}, {time.perf_counter() - start:.1f} s, "
                f"{alive:.0%} of the rollouts alive, bounds of the critics {q_low:.4g} and {q_high:.4g}"
            )

    @th.no_grad()
    def _run_updates(self, gradient_steps: int, batch_size: int, of_critics: Update, joint: Update) -> tuple[th.Tensor, int]:
        """What the joint updates returned, and how many steps of all rollouts were lost."""
        self._roll_out_states()
        critics = [self.policy.critic.optimizer]
        critic_results = self._some_updates(of_critics, critics, math.ceil(CRITIC_SHARE * gradient_steps), batch_size)
        results = []
        for done in range(0, gradient_steps, UPDATES_PER_ROLLOUT):
            self._roll_out_states()
            n = min(UPDATES_PER_ROLLOUT, gradient_steps - done)
            results += self._some_updates(joint, optimizers(self), n, batch_size)
        self.policy.critic_target.bounds.copy_(self.policy.critic.bounds)
        return th.stack(results), int(th.stack([result[-1] for result in [*critic_results, *results]]).sum())

    def _roll_out_states(self) -> None:
        assert self.model_env is not None and self.real_states is not None
        start = time.perf_counter()
        self.fill_model_buffer(self.model_env, self.real_states)
        self.seconds["rollouts"] += time.perf_counter() - start

    def _some_updates(
        self, update: Update, optimizers: Sequence[th.optim.Optimizer], n: int, batch_size: int
    ) -> list[th.Tensor]:
        """On the networks' own tensors: nothing waits for a number on the way."""
        assert self.model_env is not None
        env, networks = self.model_env, self._networks()
        state, model, reward = self._live_state(networks), self._model(env), env.reward_of_tensors
        results = []
        for settings in self._settings(n):
            start, noise = self.model_buffer.sample(batch_size), self._draw(batch_size)
            termination: Termination | None = env.termination_of_tensors
            if termination is None:
                # A user's function of arrays: the same rollout before, without gradients
                arguments = networks.actor, state.actor.parameters, model, start, noise.rollout
                termination = roll_out(*arguments, env.termination, reward).alive[1:] == 0
            results.append(update(networks, state, model, start, noise, settings, termination, reward))
        for optimizer in optimizers:
            count_steps(optimizer, n)
        return results

    def _networks(self) -> Networks:
        return Networks(ActorLayers(self.actor), CriticLayers(self.policy.critic))

    def _live_state(self, networks: Networks) -> State:
        """The networks' own tensors, not copies."""

        def names(module: nn.Module) -> list[str]:
            return [name for name, _ in module.named_parameters()]

        def train_state(module: nn.Module, optimizer: th.optim.Optimizer) -> TrainState:
            return TrainState(*(dict(zip(names(module), each, strict=True)) for each in live_tensors(optimizer)))

        targets = [parameter.detach() for parameter in self.policy.critic_target.parameters()]
        if self.ent_coef_optimizer is not None:
            ent_coef = TrainState(*({"log_ent_coef": each[0]} for each in live_tensors(self.ent_coef_optimizer)))
        else:
            ent_coef = TrainState({"ent_coef": self.ent_coef_tensor.reshape(1)}, {}, {})
        return State(
            train_state(networks.actor, self.actor.optimizer),
            train_state(networks.critic, self.policy.critic.optimizer),
            dict(zip(names(networks.critic), targets, strict=True)),
            ent_coef,
            self.policy.critic.bounds,
        )

    def _model(self, env: ModelEnv) -> Model:
        elites, dim = self.dynamics.elites.long(), flat_dim(self.observation_space)

        def mask(dims: Sequence[int]) -> th.Tensor:
            return th.tensor([i in dims for i in range(dim)], device=self.device)

        return Model(
            self.dynamics,
            [weight.detach()[elites] for weight in self.dynamics.weights],
            [bias.detach()[elites] for bias in self.dynamics.biases],
            mask(env.goal_dims),
            mask(env.binary_dims),
        )

    def _draw_rollout(self, horizon: int, batch_size: int) -> RolloutNoise:
        obs_dim, action_dim = flat_dim(self.observation_space), flat_dim(self.action_space)
        return draw_rollout_noise(horizon, batch_size, obs_dim, action_dim, self.num_elites, self.device)

    def _draw(self, batch_size: int) -> Noise:
        critic, rollout = self.policy.critic, self._draw_rollout(self.training_horizon, batch_size)
        two = th.rand(critic.n_critics, device=self.device).argsort()[:2]
        return Noise(rollout, two, critic.draw_dropped(2, batch_size))

    def _settings(self, n: int) -> list[Settings]:
        """Of the next updates."""
        each = th.ones(n, device=self.device)
        settings = Settings(
            coefficients(self.actor.optimizer, n),
            coefficients(self.policy.critic.optimizer, n),
            # A fixed entropy coefficient needs no numbers: any will do
            coefficients(self.ent_coef_optimizer or self.actor.optimizer, n),
            float(self.target_entropy) * each,
            self.gamma * each,
            self.tau * each,
        )
        return [Settings(*numbers) for numbers in zip(*settings, strict=True)]

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "model_buffer", "real_states", "model_env"]
