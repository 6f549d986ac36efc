"""Fitting the ensemble: bootstraps, holdout, early stopping, best weights of each member, elites."""

from typing import NamedTuple

import torch as th

from sb3_mbpo.dynamics.ensemble import Ensemble

BATCH_SIZE = 256
HOLDOUT_RATIO = 0.2
MAX_HOLDOUT = 5_000
# A member improves if its holdout error falls by more than this share of its best
MIN_IMPROVEMENT = 0.01
# Epochs without improvement of any member after which training stops
PATIENCE = 5


class FitResult(NamedTuple):
    """
    What one training of the ensemble did.

    :param train_loss: Mean loss of the last epoch
    :param holdout_mse: Mean squared holdout error of the elites, raw units
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


def fit(ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor) -> FitResult:
    """
    Train the ensemble from its present weights until no member improves on held-out data (paper, section 5 and
    Appendix C; details of the authors' release).

    :param ensemble: Trained in place
    :param inputs: (obs, action), ``(n, obs_dim + action_dim)``, float32
    :param targets: (reward, next_obs - obs), ``(n, 1 + obs_dim)``, float32
    :return: Losses and number of epochs
    :raises ValueError: if there are fewer than two rows, if a row is not finite, or if training diverges;
        the ensemble then has the weights it had before
    """
    if len(inputs) < 2:
        raise ValueError(f"The dynamics model needs at least 2 transitions to train on, not {len(inputs)}")
    for name, array in (("observations or actions", inputs), ("rewards or next observations", targets)):
        finite = th.isfinite(array).all(dim=1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(f"The {name} of transition {row} are not finite: {array[row].tolist()}")

    train, holdout = split_holdout(len(inputs), inputs.device)
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    best = BestWeights(ensemble)
    ensemble.set_input_stats(inputs[train])
    indices = bootstrap(len(train), ensemble.n_members, inputs.device)
    ensemble.train()
    epochs, epochs_since_improvement = 0, 0
    while epochs_since_improvement < PATIENCE:
        indices = shuffle_rows(indices)
        losses = []
        for batch in indices.split(BATCH_SIZE, dim=1):
            rows = train[batch]
            loss = ensemble.loss(inputs[rows], targets[rows])
            ensemble.optimizer.zero_grad()
            loss.backward()
            ensemble.optimizer.step()
            losses.append(loss.detach())
        epochs += 1
        mse = ensemble.mse(inputs[holdout], targets[holdout])
        train_loss = th.stack(losses).mean()
        if not (th.isfinite(mse).all() and th.isfinite(train_loss)):
            ensemble.load_state_dict(before)
            ensemble.optimizer.state.clear()
            raise ValueError(
                f"Training of the dynamics model diverged in epoch {epochs}: holdout errors {mse.tolist()}. Its weights are "
                "those from before. Lower `model_learning_rate` or scale the observations and rewards."
            )
        epochs_since_improvement = 0 if best.update(mse) else epochs_since_improvement + 1
    ensemble.eval()
    best.restore()
    elites = best.mse.argsort()[: len(ensemble.elites)]
    ensemble.elites.copy_(elites)
    ensemble.n_fits += 1
    return FitResult(train_loss.item(), best.mse[elites].mean().item(), epochs)
