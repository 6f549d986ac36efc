"""What the algorithms share, beside their networks and updates: the model, the training loop, saving and loading."""

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from io import BufferedIOBase
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import gymnasium as gym
import torch as th
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn, TensorDict, TrainFreq
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.patch_gym import _patch_env
from stable_baselines3.sac.policies import SACPolicy

from sb3_mbpo import __version__
from sb3_mbpo.common.arguments import check_arguments, check_sizes
from sb3_mbpo.common.buffers import check_finite, max_transitions, n_transitions
from sb3_mbpo.common.callbacks import DynamicsCallback, progress_bars
from sb3_mbpo.common.checkpoints import atomic_file, check_python, explained, saved_attributes
from sb3_mbpo.common.compilation import compile_all, planned_steps, planned_updates, report_compilation
from sb3_mbpo.common.errors import DivergenceError
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.common.spaces import check_goals, check_spaces, flat_dim
from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.dynamics.open_loop import OpenLoopError
from sb3_mbpo.dynamics.termination import TerminationClassifier
from sb3_mbpo.dynamics.user_functions import TensorFn, TransitionFn

SelfModelBasedSAC = TypeVar("SelfModelBasedSAC", bound="ModelBasedSAC")


class GeneratedBuffer(Protocol):
    """What the model has generated."""

    def size(self) -> int:
        """
        :return: How many rows there are
        """
        ...


