"""MBPO as a user of Stable-Baselines3 meets it: constructor, buffers and which updates are made. No mathematics."""

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.sac.policies import MlpPolicy, MultiInputPolicy, SACPolicy

from sb3_mbpo.common.buffers import MixedReplayBuffer, ModelReplayBuffer, model_buffer_size
from sb3_mbpo.common.compilation import compiled
from sb3_mbpo.common.errors import DivergenceError, UnsupportedSpaceError
from sb3_mbpo.common.model_based import ModelBasedSAC
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.common.update import (
    has_finite_networks,
    networks_state,
    not_covered,
    optimizers,
    restore_networks,
    run_updates,
    sac_update,
    try_update,
)
from sb3_mbpo.dynamics.user_functions import TransitionFn
from sb3_mbpo.mbpo import value_expansion
from sb3_mbpo.mbpo.arguments import check_arguments
from sb3_mbpo.mbpo.callbacks import MBPOCallback
from sb3_mbpo.mbpo.schedules import longest_rollout, rollout_length

__all__ = ["MBPO", "MlpPolicy", "MultiInputPolicy", "UnsupportedSpaceError"]

SelfMBPO = TypeVar("SelfMBPO", bound="MBPO")


class MBPO(ModelBasedSAC):
    """
    Model-Based Policy Optimization (MBPO): SAC that learns mostly from short rollouts of an ensemble of dynamics models.

    Paper: https://arxiv.org/abs/1906.08253 (Janner, Fu, Zhang, Levine: When to Trust Your Model, NeurIPS 2019).
    Where the paper is silent, the authors' release (https://github.com/jannerm/mbpo) is followed.

    The arguments up to ``device`` are those of :class:`stable_baselines3.SAC`; three defaults differ from SB3's
    (``learning_starts``, ``gradient_steps``, and ``total_timesteps`` of :meth:`learn`).

    :param policy: The policy model to use (MlpPolicy, or MultiInputPolicy for ``Dict`` observations)
    :param env: The environment to learn from (if registered in Gym, can be str). Observations must be a ``Box`` of floats
        of any shape or a ``Dict`` of them, actions a bounded ``Box``.
    :param learning_rate: learning rate for adam optimizer,
        the same learning rate will be used for all networks (Q-Values, Actor and temperature, but not the model's)
        it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer (real transitions)
    :param learning_starts: how many environment steps of random actions to collect before anything is learned. Counted once
        in the agent's life: not again at the next ``learn()`` or after loading.
    :param batch_size: Minibatch size for each gradient update, real and generated transitions together
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
    :param gamma: the discount factor
    :param train_freq: Update the policy every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient updates to do after each rollout in the environment (paper: G, 20 to 40).
        Set to ``-1`` means to do as many gradient steps as steps done in the environment during the rollout.
    :param action_noise: the action noise type (None by default), this can help for hard exploration problem.
        Not used in model rollouts.
    :param replay_buffer_class: Replay buffer class to use for the real transitions.
        If ``None``, it will be automatically selected. With SB3's ``HerReplayBuffer``, model rollouts pursue relabelled
        goals, which stay constant in each of them.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer. It loses the last observation of
        every episode, so that the model cannot learn from those transitions. As in SB3 it needs
        ``replay_buffer_kwargs={"handle_timeout_termination": False}``.
    :param n_steps: When n_step > 1, uses n-step return (with the NStepReplayBuffer) for the real part of each batch.
    :param ent_coef: Entropy regularization coefficient. Set it to 'auto' to learn it automatically
        (and 'auto_0.1' for using 0.1 as initial value)
    :param target_update_interval: update the target network every ``target_network_update_freq`` gradient steps.
    :param target_entropy: target entropy when learning ``ent_coef`` (``ent_coef = 'auto'``)
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE
        Default: -1 (only sample at the beginning of the rollout)
    :param use_sde_at_warmup: Whether to use gSDE instead of uniform sampling during the warm up phase
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param ensemble_size: Number of networks in the dynamics ensemble
    :param num_elites: Number of networks, the best on held-out data, that generate transitions
    :param model_hidden_sizes: Units of each hidden layer of each network
    :param model_learning_rate: Learning rate of the ensemble's Adam (paper: 1e-3, with ``model_gradient_steps=None``)
    :param model_train_freq: Environment steps between two trainings of the model, each followed by model rollouts
    :param rollout_batch_size: Number of model rollouts after each training
    :param rollout_schedule: ``(first_step, last_step, k_min, k_max)``: the length of the model rollouts grows linearly from
        ``k_min`` at ``first_step`` to ``k_max`` at ``last_step``, in environment steps of the agent's life; ``(0, 0, k, k)``
        for a fixed k. The model buffer has room for all rollouts of 1,000 steps: for long ones (the paper tries 200 and 500)
        lower ``rollout_batch_size`` in proportion. Or "auto": as long as the model's measured error allows, from 1 to 25
        (:func:`sb3_mbpo.mbpo.schedules.auto_rollout_length`).
    :param model_retain_epochs: For how many epochs of 1,000 environment steps generated transitions are kept
    :param real_ratio: Share of real transitions in each batch, in [0, 1]. With 1 there are no model rollouts, and without
        ``value_expansion_horizon`` no model: plain SAC (the paper's "no model").
    :param termination_fn: Which transitions are terminal: ``termination_fn(obs, action, next_obs)`` gets arrays of shape
        ``(n, *space.shape)``, not normalised (for ``Dict`` observations dictionaries of them), and returns a bool array of
        shape ``(n,)``. If None, it is derived from the
        environment where that is known (Gymnasium's MuJoCo tasks and Pendulum), and otherwise learned from the real data.
        Saved with the agent, so it must be picklable.
        If it disagrees with more than 1 % of the real transitions, or 10 % of the terminal ones, a warning says so.
    :param reward_fn: Reward of transitions, with the same arguments, returns a float array of shape ``(n,)``. If None,
        the model predicts the reward. If it disagrees with more than 1 % of the real transitions, a warning says so.
    :param model_gradient_steps: Gradient steps of the model for each environment step since it was last trained (for the
        first training, for each transition that there is), more while transitions are few: with n of them so far 1 + 1,000 / n
        times as many. At most 20,000 times this number in one training. The first training makes fewer if held-out transitions
        become no likelier. None: the paper's rule, on and on until no network improves on held-out transitions for five
        epochs; that takes longer the more data there are, and hardly ends where there is no noise.
    :param compile: Whether gradient updates and model training run as compiled graphs (``torch.compile``): about two and
        one and a half times as fast. Compiling takes 10 to 60 s, some seconds on the same machine later, and needs a C++
        compiler. "auto": if ``learn()`` is going to make 10,000 updates or more. Where it cannot be done, SB3's own
        ``SAC.train`` is used; why is printed (``verbose=1``), or, with True, a warning.
    :param rollout_start: Where model rollouts start: "replay", in any state of the replay buffer, all equally likely (paper,
        section 4.2: branched rollouts), or "initial", in its first states of episodes, hence in the initial state
        distribution (paper, section 5, "Model usage"), for which rollouts must be as long as episodes are to see all of them.
    :param value_expansion_horizon: Steps under the model after which the critics' targets take the value of the state that it
        predicts (paper, Figure 3, right; Feinberg et al. 2018), 0 for SAC's targets
    :raises ValueError: if an argument is not in its range, or a space is not supported
    """

    name: ClassVar[str] = "MBPO"
    min_updates_to_compile: ClassVar[int] = 10_000
    model_buffer: ModelReplayBuffer

    def __init__(
        self,
        policy: str | type[SACPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 5_000,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 20,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        ensemble_size: int = 7,
        num_elites: int = 5,
        model_hidden_sizes: Sequence[int] = (200, 200, 200, 200),
        model_learning_rate: float = 2e-3,
        model_train_freq: int = 250,
        rollout_batch_size: int = 100_000,
        rollout_schedule: Sequence[int] | str = (20_000, 100_000, 1, 15),
        model_retain_epochs: int = 1,
        real_ratio: float = 0.05,
        termination_fn: TransitionFn | None = None,
        reward_fn: TransitionFn | None = None,
        model_gradient_steps: float | None = 1.0,
        compile: bool | str = "auto",
        rollout_start: str = "replay",
        value_expansion_horizon: int = 0,
    ) -> None:
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
            n_steps=n_steps,
            ent_coef=ent_coef,
            target_update_interval=target_update_interval,
            target_entropy=target_entropy,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            use_sde_at_warmup=use_sde_at_warmup,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            ensemble_size=ensemble_size,
            num_elites=num_elites,
            model_hidden_sizes=model_hidden_sizes,
            model_learning_rate=model_learning_rate,
            model_train_freq=model_train_freq,
            termination_fn=termination_fn,
            reward_fn=reward_fn,
            model_gradient_steps=model_gradient_steps,
            compile=compile,
            _init_setup_model=False,
        )
        self.rollout_batch_size = rollout_batch_size
        self.rollout_schedule = rollout_schedule
        self.model_retain_epochs = model_retain_epochs
        self.real_ratio = real_ratio
        self.rollout_start = rollout_start
        self.value_expansion_horizon = value_expansion_horizon

        # Of the "auto" schedule
        self.auto_rollout_length = 1
        self.last_rollouts = 0
        # What value expansion rolls out in
        self._model_env: ModelEnv | None = None

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self.model_buffer = self._make_model_buffer()
        if self.verbose >= 1 and self.uses_generated_data:
            room, gigabytes = len(self.model_buffer.rewards), self.model_buffer.n_bytes / 1e9
            print(f"Model buffer: room for {room:,} generated transitions, {gigabytes:.2f} GB when it is full")

    def _make_model_buffer(self) -> ModelReplayBuffer:
        """For rollouts of the present length, with room for the longest to come."""
        assert isinstance(self.action_space, spaces.Box)
        now, longest = self.rollout_length, longest_rollout(self.rollout_schedule)
        capacity, max_capacity = (
            model_buffer_size(self.model_retain_epochs, self.model_train_freq, self.rollout_batch_size, length)
            for length in (now, longest)
        )
        if not self.uses_generated_data:
            capacity = max_capacity = 1
        try:
            return ModelReplayBuffer(capacity, self.observation_space, self.action_space, self.device, max_capacity)
        except RuntimeError as error:
            raise ValueError(
                f"There is no memory for {max_capacity:,} generated transitions ({str(error).splitlines()[0]}). Lower "
                f"`rollout_batch_size` ({self.rollout_batch_size:,}), `model_retain_epochs` ({self.model_retain_epochs}), or "
                f"the longest rollouts of `rollout_schedule` ({longest})."
            ) from error

    @property
    def mixed_buffer(self) -> MixedReplayBuffer:
        """What gradient updates sample from. Made anew each time, as users may replace the replay buffer."""
        assert self.replay_buffer is not None
        return MixedReplayBuffer(self.replay_buffer, self.model_buffer, self.real_ratio, self.gamma)

    @property
    def rollout_length(self) -> int:
        """The present length ``k`` of the model rollouts."""
        if isinstance(self.rollout_schedule, str):
            return self.auto_rollout_length
        return rollout_length(self.rollout_schedule, self.lifetime_timesteps)

    @property
    def about_rollouts(self) -> str:
        """What a report says of them."""
        return f"k = {self.rollout_length} now, schedule {self.rollout_schedule}, real ratio {self.real_ratio}"

    @property
    def advice_on_long_rollouts(self) -> str:
        """What a report says if they go further than the model is right for."""
        if self.rollout_schedule == "auto":
            return "they will be shorter from its next training on"
        return "shorten `rollout_schedule`"

    @property
    def uses_model(self) -> bool:
        """Whether updates depend on the model, so that it is trained. If not, this is SAC (paper: "no model")."""
        return self.uses_generated_data or self.value_expansion_horizon > 0

    @property
    def uses_generated_data(self) -> bool:
        """Whether batches have generated transitions, so that there are model rollouts."""
        return self.real_ratio < 1

    def learn(
        self: SelfMBPO,
        total_timesteps: int = 125_000,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "MBPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfMBPO:
        """
        Return a trained model (paper, Algorithm 2).

        :param total_timesteps: The total number of environment steps to train on; the default is the paper's for Hopper
        :param callback: callback(s) called at every step with state of the algorithm.
        :param log_interval: Number of episodes before logging
        :param tb_log_name: the name of the run for TensorBoard logging
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging). Neither
            the warm-up nor the rollout schedule starts again.
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        :raises ValueError: if the environment returns observations or rewards that are not finite
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def check_arguments(self) -> None:
        """
        :raises ValueError: if one of MBPO's own arguments is not in its range
        """
        super().check_arguments()
        check_arguments(self)

    def make_callback(self) -> MBPOCallback:
        """
        :return: What trains the model and generates rollouts, in each ``learn()``
        """
        return MBPOCallback(self.verbose)

    def fill_model_buffer(self, model_env: ModelEnv, obs: th.Tensor) -> int:
        """
        Add ``rollout_batch_size`` rollouts of the present length to the model buffer.

        :param model_env: The agent's model
        :param obs: In which they start, any of them with the same probability, ``(n, obs_dim)``
        :return: How many transitions there were
        """
        n_generated = 0
        start = obs[th.randint(len(obs), (self.rollout_batch_size,), device=self.device)].float()
        for step in model_env.rollout(start, self.rollout_length):
            self.model_buffer.extend(step)
            n_generated += len(step.obs)
        return n_generated

    @property
    def not_copied(self) -> list[object]:
        """What copies of the agent, made to be trained without new data, can share with it: it is only read."""
        return [*super().not_copied, self.model_buffer]

    def sample_generated(self, n: int) -> tuple[Any, th.Tensor]:
        """
        :param n: How many
        :return: Generated observations, as the critics see them, and actions in them
        """
        sample = self.model_buffer.sample(n, env=self.get_vec_normalize_env())
        return sample.observations, sample.actions

    def why_not_compiled(self) -> str | None:
        """
        :return: Why its updates have to run as they are, None if they can be compiled
        """
        return not_covered(self)

    @property
    def instead_of_compiled(self) -> str:
        """How its updates are made where they are not compiled, for the line that says so."""
        return "" if self.value_expansion_horizon > 0 else " (by SB3's SAC.train)"

    def try_updates(self) -> None:
        """Make the compiled updates on copies: they are compiled then."""
        if self.value_expansion_horizon > 0:
            value_expansion.try_expanded_update(self, compiled(value_expansion.expanded_update, self.device.type))
        else:
            try_update(self, self.batch_size, compiled(sac_update, self.device.type))

    def _runs_compiled(self) -> bool:
        # Before there is a model, there is another graph
        return self.expands_values == (self.value_expansion_horizon > 0) and super()._runs_compiled()

    def _train_eagerly(self, gradient_steps: int, batch_size: int) -> None:
        """``SAC.train`` on the mixed buffer; with value expansion, what differs from it in the critics' targets alone."""
        before, not_a_number = networks_state(self), None
        replay_buffer = self.replay_buffer
        try:
            if self.expands_values:
                self._log_updates(value_expansion.train(self, self._expansion_env(), gradient_steps, batch_size))
            else:
                # What SAC samples from
                self.replay_buffer = self.mixed_buffer  # type: ignore[assignment]
                SAC.train(self, gradient_steps, batch_size)
        except ValueError as error:
            # Of torch's distributions, if the actor's output is not a number
            not_a_number = error
        finally:
            self.replay_buffer = replay_buffer
        if not has_finite_networks(self):
            restore_networks(self, before)
            raise DivergenceError from not_a_number
        if not_a_number is not None:
            raise not_a_number

    def _train_compiled(self, gradient_steps: int, batch_size: int) -> None:
        """What ``SAC.train`` does, with all batches sampled at once and the updates compiled."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(optimizers(self))
        if self.expands_values:
            update = compiled(value_expansion.expanded_update, self.device.type)
            results = value_expansion.run_expanded_updates(self, self._expansion_env(), gradient_steps, batch_size, update)
        else:
            samples = self.mixed_buffer.sample_batches(gradient_steps, batch_size, env=self._vec_normalize_env)
            noise = th.randn(2, *samples.actions.shape, device=self.device)
            results = run_updates(self, samples, noise, compiled(sac_update, self.device.type))
        self._log_updates(results)

    def _log_updates(self, results: th.Tensor) -> None:
        """From what :func:`sac_update` returns."""
        self._n_updates += len(results)
        self.log_losses(*results.mean(dim=0).tolist())

    @property
    def expands_values(self) -> bool:
        """Whether critics have targets from model rollouts (``value_expansion_horizon``): not before there is a model."""
        return self.value_expansion_horizon > 0 and self.dynamics.is_fitted

    def _expansion_env(self) -> ModelEnv:
        """One for each ``learn()``, and another one if ``train()`` is called after ``set_env()``."""
        if self._model_env is None or self._model_env.env is not self.env:
            if self.env is None:
                raise ValueError("Value expansion needs to know when episodes end: call `set_env` before `train`")
            self._model_env = ModelEnv(self, self.env)
        return self._model_env

    def prepare_to_learn(self) -> None:
        """What each ``learn()`` begins with."""
        # The environment may have changed
        self._model_env = None

    def dump_logs(self) -> None:
        """
        Write log data.
        """
        self.logger.record("model/model_buffer_size", self.model_buffer.size())
        super().dump_logs()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "model_buffer", "_model_env"]
