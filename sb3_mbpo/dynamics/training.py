"""Fitting the ensemble: bootstraps, holdout, early stopping, best weights of each member, elites."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch as th
from torch.func import grad_and_value

from sb3_mbpo.adam import Tensors, TrainState, adam_step, coefficients, count_steps, live_tensors
from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.errors import DivergenceError

BATCH_SIZE = 256
HOLDOUT_RATIO = 0.2
MAX_HOLDOUT = 5_000
# A member improves if its holdout error falls by more than this share of its best
MIN_IMPROVEMENT = 0.01
# Epochs without improvement of any member after which training stops
PATIENCE = 5
# Fewest rows in an epoch: with less data it goes through them several times, to make as many steps of Adam. 4,000 are an
# epoch of the authors' first training; with 400, 5 epochs of one pass each were 10 steps, and trainings ended by chance with
# poor models.
MIN_EPOCH_ROWS = 4_000

# What `train_step` is compiled to
CompiledStep = Callable[[Ensemble, TrainState, th.Tensor, th.Tensor, th.Tensor], th.Tensor]


class FitResult(NamedTuple):
    """
    What one training of the ensemble did.

    :param train_loss: Mean loss of the last epoch
    :param holdout_mse: Mean squared holdout error of the elites, raw units (huge or tiny targets: see ``target_scale``)
    :param epochs: Epochs until early stopping
    """

    train_loss: float
    holdout_mse: float
    epochs: int


def split_holdout(n: int, device: th.device | str = "cpu") -> tuple[th.Tensor, th.Tensor]:
    """
    Split rows at random into training and holdout, the latter 20 % but 5,000 at most.

    :param n: Number of rows, at least two
    :return: Indices for training and for holdout
    """
    n_holdout = min(max(int(HOLDOUT_RATIO * n), 1), MAX_HOLDOUT)
    order = th.randperm(n, device=device)
    return order[n_holdout:], order[:n_holdout]


def bootstrap(n: int, n_members: int, device: th.device | str = "cpu") -> th.Tensor:
    """
    :param n: Number of training rows
    :param n_members: Number of networks
    :return: For each member its own ``n`` rows, drawn with replacement: indices ``(n_members, n)``
    """
    return th.randint(n, (n_members, n), device=device)


def shuffle_rows(indices: th.Tensor) -> th.Tensor:
    """
    :param indices: ``(n_members, n)``
    :return: The same indices, each row in an order of its own
    """
    return indices.gather(1, th.rand(indices.shape, device=indices.device).argsort(dim=1))


def train_step(
    ensemble: Ensemble, state: TrainState, inputs: th.Tensor, targets: th.Tensor, coefficients: th.Tensor
) -> th.Tensor:
    """
    One step of Adam, in place, as a function of tensors that can be compiled to one graph.

    :param ensemble: Architecture and input statistics
    :param state: Changed
    :param inputs: ``(n_members, batch, obs_dim + action_dim)``
    :param targets: ``(n_members, batch, 1 + obs_dim)``
    :param coefficients: Adam's, ``(7,)``
    :return: Loss before the step
    """

    def loss(parameters: Tensors) -> th.Tensor:
        return ensemble.loss(inputs, targets, parameters)

    gradients, value = grad_and_value(loss)(state.parameters)
    adam_step(state, gradients, coefficients)
    return value


class BestWeights:
    """
    The best weights of each member so far, by its holdout error.

    :param ensemble: Whose weights to keep; those it has now are kept until a member improves
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble
        self.mse = th.full((ensemble.n_members,), th.inf, device=ensemble.elites.device)
        self.saved = [parameter.detach().clone() for parameter in self._parameters()]

    def _parameters(self) -> list[th.Tensor]:
        return [*self.ensemble.weights, *self.ensemble.biases]

    def update(self, mse: th.Tensor) -> bool:
        """
        :param mse: Holdout error of each member, ``(n_members,)``
        :return: Whether any member improved
        """
        improved = mse < (1 - MIN_IMPROVEMENT) * self.mse
        for saved, parameter in zip(self.saved, self._parameters(), strict=True):
            saved[improved] = parameter.detach()[improved]
        self.mse[improved] = mse[improved]
        return bool(improved.any())

    @th.no_grad()
    def restore(self) -> None:
        """Put each member back to its own best weights."""
        for saved, parameter in zip(self.saved, self._parameters(), strict=True):
            parameter.copy_(saved)


def _train_state(ensemble: Ensemble) -> TrainState:
    """The ensemble's own tensors, not copies."""
    names = [name for name, _ in ensemble.named_parameters()]
    return TrainState(*(dict(zip(names, each, strict=True)) for each in live_tensors(ensemble.optimizer)))


@th.no_grad()
def try_step(ensemble: Ensemble, step: CompiledStep) -> None:
    """
    Make a step on a copy, on a batch of zeros: it is compiled then.

    :param ensemble: Not changed
    :param step: What :func:`train_step` is compiled to
    """
    n_in, n_out = ensemble.weights[0].shape[1], ensemble.weights[-1].shape[2] // 2
    inputs, targets = (ensemble.input_mean.new_zeros(ensemble.n_members, BATCH_SIZE, n) for n in (n_in, n_out))
    state = TrainState(*({name: tensor.clone() for name, tensor in each.items()} for each in _train_state(ensemble)))
    ensemble.train()
    step(ensemble, state, inputs, targets, coefficients(ensemble.optimizer, 1)[0])
    ensemble.eval()


