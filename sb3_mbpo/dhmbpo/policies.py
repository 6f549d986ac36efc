"""DHMBPO's networks: an actor and bounded critics that standardise what they see."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import nn
from torch.nn import functional as F

from sb3_mbpo.common.arguments import are_sizes, is_whole_number

NO_SDE = "`use_sde` must be False: gradients of DHMBPO pass through noise that is drawn anew at each step"
# Added to the standard deviation of the actor
MIN_STD = 1e-5
# Of the layer norm
LAYER_NORM_EPS = 1e-5
# How far from their mean, in standard deviations, networks see what they are given: all that they compute is then finite, and
# so are the gradients of what is masked
FARTHEST = 1e4


class Standardisation(nn.Module):
    """
    Observations in standard deviations from their mean, both over all real data. Part of the policy, so that it acts by
    itself.

    :param dim: Size of the flat observation
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(dim))
        # 0 where an observation is constant
        self.register_buffer("std", th.ones(dim))

    def forward(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(..., dim)``
        :return: The same in standard deviations, limited to 1e4; 0 where it was constant
        """
        return ((obs - self.mean) / th.where(self.std > 0, self.std, th.inf)).clamp(-FARTHEST, FARTHEST)


class DHMBPOActor(Actor):
    """
    SB3's actor on standardised observations, with orthogonal weights, and standard deviations of softplus(.) + 1e-5. The
    arguments are those of SB3's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.standardise = Standardisation(self.features_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight)
                nn.init.zeros_(module.bias)

    def gaussian(self, obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: Flat, ``(batch, obs_dim)``
        :return: Mean and logarithm of the standard deviation of actions before they are squashed, each ``(batch, action_dim)``
        """
        latent = self.latent_pi(self.standardise(obs))
        std = F.softplus(cast(nn.Linear, self.log_std)(latent)) + MIN_STD
        return self.mu(latent), std.log()

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """
        Get the parameters for the action distribution.

        :param obs: Observations
        :return: Mean, logarithm of the standard deviation, and no optional keyword arguments
        """
        mean, log_std = self.gaussian(self.extract_features(obs, self.features_extractor))
        return mean, log_std, {}


class BoundedCritics(BaseModel):
    """
    Q-networks side by side, whose values lie around the centre of learned bounds: Q = centre + half width * output. The inputs
    of the second layer and those after it pass through a layer norm without weights.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Units of each hidden layer, at least one
    :param features_extractor: Of flat observations
    :param features_dim: Their size
    :param activation_fn: Activation function
    :param normalize_images: There are none
    :param n_critics: Number of networks
    :param dropout: Share of the hidden units that is left out in training
    :param share_features_extractor: It has no weights
    """

    action_space: spaces.Box

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.SiLU,
        normalize_images: bool = True,
        n_critics: int = 5,
        dropout: float = 0.001,
        share_features_extractor: bool = False,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.n_critics, self.dropout, self.activation = n_critics, dropout, activation_fn()
        self.share_features_extractor = share_features_extractor
        self.standardise = Standardisation(features_dim)
        self.register_buffer("bounds", th.zeros(2))
        self.bounds: th.Tensor
        sizes = [features_dim + get_action_dim(action_space), *net_arch, 1]
        shapes = list(pairwise(sizes))
        self.weights = nn.ParameterList([nn.Parameter(th.zeros(n_critics, *shape)) for shape in shapes])
        self.biases = nn.ParameterList([nn.Parameter(th.zeros(n_critics, 1, n_out)) for _, n_out in shapes])
        # The last layer begins at zero
        for weight in self.weights[:-1]:
            for each in weight:
                nn.init.orthogonal_(each)

    def outputs(self, obs: th.Tensor, actions: th.Tensor, dropped: Sequence[th.Tensor] = ()) -> th.Tensor:
        """
        :param obs: Flat, ``(batch, obs_dim)``
        :param actions: In [-1, 1], ``(batch, action_dim)``
        :param dropped: From :meth:`draw_dropped`, to train; none if empty
        :return: Of all networks whose weights these are, in half widths from the centre of the bounds, ``(n_critics, batch)``
        """
        hidden = th.cat([self.standardise(obs), actions], dim=1).expand(len(self.weights[0]), -1, -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer > 0:
                hidden = self.activation(hidden)
                if dropped:
                    kept = hidden.flatten().index_fill(0, dropped[layer - 1], 0.0)
                    hidden = kept.view_as(hidden) / (1 - self.dropout)
                hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=LAYER_NORM_EPS)
            hidden = th.baddbmm(bias, hidden, weight)
        return hidden.squeeze(2)

    def draw_dropped(self, times: int, batch_size: int) -> tuple[th.Tensor, ...]:
        """
        Dropout with random numbers for those units alone that are left out: one for each unit would take a quarter of the time
        of an update.

        :param times: How often
        :param batch_size: Rows of a batch
        :return: For each hidden layer, numbers of units of all networks and rows, ``(times, n_dropped)``, drawn with
            replacement, so many that a share of ``dropout`` is expected among them; empty without dropout
        """
        if self.dropout == 0:
            return ()
        n_units = [self.n_critics * batch_size * weight.shape[2] for weight in self.weights[:-1]]
        device = self.weights[0].device
        return tuple(th.randint(n, (times, round(-n * math.log1p(-self.dropout))), device=device) for n in n_units)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param obs: Observations
        :param actions: In [-1, 1], ``(batch, action_dim)``
        :return: Q-values of each network, ``(batch, 1)``
        """
        assert self.features_extractor is not None
        outputs = self.outputs(self.extract_features(obs, self.features_extractor), actions)
        return tuple(bounded(outputs, self.bounds).unsqueeze(2))


def bounded(outputs: th.Tensor, bounds: th.Tensor) -> th.Tensor:
    """
    :param outputs: Of critics, any shape
    :param bounds: Lowest and highest value, ``(2,)``
    :return: Q-values
    """
    low, high = bounds.unbind()
    return (low + high) / 2 + (high - low) / 2 * outputs


class ActorLayers(nn.Module):
    """
    The actor as a function of flat observations.

    :param actor: Whose layers these are, not copies
    """

    def __init__(self, actor: DHMBPOActor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: ``(batch, obs_dim)``
        :return: See :meth:`DHMBPOActor.gaussian`
        """
        return self.actor.gaussian(obs)


class CriticLayers(nn.Module):
    """
    The critics as a function of flat observations and actions.

    :param critic: Whose layers these are, not copies
    """

    def __init__(self, critic: BoundedCritics) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, obs: th.Tensor, actions: th.Tensor, dropped: Sequence[th.Tensor]) -> th.Tensor:
        """
        :param obs: ``(batch, obs_dim)``
        :param actions: ``(batch, action_dim)``
        :param dropped: Units that are left out
        :return: See :meth:`BoundedCritics.outputs`
        """
        return self.critic.outputs(obs, actions, dropped)


def check_policy_kwargs(
    net_arch: list[int] | dict[str, list[int]] | None, activation_fn: type[nn.Module], n_critics: int, dropout: float
) -> None:
    """
    :param net_arch: Of the policy
    :param activation_fn: Of the policy
    :param n_critics: Of the policy
    :param dropout: Of the policy
    :raises ValueError: if one of them is not in its range
    """
    for sizes in net_arch.values() if isinstance(net_arch, dict) else [] if net_arch is None else [net_arch]:
        if not are_sizes(sizes):
            raise ValueError(
                "`net_arch` must be a list of whole numbers, at least one hidden layer for actor and critics, or "
                f"{{'pi': ..., 'qf': ...}} with such lists, not {net_arch!r}"
            )
    if not (isinstance(activation_fn, type) and issubclass(activation_fn, nn.Module)):
        raise ValueError(f"`activation_fn` must be a class of torch.nn, such as torch.nn.SiLU, not {activation_fn!r}")
    if not is_whole_number(n_critics) or n_critics < 1:
        raise ValueError(f"`n_critics` must be a whole number, 1 or more, not {n_critics!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be a number from 0 to below 1, not {dropout!r}")


class DHMBPOPolicy(SACPolicy):
    """
    Policy of DHMBPO: actor, critics, bounds of their values and statistics of the observations.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param net_arch: Units of each hidden layer, of actor and critics (or of each: ``{"pi": ..., "qf": ...}``)
    :param activation_fn: Activation function
    :param n_critics: Number of critics
    :param dropout: Share of the critics' hidden units that is left out in training
    :param kwargs: Of :class:`stable_baselines3.sac.policies.SACPolicy`
    :raises ValueError: for gSDE, a features extractor with weights, and sizes or a dropout that are not in their range
    """

    actor: DHMBPOActor
    critic: BoundedCritics  # type: ignore[assignment]
    critic_target: BoundedCritics  # type: ignore[assignment]

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.SiLU,
        n_critics: int = 5,
        dropout: float = 0.001,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("use_sde"):
            raise ValueError(NO_SDE)
        if features_extractor_class not in (FlattenExtractor, CombinedExtractor):
            raise ValueError(
                "`features_extractor_class` must be FlattenExtractor or CombinedExtractor, not "
                f"{features_extractor_class.__name__}: states of the model are flat, and pass through none. Use `net_arch`."
            )
        check_policy_kwargs(net_arch, activation_fn, n_critics, dropout)
        self.dropout = dropout
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[256, 256, 256] if net_arch is None else net_arch,
            activation_fn=activation_fn,
            n_critics=n_critics,
            features_extractor_class=features_extractor_class,
            **kwargs,
        )

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> DHMBPOActor:
        """
        :param features_extractor: Of flat observations
        :return: An actor
        """
        kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return DHMBPOActor(**kwargs).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> BoundedCritics:  # type: ignore[override]
        """
        :param features_extractor: Of flat observations
        :return: Critics
        """
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return BoundedCritics(dropout=self.dropout, **kwargs).to(self.device)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        See :meth:`torch.nn.Module.load_state_dict`.

        :raises ValueError: if it is another policy's, SAC's for instance, of which some names would fit
        """
        if "critic.bounds" not in state_dict:
            raise ValueError("These are the weights of another policy: those of a DHMBPO have `critic.bounds`")
        return super().load_state_dict(state_dict, strict, assign)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "dropout": self.dropout}

    @th.no_grad()
    def set_statistics(self, mean: th.Tensor, std: th.Tensor) -> None:
        """
        :param mean: Of each dimension of the flat observation
        :param std: Its standard deviation, 0 where it is constant
        """
        for network in (self.actor, self.critic, self.critic_target):
            network.standardise.mean.copy_(mean)
            network.standardise.std.copy_(std)


class MultiInputPolicy(DHMBPOPolicy):
    """Policy of DHMBPO for ``Dict`` observations. The arguments are those of :class:`DHMBPOPolicy`."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, features_extractor_class=features_extractor_class, **kwargs
        )


MlpPolicy = DHMBPOPolicy