class ModelBasedSAC(SAC):
    """
    SAC with a learned model of the environment. An algorithm adds what it does with the model.

    The arguments, but for those of :class:`stable_baselines3.SAC` (``kwargs``), are explained in
    :class:`~sb3_mbpo.MBPO`.
    """

    # As the package exports it
    name: ClassVar[str]
    # With fewer updates than these, a cold compilation takes longer than it saves
    min_updates_to_compile: ClassVar[int]
    # Whether gradients pass through the model, and so through `reward_fn`
    needs_gradients: ClassVar[bool] = False
    # Whether critics learn the rewards that `VecNormalize` makes, or those of the environment
    learns_normalised_rewards: ClassVar[bool] = True
    # What was generated, for gradient updates to sample from
    model_buffer: GeneratedBuffer

    def __init__(
        self,
        policy: str | type[SACPolicy],
        env: GymEnv | str,
        *,
        ensemble_size: int,
        num_elites: int,
        model_hidden_sizes: Sequence[int],
        model_learning_rate: float,
        model_train_freq: int,
        termination_fn: TransitionFn | None,
        reward_fn: TransitionFn | TensorFn | None,
        model_gradient_steps: float | None,
        compile: bool | str,
        verbose: int = 0,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        if env is not None:
            env = maybe_make_env(env, verbose)
            if not isinstance(env, gym.Env | VecEnv):
                try:
                    # As SB3 does: one of OpenAI's Gym, if that is installed
                    env = _patch_env(env)
                except ValueError:
                    raise ValueError(f"`env` must be a Gymnasium environment, its id, or a VecEnv, not {env!r}") from None
            check_spaces(env.observation_space, env.action_space)
        super().__init__(policy, env, verbose=verbose, _init_setup_model=False, **kwargs)
        self.ensemble_size = ensemble_size
        self.num_elites = num_elites
        self.model_hidden_sizes = model_hidden_sizes
        self.model_learning_rate = model_learning_rate
        self.model_train_freq = model_train_freq
        self.termination_fn = termination_fn
        self.reward_fn = reward_fn
        self.model_gradient_steps = model_gradient_steps
        self.compile = compile

        # For whoever loads it and does not know
        self.algorithm = self.name
        # Steps and episodes of earlier calls of `learn()` whose counts were reset
        self._steps_before_reset, self._episodes_before_reset = 0, 0
        # Whether it was trained in one, for whoever loads it
        self.uses_vec_normalize = False
        # That saved it, if it was loaded
        self.sb3_mbpo_version = __version__
        self.last_model_training = 0
        # Of the model before it was last trained, on transitions that it had not been trained on
        self.open_loop_error: OpenLoopError | None = None
        # Since the start of `learn()`
        self.seconds = dict.fromkeys(("env", "model", "rollouts", "updates", "compile"), 0.0)
        # Of the users, in this `learn()`
        self.progress_bars: list[ProgressBarCallback] = []
        # Which of them run as compiled graphs in this `learn()`
        self.is_compiled = dict.fromkeys(("updates", "model"), False)

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self.check_arguments()
        if isinstance(self.replay_buffer_class, type) and issubclass(self.replay_buffer_class, HerReplayBuffer):
            check_goals(self.observation_space)
        super()._setup_model()
        obs_dim, action_dim = flat_dim(self.observation_space), flat_dim(self.action_space)
        self.dynamics = Ensemble(
            obs_dim, action_dim, self.model_hidden_sizes, self.ensemble_size, self.num_elites, self.model_learning_rate
        ).to(self.device)
        self.termination_classifier = TerminationClassifier(obs_dim).to(self.device)

    # --- What each algorithm has of its own ---

    @property
    def uses_model(self) -> bool:
        """Whether updates depend on the model, so that it is trained."""
        return True

    @property
    def uses_generated_data(self) -> bool:
        """Whether updates learn from what the model generates."""
        return True

    def check_arguments(self) -> None:
        """
        :raises ValueError: if an argument of the algorithm's own is not in its range
        """
        check_arguments(self)

    def prepare_to_learn(self) -> None:
        """What each ``learn()`` begins with: arguments and the environment may have been changed."""

    @abstractmethod
    def make_callback(self) -> DynamicsCallback:
        """
        :return: What trains the model, in each ``learn()``
        """

    @property
    @abstractmethod
    def rollout_length(self) -> int:
        """Steps of model rollouts at present."""

    @property
    @abstractmethod
    def about_rollouts(self) -> str:
        """What a report says of them."""

    @property
    @abstractmethod
    def advice_on_long_rollouts(self) -> str:
        """What a report says if they go further than the model is right for."""

    @abstractmethod
    def fill_model_buffer(self, model_env: ModelEnv, obs: th.Tensor) -> int:
        """
        Add model rollouts to what gradient updates sample from.

        :param model_env: The agent's model
        :param obs: In which they start, any of them with the same probability, ``(n, obs_dim)``
        :return: How many transitions there were
        """

    @abstractmethod
    def sample_generated(self, n: int) -> tuple[Any, th.Tensor]:
        """
        :param n: How many
        :return: Generated observations, as the critics see them, and actions in them
        """

    def promised_values(self, obs: th.Tensor) -> th.Tensor | None:
        """
        :param obs: Raw and flat, ``(n, obs_dim)``
        :return: What the actor's objective says of each of these states, ``(n,)``; None if it is the critics' value alone
        """
        return None

    def why_not_compiled(self) -> str | None:
        """
        :return: Why its updates have to run as they are, None if they can be compiled, as far as that is known without trying
        """
        return None

    @property
    def advice_on_divergence(self) -> str:
        """What to do when gradient updates diverge."""
        return "Lower `learning_rate`, or scale the rewards (`VecNormalize`)."

    @property
    def instead_of_compiled(self) -> str:
        """How its updates are made where they are not compiled, for the line that says so."""
        return ""

    @abstractmethod
    def try_updates(self) -> None:
        """Make the compiled updates without changing the agent: they are compiled then."""

    def _runs_compiled(self) -> bool:
        """Asked anew before each training, as users may have changed the agent."""
        return self.is_compiled["updates"] and bool(self.compile) and self.why_not_compiled() is None

    @abstractmethod
    def _train_compiled(self, gradient_steps: int, batch_size: int) -> None:
        """As :meth:`train`, with compiled updates."""

    @abstractmethod
    def _train_eagerly(self, gradient_steps: int, batch_size: int) -> None:
        """As :meth:`train`, with updates as they are."""

    # --- What they share ---

    @property
    def lifetime_timesteps(self) -> int:
        """Environment steps in the agent's life: ``num_timesteps`` without the resets of ``learn()``."""
        return self._steps_before_reset + self.num_timesteps

    @property
    def is_warmed_up(self) -> bool:
        """
        Whether there is enough to learn from: the random warm-up is over, and the replay buffer can fill a batch
        (it may be empty again after loading). Hindsight experience replay needs an episode that is over, too.
        """
        assert self.replay_buffer is not None
        if isinstance(self.replay_buffer, HerReplayBuffer) and not (self.replay_buffer.ep_length > 0).any():
            return False
        needed = min(self.learning_starts, self.batch_size, max_transitions(self.replay_buffer))
        return self._is_over(self.lifetime_timesteps) and n_transitions(self.replay_buffer) >= needed

    def _is_over(self, lifetime_timesteps: int) -> bool:
        """Whether that is after the random warm-up."""
        # As in SB3
        return lifetime_timesteps > self.learning_starts

    @property
    def can_update(self) -> bool:
        """Whether there is what gradient updates need."""
        return self.is_warmed_up

    def updates_after(self, rollout: RolloutReturn) -> int:
        """
        :param rollout: The steps in the environment
        :return: How many updates follow them
        """
        return self.gradient_steps if self.gradient_steps >= 0 else rollout.episode_timesteps

    def planned_updates(self, steps: int) -> float:
        """
        :param steps: Environment steps that are to come
        :return: How many gradient updates there will be; where it depends on the length of episodes, one for each step
        """
        return planned_updates(self, steps)

    @property
    def not_copied(self) -> list[object]:
        """What copies of the agent, made to be trained without new data, can share with it: it is only read."""
        return [self.replay_buffer, self.env, self._vec_normalize_env, self.dynamics, self.progress_bars]

    def combine(self, values: th.Tensor) -> th.Tensor:
        """
        :param values: Of all critics for the same actions, ``(n, n_critics)``
        :return: What the algorithm makes of them, ``(n,)``: the lowest
        """
        return values.amin(dim=1)

    def learn(
        self: SelfModelBasedSAC,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfModelBasedSAC:
        """
        Return a trained model.

        :param total_timesteps: The total number of environment steps to train on
        :param callback: callback(s) called at every step with state of the algorithm.
        :param log_interval: Number of episodes before logging
        :param tb_log_name: the name of the run for TensorBoard logging
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging). Neither
            the warm-up nor the rollout schedule starts again.
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        :raises ValueError: if the environment returns observations or rewards that are not finite
        """
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        assert self.env is not None and isinstance(self.train_freq, TrainFreq)

        # SB3's loop, but for the condition to learn: SB3's compares a step count that may have been reset
        while self.num_timesteps < total_timesteps:
            start, model_seconds = time.perf_counter(), self.seconds["model"] + self.seconds["rollouts"]
            # At its end, the DynamicsCallback retrains the model and generates rollouts
            rollout = self.collect_rollouts(
                self.env,
                callback=callback,
                train_freq=self.train_freq,
                replay_buffer=self.replay_buffer,
                action_noise=self.action_noise,
                learning_starts=self.learning_starts - self._steps_before_reset,
                log_interval=log_interval,
            )
            model_seconds = self.seconds["model"] + self.seconds["rollouts"] - model_seconds
            self.seconds["env"] += time.perf_counter() - start - model_seconds
            if not rollout.continue_training:
                break
            if self.can_update:
                self.train(gradient_steps=self.updates_after(rollout), batch_size=self.batch_size)

        callback.on_training_end()
        # They are closed
        self.progress_bars = []
        return self

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Do gradient updates.

        :param gradient_steps: Number of updates, may be 0
        :param batch_size: Transitions in each batch
        :raises DivergenceError: (a ``ValueError``) if a weight is not finite afterwards; the agent then has the weights that
            it had before
        """
        if gradient_steps == 0:
            return
        start, rollout_seconds = time.perf_counter(), self.seconds["rollouts"]
        is_compiled = self._runs_compiled()
        try:
            (self._train_compiled if is_compiled else self._train_eagerly)(gradient_steps, batch_size)
        except DivergenceError as error:
            self.log_divergence("train")
            raise DivergenceError(
                f"Gradient updates diverged at step {self.num_timesteps:,}: a weight of the policy is not finite. The weights "
                f"are those from before. {self.advice_on_divergence}"
            ) from error
        self.logger.record("train/compiled", int(is_compiled))
        # An algorithm may make rollouts in between
        self.seconds["updates"] += time.perf_counter() - start - (self.seconds["rollouts"] - rollout_seconds)

    def log_losses(self, critic_loss: float, actor_loss: float, ent_coef_loss: float, ent_coef: float) -> None:
        """
        What ``SAC.train`` logs, means over updates.

        :param critic_loss: Of the critics
        :param actor_loss: Of the actor
        :param ent_coef_loss: Of the entropy coefficient, which is logged if it is learned
        :param ent_coef: Entropy coefficient
        """
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/ent_coef", ent_coef)
        self.logger.record("train/actor_loss", actor_loss)
        self.logger.record("train/critic_loss", critic_loss)
        if self.ent_coef_optimizer is not None:
            self.logger.record("train/ent_coef_loss", ent_coef_loss)

    def log_divergence(self, what: str) -> None:
        """
        :param what: "model" or "train"
        """
        self.logger.record(f"{what}/diverged", 1)
        self.dump_logs()

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        # Attributes may have been changed, and a replay buffer may have been loaded, since they were checked
        self.check_arguments()
        check_sizes(self)
        assert self.replay_buffer is not None
        check_finite(self.replay_buffer)
        self.prepare_to_learn()
        steps, episodes = self.num_timesteps, self._episode_num
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if reset_num_timesteps:
            self._steps_before_reset += steps
            self._episodes_before_reset += episodes
        self.uses_vec_normalize = self.get_vec_normalize_env() is not None and self.learns_normalised_rewards
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        n_steps = planned_steps(self, result[0])
        if self.verbose >= 1 and not self._is_over(self.lifetime_timesteps + n_steps):
            print(
                f"All of these steps are random: learning starts after {self.learning_starts:,} of the agent's life "
                f"(`learning_starts`), and it will have made {self.lifetime_timesteps + n_steps:,}"
            )
        start = time.perf_counter()
        reasons = compile_all(self, self.planned_updates(n_steps))
        self.is_compiled = {what: reasons.get(what, "") is None for what in self.is_compiled}
        self.seconds["compile"] = time.perf_counter() - start
        report_compilation(self, reasons)
        return result

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if isinstance(callback, list):
            callbacks = callback
        else:
            callbacks = [callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)]
        # A new list: the user may use theirs again
        callback = super()._init_callback([self.make_callback(), *callbacks], progress_bar)
        self.progress_bars = progress_bars(callback)
        return callback

    @contextmanager
    def described(self, description: str) -> Iterator[None]:
        """
        Tell whoever watches a progress bar why it stands still.

        :param description: What is done inside
        """
        for bar in self.progress_bars:
            bar.pbar.set_description(description)
        try:
            yield
        finally:
            for bar in self.progress_bars:
                bar.pbar.set_description("")

    def dump_logs(self) -> None:
        """
        Write log data.
        """
        self.logger.record("model/compiled", int(self.is_compiled["model"]))
        for name, seconds in self.seconds.items():
            self.logger.record(f"time/{name}_seconds", seconds)
        assert self.replay_buffer is not None
        self.logger.record("model/real_buffer_size", n_transitions(self.replay_buffer))
        super().dump_logs()

    def save(
        self,
        path: str | Path | BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file, which appears under its name when it is
        complete: what stops the process before leaves an older one as it was.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        :raises ValueError: if an attribute was changed to which the networks of the model were made: it could not be loaded
        """
        check_sizes(self)
        self.sb3_mbpo_version = __version__
        with atomic_file(path, "zip") if isinstance(path, str | Path) else nullcontext(path) as file:
            super().save(file, exclude, include)  # type: ignore[arg-type]

    @classmethod
    def load(
        cls: type[SelfModelBasedSAC],
        path: str | Path | BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfModelBasedSAC:
        """
        Load the model from a zip-file.
        Warning: ``load`` re-creates the model from scratch, it does not update it in-place!
        For an in-place load use ``set_parameters`` instead.

        :param path: path to the file (or a file-like) where to load the agent from
        :param env: the new environment to run the loaded model on
            (can be None if you only need prediction from a trained model) has priority over any saved environment
        :param device: Device on which the code should run.
        :param custom_objects: Dictionary of objects to replace upon loading; what is saved under their names is not unpickled.
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force call to ``reset()`` before training
        :param kwargs: extra arguments to change the model when loading
        :return: new model instance with loaded parameters
        :raises ValueError: if the file is truncated or altered, was saved by another algorithm, holds functions as another
            version of Python has them, or does not fit this version of the package or the arguments that were changed
        """
        saved = saved_attributes(path)
        # Before there was more than one, nobody wrote it down
        if (algorithm := saved.get("algorithm", "MBPO")) != cls.name:
            raise ValueError(f"The agent in {path} was saved by {algorithm}, not by {cls.name}: `{algorithm}.load` loads it")
        check_python(path, saved, custom_objects or {})
        with explained(str(path), saved, kwargs):
            agent = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        for name in ("termination_fn", "reward_fn"):
            # SB3 only warns of what it cannot unpickle
            if (
                getattr(agent, name) is None
                and saved.get(name) is not None
                and name not in {**kwargs, **(custom_objects or {})}
            ):
                raise ValueError(
                    f"The `{name}` in {path} cannot be unpickled (see the warning; was it saved by another version of "
                    f"Python?). Pass `custom_objects={{'{name}': ...}}` with the function, or None to do without it."
                )
        return agent

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary containing parameters for different modules (see
        ``get_parameters``). If something in it does not fit, the agent stays as it was.

        :param load_path_or_dict: Location of the saved data (path or file-like, see ``save``), or a nested dictionary
            containing nn.Module parameters used by the policy
        :param exact_match: If True, the given parameters should include parameters for each module and each of their
            parameters, otherwise raises an Exception. If set to False, this can be used to update only specific parameters.
        :param device: Device on which the code should run.
        """
        before: Any = deepcopy(self.get_parameters())
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except Exception:
            super().set_parameters(before, device=device)
            raise

    def save_replay_buffer(self, path: str | Path | BufferedIOBase) -> None:
        """
        Save the replay buffer (real transitions) as a pickle file, which appears under its name when it is complete.

        :param path: Path to the file where the replay buffer should be saved.
        """
        with atomic_file(path, "pkl") if isinstance(path, str | Path) else nullcontext(path) as file:
            super().save_replay_buffer(file)  # type: ignore[arg-type]

    def load_replay_buffer(self, path: str | Path | BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file.

        :param path: Path to the pickled replay buffer.
        :param truncate_last_traj: With ``HerReplayBuffer``: whether the last trajectory in the buffer is taken for finished.
        :raises ValueError: if the file is truncated or altered, or the buffer is of another environment
        """
        # Users delete it to save memory
        before = getattr(self, "replay_buffer", None)
        try:
            super().load_replay_buffer(path, truncate_last_traj)
        except (FileNotFoundError, AssertionError):
            self.replay_buffer = before
            raise
        # Which of many it is depends on where a byte is missing or wrong
        except Exception as error:
            self.replay_buffer = before
            raise ValueError(f"The replay buffer {path} cannot be loaded (truncated or altered?): {error!r}") from error
        buffer = self.replay_buffer
        assert buffer is not None
        for name, is_, ours in (
            ("observation space", buffer.observation_space, self.observation_space),
            ("action space", buffer.action_space, self.action_space),
            ("number of parallel environments", buffer.n_envs, self.n_envs),
        ):
            if is_ != ours:
                self.replay_buffer = before
                raise ValueError(f"The replay buffer {path} has the {name} {is_}, but the agent's is {ours}")

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "open_loop_error", "seconds", "is_compiled", "progress_bars"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        modules = ["dynamics", "termination_classifier"]
        return [*state_dicts, *modules, *(f"{name}.optimizer" for name in modules)], variables
