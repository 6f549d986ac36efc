"""The dynamics ensemble: its networks, its loss and its predictions. How it is fitted is in ``training.py``."""

import math
from collections.abc import Sequence

import torch as th
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from sb3_mbpo.adam import Tensors

# Weight decay of the first, the second, the middle and the last layer (authors' release)
WEIGHT_DECAY = (2.5e-5, 5e-5, 7.5e-5, 1e-4)
# Root mean square below which rewards are taken for none
MIN_REWARD_SIZE = 1e-10
# Coefficient of the penalty that pulls the learned bounds of the log-variance together (Chua et al. 2018, A.1)
BOUND_PENALTY = 0.01


def weight_decays(n_layers: int) -> list[float]:
    """
    :param n_layers: Number of linear layers, at least two
    :return: Weight decay of each layer; 2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4 for the five layers of the authors' release
    """
    first, second, middle, last = WEIGHT_DECAY
    return [first, second, *[middle] * (n_layers - 3), last] if n_layers > 2 else [first, last]


def input_stats(inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    What inputs are standardised with: mean and standard deviation, the latter 1 where an input is constant.

    :param inputs: ``(n, dim)``
    :return: Mean and standard deviation, each ``(dim,)``
    """
    # float64: a constant dimension must come out as constant, not as rounding noise
    std, mean = th.std_mean(inputs.double(), dim=0, correction=0)
    # What varies by less than float32 can tell apart is constant, and a constant input carries no information
    constant = std <= (mean.abs() * th.finfo(th.float32).eps).clamp(min=1e-12)
    return mean, th.where(constant, 1.0, std)


def target_scale(targets: th.Tensor, scale: th.Tensor) -> th.Tensor:
    """
    Powers of ten that the outputs are multiplied with, so that the networks' own are neither huge nor, for rewards, tiny. They
    are 1 for what the constants of the authors' release are made for, targets of a root mean square between 0.001 and 1,000.
    Tiny changes of observations are left as they are: they may be rounding noise, which must not become a target like others.

    :param targets: (reward, next_obs - obs), ``(n, dim)``
    :param scale: The present one, ``(dim,)``, kept where the targets are still within a factor of 1,000 of it
    :return: ``(dim,)``
    """
    size = targets.double().square().mean(dim=0).sqrt()
    is_off = (size > MIN_REWARD_SIZE) & ((size / scale).log10().abs() >= 3)
    scale = th.where(is_off, 10 ** size.log10().round(), scale.double()).to(scale)
    return th.cat([scale[:1], scale[1:].clamp(min=1)])


def gaussian_nll(mean: th.Tensor, log_var: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    Negative log-likelihood of a diagonal Gaussian, times two and without its constant, averaged over dimensions
    and rows (paper, section 5; scaled as in the authors' release).

    :param mean: ``(n_members, batch, dim)``
    :param log_var: ``(n_members, batch, dim)``
    :param target: ``(n_members, batch, dim)``
    :return: ``(n_members,)``
    """
    return ((target - mean).square() * th.exp(-log_var) + log_var).mean(dim=(1, 2))


class Ensemble(nn.Module):
    """
    Probabilistic networks p(reward, next_obs - obs | obs, action), each a diagonal Gaussian, side by side
    (paper, section 5; architecture and constants of the authors' release).

    The weights of all members are stacked, ``(n_members, in, out)``, so that one product per layer serves all.
    Observations and rewards are in raw units, actions in [-1, 1] as in SB3's replay buffers. Targets are not standardised,
    but those that are huge or tiny have a scale (:func:`target_scale`).

    Constructing it does not touch the global random state, so that an agent that never uses the model
    sees the same random numbers as SB3's ``SAC``.

    :param obs_dim: Size of the flattened observation
    :param action_dim: Size of the flattened action
    :param hidden_sizes: Units of each hidden layer
    :param n_members: Number of networks
    :param n_elites: Number of networks that predict
    :param learning_rate: Adam's
    """

    def __init__(
        self, obs_dim: int, action_dim: int, hidden_sizes: Sequence[int], n_members: int, n_elites: int, learning_rate: float
    ) -> None:
        super().__init__()
        self.n_members = n_members
        sizes = [obs_dim + action_dim, *hidden_sizes, 1 + obs_dim]
        # The last layer gives mean and log-variance
        shapes = list(zip(sizes[:-1], [*hidden_sizes, 2 * sizes[-1]], strict=True))
        self.weights = nn.ParameterList([nn.Parameter(th.empty(n_members, *shape)) for shape in shapes])
        self.biases = nn.ParameterList([nn.Parameter(th.zeros(n_members, 1, n_out)) for _, n_out in shapes])
        self.max_log_var = nn.Parameter(th.full((sizes[-1],), 0.5))
        self.min_log_var = nn.Parameter(th.full((sizes[-1],), -10.0))
        with th.random.fork_rng(devices=[]):
            for weight in self.weights:
                std = 1 / (2 * math.sqrt(weight.shape[1]))
                nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

        # All floats, also what is counted or indexed: SB3's tools fill every entry of a state dict with random floats
        self.register_buffer("input_mean", th.zeros(sizes[0]))
        self.register_buffer("input_std", th.ones(sizes[0]))
        self.register_buffer("target_scale", th.ones(sizes[-1]))
        self.register_buffer("elites", th.arange(n_elites, dtype=th.float32))
        self.register_buffer("n_fits", th.zeros(()))
        self.input_mean: th.Tensor
        self.input_std: th.Tensor
        self.target_scale: th.Tensor
        self.elites: th.Tensor
        self.n_fits: th.Tensor

        # A Python float: a NumPy one in the optimizer's state would not load with `weights_only`
        self.optimizer = th.optim.Adam(self.parameters(), lr=float(learning_rate))

    @property
    def is_fitted(self) -> bool:
        """Whether it has seen data: an ensemble that has not must not generate any."""
        return self.n_fits.item() > 0

    def set_stats(self, inputs: th.Tensor, targets: th.Tensor) -> None:
        """
        Refit the standardisation of the inputs and the scale of the targets.

        :param inputs: ``(n, obs_dim + action_dim)``
        :param targets: ``(n, 1 + obs_dim)``
        """
        mean, std = input_stats(inputs)
        self.input_mean.copy_(mean)
        self.input_std.copy_(std)
        self.target_scale.copy_(target_scale(targets, self.target_scale))

    def forward(self, inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param inputs: ``(n_members, batch, obs_dim + action_dim)``, not standardised
        :return: Mean and log-variance of (reward, next_obs - obs), each ``(n_members, batch, 1 + obs_dim)``
        """
        return self._predict(inputs, list(self.weights), list(self.biases))

    def _predict(
        self, inputs: th.Tensor, weights: Sequence[th.Tensor], biases: Sequence[th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor]:
        hidden = (inputs - self.input_mean) / self.input_std
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            hidden = F.silu(th.bmm(hidden, weight) + bias)
        mean, log_var = (th.bmm(hidden, weights[-1]) + biases[-1]).chunk(2, dim=-1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        log_var = self.min_log_var + F.softplus(log_var - self.min_log_var)
        return mean * self.target_scale, log_var + 2 * self.target_scale.log()

    def loss(self, inputs: th.Tensor, targets: th.Tensor, parameters: Tensors | None = None) -> th.Tensor:
        """
        What training minimises: the likelihood of every member on its own batch, weight decay, and the penalty
        on the log-variance bounds.

        :param inputs: ``(n_members, batch, obs_dim + action_dim)``
        :param targets: ``(n_members, batch, 1 + obs_dim)``
        :param parameters: In place of its own, by their names
        :return: A scalar
        """
        parameters = dict(self.named_parameters()) if parameters is None else parameters
        mean, log_var = functional_call(self, parameters, (inputs,))
        weights = [parameters[f"weights.{layer}"] for layer in range(len(self.weights))]
        decay = sum(wd * weight.square().sum() / 2 for wd, weight in zip(weight_decays(len(weights)), weights, strict=True))
        bounds = BOUND_PENALTY * (parameters["max_log_var"].sum() - parameters["min_log_var"].sum())
        return gaussian_nll(mean, log_var, targets).sum() + decay + bounds

    @th.no_grad()
    def mse(self, inputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        :param inputs: ``(n, obs_dim + action_dim)``, the same for every member
        :param targets: ``(n, 1 + obs_dim)``
        :return: Mean squared error of each member's mean, in units of ``target_scale``, ``(n_members,)``
        """
        mean, _ = self(inputs.expand(self.n_members, -1, -1))
        return ((mean - targets) / self.target_scale).square().mean(dim=(1, 2))

    @th.no_grad()
    def nll(self, inputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        Negative log-likelihood under what rollouts draw from, the mixture of the elites.

        :param inputs: (obs, action), ``(n, obs_dim + action_dim)``, raw units
        :param targets: (reward, next_obs - obs), ``(n, 1 + obs_dim)``, raw units
        :return: In nats, ``(n,)``
        """
        mean, log_var = self(inputs.expand(self.n_members, -1, -1))
        elites = self.elites.long()
        normal = th.distributions.Normal(mean[elites], th.exp(0.5 * log_var[elites]))
        log_likelihoods = normal.log_prob(targets).sum(dim=2)
        return math.log(len(elites)) - log_likelihoods.logsumexp(dim=0)

    @th.no_grad()
    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw the next observation and the reward: for each row one elite, uniformly at random, and a sample from its
        Gaussian (paper, section 5). Only the chosen member is evaluated.

        :param obs: ``(n, obs_dim)``, raw units
        :param actions: ``(n, action_dim)``, in [-1, 1]
        :return: Next observations ``(n, obs_dim)`` and rewards ``(n,)``
        """
        inputs = th.cat([obs, actions], dim=1)
        members = self.elites.long()[th.randint(len(self.elites), (len(inputs),), device=inputs.device)]
        output = inputs.new_empty(len(inputs), 1 + obs.shape[1])
        for member in members.unique().tolist():
            rows = (members == member).nonzero().squeeze(1)
            only = slice(member, member + 1)
            mean, log_var = self._predict(
                inputs[None, rows], [weight[only] for weight in self.weights], [bias[only] for bias in self.biases]
            )
            output[rows] = (mean + th.exp(0.5 * log_var) * th.randn_like(mean)).squeeze(0)
        return obs + output[:, 1:], output[:, 0]