def train_epoch(
    ensemble: Ensemble,
    inputs: th.Tensor,
    targets: th.Tensor,
    indices: th.Tensor,
    compiled_step: CompiledStep | None = None,
    batch_size: int = BATCH_SIZE,
) -> th.Tensor:
    """
    Go through each member's own rows.

    :param ensemble: Trained in place
    :param inputs: (obs, action), ``(n, obs_dim + action_dim)``
    :param targets: (reward, next_obs - obs), ``(n, 1 + obs_dim)``
    :param indices: Rows of each member in their order, ``(n_members, n_rows)``
    :param compiled_step: What :func:`train_step` was compiled to, for the full batches of 256
    :param batch_size: Rows in a step
    :return: Mean loss
    """

    def batch(rows: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        x, y = (array.index_select(0, rows.reshape(-1)).view(*rows.shape, -1) for array in (inputs, targets))
        return x, y

    losses = []
    batches = list(indices.split(batch_size, dim=1))
    if compiled_step is not None and batch_size == BATCH_SIZE:
        n_full = indices.shape[1] // BATCH_SIZE
        full, batches = batches[:n_full], batches[n_full:]
        state = _train_state(ensemble)
        with th.no_grad():
            for rows, numbers in zip(full, coefficients(ensemble.optimizer, n_full).unbind(), strict=True):
                losses.append(compiled_step(ensemble, state, *batch(rows), numbers))
        count_steps(ensemble.optimizer, n_full)
    for rows in batches:
        loss = ensemble.loss(*batch(rows))
        ensemble.optimizer.zero_grad()
        loss.backward()
        ensemble.optimizer.step()
        losses.append(loss.detach())
    return th.stack(losses).mean()


def fit(
    ensemble: Ensemble,
    inputs: th.Tensor,
    targets: th.Tensor,
    max_epochs: int | None = None,
    compiled_step: CompiledStep | None = None,
) -> FitResult:
    """
    Train the ensemble from its present weights until no member improves on held-out data for 5 epochs (paper, section 5
    and Appendix C; details of the authors' release). An epoch is one pass over the training rows, or, if they are fewer
    than 4,000, as many as make 16 steps of Adam.

    :param ensemble: Trained in place
    :param inputs: (obs, action), ``(n, obs_dim + action_dim)``, float32
    :param targets: (reward, next_obs - obs), ``(n, 1 + obs_dim)``, float32
    :param max_epochs: Epochs after which training stops in any case
    :param compiled_step: What :func:`train_step` was compiled to
    :return: Losses and number of epochs
    :raises ValueError: if there are fewer than two rows, or if a row is not finite
    :raises DivergenceError: if training diverges; the ensemble and its optimizer are then as they were before
    """
    if len(inputs) < 2:
        raise ValueError(f"The dynamics model needs at least 2 transitions to train on, not {len(inputs)}")
    for name, array in (("observations or actions", inputs), ("rewards or next observations", targets)):
        finite = th.isfinite(array).all(dim=1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(f"The {name} of transition {row} are not finite: {array[row].tolist()}")

    train, holdout = split_holdout(len(inputs), inputs.device)
    before = deepcopy([ensemble.state_dict(), ensemble.optimizer.state_dict()])
    best = BestWeights(ensemble)
    ensemble.set_stats(inputs[train], targets[train])
    indices = train[bootstrap(len(train), ensemble.n_members, inputs.device)]
    held_out = inputs[holdout], targets[holdout]
    # With less data than that, each pass is one step: more rows would be the same ones again
    batch_size = min(BATCH_SIZE, len(train))
    n_passes = math.ceil(MIN_EPOCH_ROWS / max(len(train), BATCH_SIZE))
    try:
        ensemble.train()
        epochs, epochs_since_improvement = 0, 0
        while epochs_since_improvement < PATIENCE and (max_epochs is None or epochs < max_epochs):
            epoch = th.cat([shuffle_rows(indices) for _ in range(n_passes)], dim=1)
            train_loss = train_epoch(ensemble, inputs, targets, epoch, compiled_step, batch_size)
            epochs += 1
            mse = ensemble.mse(*held_out)
            if not (th.isfinite(mse).all() and th.isfinite(train_loss)):
                raise DivergenceError(
                    f"Training of the dynamics model diverged in epoch {epochs}: holdout errors {mse.tolist()}. Its weights "
                    "are those from before. Lower `model_learning_rate` or scale the observations and rewards."
                )
            epochs_since_improvement = 0 if best.update(mse) else epochs_since_improvement + 1
    # An interruption too: what is saved then must not be half-trained
    except BaseException:
        ensemble.load_state_dict(before[0])
        ensemble.optimizer.load_state_dict(before[1])
        ensemble.eval()
        raise
    ensemble.eval()
    best.restore()
    elites = best.mse.argsort()[: len(ensemble.elites)]
    ensemble.elites.copy_(elites)
    ensemble.n_fits += 1
    return FitResult(train_loss.item(), best.mse[elites].mean().item(), epochs)
