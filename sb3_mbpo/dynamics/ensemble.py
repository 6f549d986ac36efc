"""The dynamics ensemble: its networks, its loss and its predictions. How it is fitted is in ``training.py``."""

import math
from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from sb3_mbpo.common.adam import Tensors
from sb3_mbpo.dynamics.units import huber, input_stats, operands_of, standardised, target_stats

# Weight decay of the first, the second, the middle and the last layer (authors' release)
WEIGHT_DECAY = (2.5e-5, 5e-5, 7.5e-5, 1e-4)
# Coefficient of the penalty that pulls the learned bounds of the log-variance together (Chua et al. 2018, A.1)
BOUND_PENALTY = 0.01
# Where these bounds begin (authors' release)
MAX_LOG_VAR, MIN_LOG_VAR = 0.5, -10.0
# By how much the spread of a dimension may grow from one training to the next for it to be known still
MAX_FACTOR = 3.0


def weight_decays(n_layers: int) -> list[float]:
    """
    :param n_layers: Number of linear layers, at least two
    :return: Weight decay of each layer; 2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4 for the five layers of the authors' release
    """
    first, second, middle, last = WEIGHT_DECAY
    return [first, second, *[middle] * (n_layers - 3), last] if n_layers > 2 else [first, last]


def gaussian_nll(mean: th.Tensor, log_var: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    Negative log-likelihood of a diagonal Gaussian, times two and without its constant (paper, section 5; scaled as in the
    authors' release). For changes of the observation it is linear beyond five standard deviations; the mean of the reward must
    stay its expectation, so it is Gaussian throughout.

    :param mean: Of (reward, next_obs - obs), ``(n_members, batch, dim)``
    :param log_var: ``(n_members, batch, dim)``
    :param target: ``(n_members, batch, dim)``
    :return: Of each number, ``(n_members, batch, dim)``
    """
    z = (target - mean) * th.exp(-0.5 * log_var)
    return th.cat([z[:, :, :1].square(), huber(z[:, :, 1:])], dim=2) + log_var


def nll_shares(log_var: th.Tensor, beta: th.Tensor | float, varies: th.Tensor) -> th.Tensor:
    """
    How much the likelihood of each number counts: in proportion to its variance to the power of beta (Seitzer et al. 2022).

    :param log_var: As predicted, ``(n_members, batch, dim)``
    :param beta: Between 0 and 1
    :param varies: Dimensions that are not constant, bool, ``(dim,)``
    :return: For each member 1 on average over rows and dimensions, and 0 of a constant; without gradient,
        ``(n_members, batch, dim)``
    """
    power = (beta * log_var).detach().exp() * varies
    total = power.sum(dim=(1, 2), keepdim=True)
    return power * (power.shape[1] * varies.sum() / th.where(total > 0, total, 1.0))


class Ensemble(nn.Module):
    """
    Probabilistic networks p(reward, next_obs - obs | obs, action), each a diagonal Gaussian, side by side
    (paper, section 5; architecture and constants of the authors' release).

    The weights of all members are stacked, ``(n_members, in, out)``, so that one product per layer serves all.

    **Units.** Networks, their variances and their loss are in units in which each input and each target has a mean of 0 and a
    spread of 1 over the real transitions (``unit_inputs``, ``unit_targets``; what a spread is, says ``target_stats``). What
    :meth:`predict`, :meth:`sample` and :meth:`nll` take and return are raw observations and rewards, and actions in [-1, 1] as
    in SB3's replay buffers.

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
        self.max_log_var = nn.Parameter(th.full((sizes[-1],), MAX_LOG_VAR))
        self.min_log_var = nn.Parameter(th.full((sizes[-1],), MIN_LOG_VAR))
        with th.random.fork_rng(devices=[]):
            for weight in self.weights:
                std = 1 / (2 * math.sqrt(weight.shape[1]))
                nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

        # All floats, also what is counted or indexed: SB3's tools fill every entry of a state dict with random floats.
        # Units in float64: a large mean must not take the digits of a small change.
        for name, size in (("input", sizes[0]), ("target", sizes[-1])):
            self.register_buffer(f"{name}_mean", th.zeros(size, dtype=th.float64))
            self.register_buffer(f"{name}_std", th.ones(size, dtype=th.float64))
            self.register_buffer(f"{name}_unit", th.zeros(size, dtype=th.float64))
        self.register_buffer("elites", th.arange(n_elites, dtype=th.float32))
        self.register_buffer("n_fits", th.zeros(()))
        self.input_mean: th.Tensor
        self.input_std: th.Tensor
        self.target_mean: th.Tensor
        # 0 in both: constant, hence no information, or predicted exactly
        self.target_std: th.Tensor
        # When it last varied, for the weights; 0 if it never has
        self.input_unit: th.Tensor
        self.target_unit: th.Tensor
        self.elites: th.Tensor
        self.n_fits: th.Tensor

        # A Python float: a NumPy one in the optimizer's state would not load with `weights_only`
        self.optimizer = th.optim.Adam(self.parameters(), lr=float(learning_rate))

    @property
    def is_fitted(self) -> bool:
        """Whether it has seen data: an ensemble that has not must not generate any."""
        return self.n_fits.item() > 0

    @property
    def varies(self) -> th.Tensor:
        """Which targets were not constant in the data, bool, ``(1 + obs_dim,)``."""
        return self.target_std > 0

    def unit_inputs(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: (obs, action), ``(..., obs_dim + action_dim)``, raw, in any precision
        :return: What the networks see, standardised before it is rounded to their precision
        """
        return standardised(inputs, self.input_mean, self.input_std).to(self.weights[0])

    def unit_targets(self, targets: th.Tensor) -> th.Tensor:
        """
        :param targets: (reward, next_obs - obs), ``(..., 1 + obs_dim)``, raw, in any precision
        :return: What the networks are to predict
        """
        return standardised(targets, self.target_mean, self.target_std).to(self.weights[0])

    @th.no_grad()
    def set_stats(self, inputs: th.Tensor, targets: th.Tensor) -> None:
        """
        Refit the units. What a fitted ensemble predicts in raw units stays as it is: its first and its last layer are
        rescaled to the new ones (van Hasselt et al. 2016, PopArt), or for what is constant now, to the one in which it last
        varied: it may vary again. Two exceptions are for dimensions that spread more than three times as far as before, of
        which little is known: the first layer is not rescaled for such an input (a function that was steep would be wrong far
        away), nor is the variance of such a target. Bounds of variances get no narrower in the new units, unless they are
        wider than they began.

        :param inputs: ``(n, obs_dim + action_dim)``
        :param targets: ``(n, 1 + obs_dim)``
        """
        input_mean, input_std = input_stats(inputs)
        target_mean, target_std = target_stats(targets, operands_of(inputs, targets))
        input_unit = th.where(input_std > 0, input_std, self.input_unit)
        target_unit = th.where(target_std > 0, target_std, self.target_unit)
        if self.is_fitted:
            self._rescale_first_layer(input_mean, input_unit)
            self._rescale_last_layer(target_mean, target_unit)
        self.input_mean.copy_(input_mean)
        self.input_std.copy_(input_std)
        self.input_unit.copy_(input_unit)
        self.target_mean.copy_(target_mean)
        self.target_std.copy_(target_std)
        self.target_unit.copy_(target_unit)

    def _rescale_first_layer(self, mean: th.Tensor, unit: th.Tensor) -> None:
        weight, bias = self.weights[0], self.biases[0]
        # 0: what has been constant so far has had no influence
        factor = unit / th.where(self.input_unit > 0, self.input_unit, th.inf)
        stays = factor <= MAX_FACTOR
        bias += (standardised(mean, self.input_mean, self.input_unit) * stays).to(weight)[None, None] @ weight
        weight *= th.where(stays, factor, 1.0).to(weight)[:, None]

    def _rescale_last_layer(self, mean: th.Tensor, unit: th.Tensor) -> None:
        # Constant so far: whatever is predicted
        divisor = th.where(unit > 0, unit, th.inf)
        factor, shift = self.target_unit / divisor, (self.target_mean - mean) / divisor
        weight, bias, n = self.weights[-1], self.biases[-1], len(factor)
        weight[:, :, :n] *= factor.to(weight)
        bias[:, :, :n] = bias[:, :, :n] * factor.to(weight) + shift.to(weight)
        # A variance has the square of the factor, and so have its bounds
        log_factor = th.where(factor >= 1 / MAX_FACTOR, 2 * factor.log(), 0.0).to(weight)
        bias[:, :, n:] += log_factor
        least_max, most_min = self.max_log_var.clamp(max=MAX_LOG_VAR), self.min_log_var.clamp(min=MIN_LOG_VAR)
        self.max_log_var.copy_(th.maximum(self.max_log_var + log_factor, least_max))
        self.min_log_var.copy_(th.minimum(self.min_log_var + log_factor, most_min))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}target_unit" not in state_dict:
            raise ValueError(
                "These parameters are of an earlier version of sb3_mbpo, whose model had other units, and do not fit this "
                "one: train again, or use the version of that day."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, unit_inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param unit_inputs: See :meth:`unit_inputs`, ``(n_members, batch, obs_dim + action_dim)``
        :return: Mean and log-variance of the unit targets, each ``(n_members, batch, 1 + obs_dim)``
        """
        return self.layers(unit_inputs, list(self.weights), list(self.biases))

    def layers(
        self, hidden: th.Tensor, weights: Sequence[th.Tensor], biases: Sequence[th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        :param hidden: What the first layer gets, ``(n, batch, obs_dim + action_dim)``
        :param weights: Of each layer of ``n`` networks
        :param biases: Of each layer of ``n`` networks
        :return: As :meth:`forward`
        """
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            hidden = F.silu(th.bmm(hidden, weight) + bias)
        mean, log_var = (th.bmm(hidden, weights[-1]) + biases[-1]).chunk(2, dim=-1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        log_var = self.min_log_var + F.softplus(log_var - self.min_log_var)
        return mean, log_var

    def loss(
        self,
        unit_inputs: th.Tensor,
        unit_targets: th.Tensor,
        parameters: Tensors | None = None,
        nll_betas: th.Tensor | tuple[float, float] = (0.0, 0.0),
    ) -> th.Tensor:
        """
        What training minimises: the likelihood of every member on its own batch, averaged over rows and those dimensions that
        vary, weight decay, and the penalty on the log-variance bounds.

        With ``nll_betas`` above 0 the likelihood of each number counts in proportion to its predicted variance to this power
        (Seitzer et al. 2022, beta-NLL); the reward on average as much as a change. Without, what is predicted well counts
        most, and a rare row that is predicted badly is taken for noise, with hardly a gradient for its mean.

        :param unit_inputs: ``(n_members, batch, obs_dim + action_dim)``
        :param unit_targets: ``(n_members, batch, 1 + obs_dim)``
        :param parameters: In place of its own, by their names
        :param nll_betas: Of the reward and of the changes, between 0, the likelihood itself (paper), and 1, where gradients of
            the mean are those of squared errors
        :return: A scalar
        """
        parameters = dict(self.named_parameters()) if parameters is None else parameters
        mean, log_var = functional_call(self, parameters, (unit_inputs,))
        weights = [parameters[f"weights.{layer}"] for layer in range(len(self.weights))]
        decay = sum(wd * weight.square().sum() / 2 for wd, weight in zip(weight_decays(len(weights)), weights, strict=True))
        of_reward = nll_shares(log_var[:, :, :1], nll_betas[0], self.varies[:1])
        share = th.cat([of_reward, nll_shares(log_var[:, :, 1:], nll_betas[1], self.varies[1:])], dim=2)
        nll = share * gaussian_nll(mean, log_var, unit_targets)
        # As much of the penalty as of the likelihood. Of a constant, nothing else would hold the bounds.
        bounds = BOUND_PENALTY * (share.mean(dim=(0, 1)) * (parameters["max_log_var"] - parameters["min_log_var"])).sum()
        return nll.sum(dim=2).mean(dim=1).sum() / self.varies.sum().clamp(min=1) + decay + bounds

    @th.no_grad()
    def predict(self, inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param inputs: (obs, action), raw, the same for every member, ``(n, obs_dim + action_dim)``
        :return: Mean and standard deviation of (reward, next_obs - obs) by each member, raw, each
            ``(n_members, n, 1 + obs_dim)``, in the precision of the inputs
        """
        mean, log_var = self(self.unit_inputs(inputs).expand(self.n_members, -1, -1))
        mean, std = self.target_mean + self.target_std * mean, self.target_std * th.exp(0.5 * log_var)
        return mean.to(inputs), std.to(inputs)

    @th.no_grad()
    def nll(self, inputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        Negative log-likelihood under what rollouts draw from, the mixture of the elites. Constant dimensions are left out.

        :param inputs: (obs, action), ``(n, obs_dim + action_dim)``, raw units
        :param targets: (reward, next_obs - obs), ``(n, 1 + obs_dim)``, raw units
        :return: In nats, ``(n,)``
        """
        mean, log_var = self(self.unit_inputs(inputs).expand(self.n_members, -1, -1))
        elites = self.elites.long()
        normal = th.distributions.Normal(mean[elites], th.exp(0.5 * log_var[elites]))
        log_likelihoods = (normal.log_prob(self.unit_targets(targets)) * self.varies).sum(dim=2)
        # A density in raw units
        volume = self.target_std[self.varies].log().sum().to(mean)
        return math.log(len(elites)) - log_likelihoods.logsumexp(dim=0) + volume

    @th.no_grad()
    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw the next observation and the reward: for each row one elite, uniformly at random, and a sample from its
        Gaussian (paper, section 5). Only the chosen member is evaluated.

        :param obs: ``(n, obs_dim)``, raw units
        :param actions: ``(n, action_dim)``, in [-1, 1]
        :return: Next observations ``(n, obs_dim)`` and rewards ``(n,)``, in the precision of the observations
        """
        inputs = self.unit_inputs(th.cat([obs, actions], dim=1))
        members = self.elites.long()[th.randint(len(self.elites), (len(inputs),), device=inputs.device)]
        output = inputs.new_empty(len(inputs), 1 + obs.shape[1])
        for member in members.unique().tolist():
            rows = (members == member).nonzero().squeeze(1)
            only = slice(member, member + 1)
            mean, log_var = self.layers(
                inputs[None, rows], [weight[only] for weight in self.weights], [bias[only] for bias in self.biases]
            )
            output[rows] = (mean + th.exp(0.5 * log_var) * th.randn_like(mean)).squeeze(0)
        raw = self.target_mean + self.target_std * output
        return (obs + raw[:, 1:]).to(obs), raw[:, 0].to(obs)
