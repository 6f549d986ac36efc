"""
One gradient update of SAC (Haarnoja et al. 2018) as functions of tensors, on SB3's networks and in SB3's order, so that the
whole of it compiles to one graph. Its numbers are those of ``SAC.train``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, Actor, MultiInputPolicy, SACPolicy
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

from sb3_mbpo.common.adam import Tensors, TrainState, adam_step, coefficients, count_steps, is_plain_adam, live_tensors
from sb3_mbpo.common.errors import DivergenceError
from sb3_mbpo.common.spaces import flat_dim, flatten


class Gaussian(nn.Module):
    """
    The layers of SB3's actor: from flat observations to the Gaussian before it is squashed.

    :param actor: Whose layers these are, not copies
    """

    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self.latent_pi, self.mu = actor.latent_pi, actor.mu
        self.log_std = cast(nn.Module, actor.log_std)

    def forward(self, obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: ``(batch, obs_dim)``
        :return: Mean and logarithm of the standard deviation, each ``(batch, action_dim)``
        """
        latent = self.latent_pi(obs)
        return self.mu(latent), self.log_std(latent).clamp(LOG_STD_MIN, LOG_STD_MAX)


class Networks(NamedTuple):
    """
    Architecture only: the weights are in :class:`State`.

    :param actor: The actor's layers
    :param critic: One of the critics, which are all alike
    """

    actor: nn.Module
    critic: nn.Module


class State(NamedTuple):
    """
    What an update changes. The critics are stacked, ``(n_critics, ...)``, so that one product per layer serves all.

    :param actor: The actor
    :param critic: The critics
    :param target: The target critics' parameters
    :param ent_coef: ``log_ent_coef``, ``(1,)``; or, if the entropy coefficient is fixed, ``ent_coef`` itself, without moments
    """

    actor: TrainState
    critic: TrainState
    target: Tensors
    ent_coef: TrainState


class Batch(NamedTuple):
    """
    What an update learns from.

    :param obs: Observations, ``(batch, obs_dim)``
    :param actions: Actions in [-1, 1], ``(batch, action_dim)``
    :param next_obs: Successors, ``(batch, obs_dim)``
    :param rewards: Rewards, ``(batch, 1)``
    :param discounts: Of the successor's value, ``(batch, 1)``: 0 if it is terminal
    :param noise: Standard normal, ``(batch, action_dim)``: for the actor in ``obs``
    :param next_noise: Standard normal, ``(batch, action_dim)``: for the actor in ``next_obs``
    """

    obs: th.Tensor
    actions: th.Tensor
    next_obs: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor
    noise: th.Tensor
    next_noise: th.Tensor


class Settings(NamedTuple):
    """
    The numbers of an update. They are tensors so that none of them is compiled in.

    :param actor: Adam's coefficients, ``(7,)``
    :param critic: Adam's coefficients, ``(7,)``
    :param ent_coef: Adam's coefficients, ``(7,)``
    :param target_entropy: Scalar
    :param tau: Scalar: share of the new weights in the target critics, 0 if it is not their turn
    """

    actor: th.Tensor
    critic: th.Tensor
    ent_coef: th.Tensor
    target_entropy: th.Tensor
    tau: th.Tensor


def sample_actions(actor: nn.Module, parameters: Tensors, obs: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :param actor: Architecture
    :param parameters: Weights
    :param obs: ``(batch, obs_dim)``
    :param noise: Standard normal, ``(batch, action_dim)``
    :return: Actions, squashed by tanh, ``(batch, action_dim)``, and the logarithm of their density, ``(batch, 1)``
    """
    mean, log_std = functional_call(actor, parameters, (obs,))
    actions = th.tanh(mean + log_std.exp() * noise)
    # The small number is that of SB3's SquashedDiagGaussianDistribution
    log_density = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2 - th.log(1 - actions.square() + 1e-6)
    return actions, log_density.sum(dim=1, keepdim=True)


def q_values(critic: nn.Module, parameters: Tensors, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """
    :param critic: Architecture
    :param parameters: Weights of all critics, stacked
    :param obs: ``(batch, obs_dim)``
    :param actions: ``(batch, action_dim)``
    :return: ``(n_critics, batch, 1)``
    """
    inputs = th.cat([obs, actions], dim=1)
    return vmap(lambda one: functional_call(critic, one, (inputs,)))(parameters)


def update_critic(networks: Networks, state: State, batch: Batch, ent_coef: th.Tensor, settings: Settings) -> th.Tensor:
    """
    One step of all critics, in place, on the squared soft Bellman error, halved.

    :param networks: Architecture
    :param state: Its critics are changed
    :param batch: Transitions and noise
    :param ent_coef: Entropy coefficient, ``(1,)``
    :param settings: Adam's coefficients
    :return: Loss, a scalar
    """
    next_actions, next_log_prob = sample_actions(networks.actor, state.actor.parameters, batch.next_obs, batch.next_noise)
    next_values = q_values(networks.critic, state.target, batch.next_obs, next_actions).amin(dim=0)
    targets = batch.rewards + batch.discounts * (next_values - ent_coef * next_log_prob)

    def loss(parameters: Tensors) -> th.Tensor:
        errors = q_values(networks.critic, parameters, batch.obs, batch.actions) - targets
        return errors.square().mean(dim=(1, 2)).sum() / 2

    gradients, value = grad_and_value(loss)(state.critic.parameters)
    adam_step(state.critic, gradients, settings.critic)
    return value


def update_actor(
    networks: Networks, state: State, batch: Batch, ent_coef: th.Tensor, settings: Settings
) -> tuple[th.Tensor, th.Tensor]:
    """
    One step of the actor, in place, on the value of its actions, by the lowest critic, and their entropy.

    :param networks: Architecture
    :param state: Its actor is changed
    :param batch: Observations and noise
    :param ent_coef: Entropy coefficient, ``(1,)``
    :param settings: Adam's coefficients
    :return: Loss, a scalar, and the logarithm of the density of the actions, ``(batch, 1)``
    """

    def loss(parameters: Tensors) -> tuple[th.Tensor, th.Tensor]:
        actions, log_prob = sample_actions(networks.actor, parameters, batch.obs, batch.noise)
        values = q_values(networks.critic, state.critic.parameters, batch.obs, actions).amin(dim=0)
        return (ent_coef * log_prob - values).mean(), log_prob

    gradients, (value, log_prob) = grad_and_value(loss, has_aux=True)(state.actor.parameters)
    adam_step(state.actor, gradients, settings.actor)
    return value, log_prob


def update_ent_coef(
    ent_coef: TrainState, log_prob: th.Tensor, coefficients: th.Tensor, target_entropy: th.Tensor
) -> th.Tensor:
    """
    One step of the entropy coefficient's logarithm, in place, towards the target entropy.

    :param ent_coef: ``log_ent_coef``, which is changed; without moments if the coefficient is fixed
    :param log_prob: Logarithm of the density of the actor's actions, any shape
    :param coefficients: Adam's, ``(7,)``
    :param target_entropy: Scalar
    :return: Loss, a scalar; 0 if the coefficient is fixed
    """
    if not ent_coef.first:
        return th.zeros_like(target_entropy)

    def loss(parameters: Tensors) -> th.Tensor:
        return -(parameters["log_ent_coef"] * (log_prob + target_entropy)).mean()

    gradients, value = grad_and_value(loss)(ent_coef.parameters)
    adam_step(ent_coef, gradients, coefficients)
    return value


def update_target(targets: Tensors, critics: Tensors, tau: th.Tensor) -> None:
    """
    Move the target critics towards the critics ("Polyak update"), in place.

    :param targets: Parameters of the target critics, which are changed
    :param critics: Parameters of the critics
    :param tau: Share of the critics, a scalar from 0 to 1
    """
    for target, critic in zip(targets.values(), critics.values(), strict=True):
        target.mul_(1 - tau).add_(tau * critic)


def entropy_coefficient(ent_coef: TrainState) -> th.Tensor:
    """
    :param ent_coef: Its logarithm, if it is learned; else itself, without moments
    :return: Entropy coefficient, ``(1,)``
    """
    return ent_coef.parameters["log_ent_coef"].exp() if ent_coef.first else ent_coef.parameters["ent_coef"]


CriticUpdate = Callable[[Networks, State, Batch, th.Tensor, Settings], th.Tensor]


def sac_update(
    networks: Networks, state: State, batch: Batch, settings: Settings, update_critic: CriticUpdate = update_critic
) -> th.Tensor:
    """
    One update, in place. As in SB3, the critics' targets come from the actor from before, the actor's loss from the new
    critics, and all of it uses the entropy coefficient from before.

    :param networks: Architecture
    :param state: Changed
    :param batch: Transitions and noise
    :param settings: Adam's coefficients, target entropy, tau
    :param update_critic: What critics learn
    :return: Loss of the critics, of the actor, of the entropy coefficient, and the latter from before: ``(4,)``
    """
    ent_coef = entropy_coefficient(state.ent_coef)
    critic_loss = update_critic(networks, state, batch, ent_coef, settings)
    actor_loss, log_prob = update_actor(networks, state, batch, ent_coef, settings)
    ent_coef_loss = update_ent_coef(state.ent_coef, log_prob, settings.ent_coef, settings.target_entropy)
    update_target(state.target, state.critic.parameters, settings.tau)
    return th.stack([critic_loss, actor_loss, ent_coef_loss, ent_coef.squeeze()])


# --- On an agent of SB3 ----------------------------------------------------------------------------------------------


def optimizers(agent: SAC) -> list[th.optim.Optimizer]:
    """
    :param agent: SAC or a subclass
    :return: The actor's, the critics' and, if the entropy coefficient is learned, its optimizer
    """
    own = (agent.actor.optimizer, agent.critic.optimizer, agent.ent_coef_optimizer)
    return [optimizer for optimizer in own if optimizer is not None]


def not_covered(agent: SAC) -> str | None:
    """
    :param agent: SAC or a subclass
    :return: What it has that :func:`sac_update` does not know, None if there is nothing
    """
    if type(agent.policy) not in (SACPolicy, MultiInputPolicy):
        return f"the policy is a {type(agent.policy).__name__}"
    if agent.use_sde:
        return "gSDE is in use"
    for network in (agent.actor, agent.critic, agent.critic_target):
        extractor = network.features_extractor
        layers = extractor.extractors.values() if type(extractor) is CombinedExtractor else [extractor]
        # Which do nothing to flat observations
        if any(type(layer) not in (FlattenExtractor, nn.Flatten) for layer in layers):
            return f"the features extractor is a {type(extractor).__name__}"
        if list(network.buffers()):
            return "a network keeps statistics"
        for module in network.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd | nn.RReLU):
                return f"{type(module).__name__} acts at random"
    optimized: list[list[Any]] = [list(agent.actor.parameters()), list(agent.critic.parameters()), [agent.log_ent_coef]]
    for optimizer, parameters in zip(optimizers(agent), optimized, strict=False):
        if not is_plain_adam(optimizer, parameters):
            return f"the optimizer is not a plain Adam of one parameter group: {optimizer}"
        if any(not parameter.requires_grad or parameter._backward_hooks for parameter in optimizer.param_groups[0]["params"]):
            return "a parameter is frozen or has a hook"
        if len({float(state["step"]) for state in optimizer.state.values() if state}) > 1:
            return "Adam has made more steps with some parameters than with others"
    return None


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _copy(names: Sequence[str], tensors: Sequence[th.Tensor]) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in zip(names, tensors, strict=True)}


def _stack(names: Sequence[str], tensors: Sequence[th.Tensor]) -> Tensors:
    """Of the tensors of one network after the other, one tensor for all networks under each name."""
    return {name: th.stack([*tensors[i :: len(names)]]).detach() for i, name in enumerate(names)}


def read_state(agent: SAC) -> State:
    """
    :param agent: One for which :func:`not_covered` has nothing to say
    :return: Copies: an update that is interrupted leaves the agent as it was
    """
    actor_names, critic_names = _names(Gaussian(agent.actor)), _names(agent.critic.q_networks[0])
    if agent.ent_coef_optimizer is not None:
        ent_coef = TrainState(*(_copy(["log_ent_coef"], tensors) for tensors in live_tensors(agent.ent_coef_optimizer)))
    else:
        ent_coef = TrainState({"ent_coef": agent.ent_coef_tensor.reshape(1)}, {}, {})
    return State(
        actor=TrainState(*(_copy(actor_names, tensors) for tensors in live_tensors(agent.actor.optimizer))),
        critic=TrainState(*(_stack(critic_names, tensors) for tensors in live_tensors(agent.critic.optimizer))),
        target=_stack(critic_names, list(agent.critic_target.parameters())),
        ent_coef=ent_coef,
    )


@th.no_grad()
def write_state(agent: SAC, state: State) -> None:
    """
    :param agent: Changed
    :param state: What :func:`read_state` gave for it, updated
    """

    def write(own: Sequence[th.Tensor], new: Sequence[th.Tensor]) -> None:
        for tensor, value in zip(own, new, strict=True):
            tensor.copy_(value)

    def unstack(tensors: Tensors) -> list[th.Tensor]:
        return [tensor[i] for i in range(agent.critic.n_critics) for tensor in tensors.values()]

    for own, new in zip(live_tensors(agent.actor.optimizer), state.actor, strict=True):
        write(own, list(new.values()))
    for own, new in zip(live_tensors(agent.critic.optimizer), state.critic, strict=True):
        write(own, unstack(new))
    write(list(agent.critic_target.parameters()), unstack(state.target))
    if agent.ent_coef_optimizer is not None:
        for own, new in zip(live_tensors(agent.ent_coef_optimizer), state.ent_coef, strict=True):
            write(own, list(new.values()))


def _are_finite(tensors: Iterable[th.Tensor]) -> bool:
    # One number that is not finite makes the sum so
    return bool(th.isfinite(th.stack([tensor.sum() for tensor in tensors])).all())


@th.no_grad()
def has_finite_networks(agent: SAC) -> bool:
    """
    :param agent: SAC or a subclass
    :return: Whether all its weights, and its entropy coefficient, are finite
    """
    ent_coef = [] if agent.log_ent_coef is None else [agent.log_ent_coef]
    return _are_finite([*agent.policy.parameters(), *ent_coef])


NetworksState = tuple[dict[str, Any], list[dict[str, Any]], th.Tensor | None]


def networks_state(agent: SAC) -> NetworksState:
    """
    :param agent: SAC or a subclass
    :return: Copies of all that ``SAC.train`` changes in it
    """
    weights = {name: tensor.clone() for name, tensor in agent.policy.state_dict().items()}
    ent_coef = None if agent.log_ent_coef is None else agent.log_ent_coef.detach().clone()
    return weights, [deepcopy(optimizer.state_dict()) for optimizer in optimizers(agent)], ent_coef


@th.no_grad()
def restore_networks(agent: SAC, state: NetworksState) -> None:
    """
    :param agent: Changed
    :param state: What :func:`networks_state` gave for it
    """
    weights, of_optimizers, ent_coef = state
    agent.policy.load_state_dict(weights)
    for optimizer, saved in zip(optimizers(agent), of_optimizers, strict=True):
        optimizer.load_state_dict(saved)
    if agent.log_ent_coef is not None and ent_coef is not None:
        agent.log_ent_coef.copy_(ent_coef)


Update = Callable[[Networks, State, Batch, Settings], th.Tensor]


def prepare_updates(
    agent: SAC, samples: ReplayBufferSamples, noise: th.Tensor
) -> tuple[Networks, State, list[tuple[Batch, Settings]]]:
    """
    :param agent: One for which :func:`not_covered` has nothing to say
    :param samples: All batches, ``(n_updates, batch, ...)`` each
    :param noise: Standard normal, ``(2, n_updates, batch, action_dim)``: for observations and for their successors
    :return: The arguments of :func:`sac_update`, the last two for each of the updates
    """
    n_updates = len(samples.rewards)
    # As SB3's preprocessing
    obs, next_obs = (flatten(each, batch_dims=2).float() for each in (samples.observations, samples.next_observations))
    discounts = (1 - samples.dones) * (agent.gamma if samples.discounts is None else samples.discounts)
    batches = Batch(obs, samples.actions, next_obs, samples.rewards, discounts, *noise)
    # A fixed entropy coefficient needs no numbers: any will do
    ent_coef_optimizer = agent.ent_coef_optimizer or agent.actor.optimizer
    is_target_step = th.arange(n_updates, device=agent.device) % agent.target_update_interval == 0
    settings = Settings(
        actor=coefficients(agent.actor.optimizer, n_updates),
        critic=coefficients(agent.critic.optimizer, n_updates),
        ent_coef=coefficients(ent_coef_optimizer, n_updates),
        target_entropy=th.full((n_updates,), float(agent.target_entropy), device=agent.device),
        tau=agent.tau * is_target_step,
    )
    arguments = [
        (Batch(*batch), Settings(*numbers))
        for batch, numbers in zip(zip(*batches, strict=True), zip(*settings, strict=True), strict=True)
    ]
    return Networks(Gaussian(agent.actor), agent.critic.q_networks[0]), read_state(agent), arguments


@th.no_grad()
def run_updates(agent: SAC, samples: ReplayBufferSamples, noise: th.Tensor, update: Update = sac_update) -> th.Tensor:
    """
    Update an agent as ``SAC.train`` would with the same batches and noise. Nothing waits for a number on the way.

    :param agent: One for which :func:`not_covered` has nothing to say
    :param samples: All batches, ``(n_updates, batch, ...)`` each
    :param noise: Standard normal, ``(2, n_updates, batch, action_dim)``: for observations and for their successors
    :param update: :func:`sac_update` or what it was compiled to
    :return: What ``update`` returned each time, ``(n_updates, 4)``
    :raises DivergenceError: if a weight is not finite then; the agent is as it was
    """
    networks, state, arguments = prepare_updates(agent, samples, noise)
    results = [update(networks, state, batch, settings) for batch, settings in arguments]
    tensors = [*state.actor.parameters.values(), *state.critic.parameters.values(), *state.ent_coef.parameters.values()]
    if not _are_finite(tensors):
        raise DivergenceError
    write_state(agent, state)
    for optimizer in optimizers(agent):
        count_steps(optimizer, len(results))
    return th.stack(results)


@th.no_grad()
def try_update(agent: SAC, batch_size: int, update: Update) -> None:
    """
    Make an update on a copy, on a batch of zeros: it is compiled then.

    :param agent: One for which :func:`not_covered` has nothing to say; not changed
    :param batch_size: Transitions in a batch
    :param update: What :func:`sac_update` is compiled to
    """

    def zeros(dim: int) -> th.Tensor:
        return th.zeros(1, batch_size, dim, device=agent.device)

    obs, action = zeros(flat_dim(agent.observation_space)), zeros(flat_dim(agent.action_space))
    samples = ReplayBufferSamples(obs, action, obs, zeros(1), zeros(1))
    networks, state, arguments = prepare_updates(agent, samples, th.stack([action, action]))
    update(networks, state, *arguments[0])
