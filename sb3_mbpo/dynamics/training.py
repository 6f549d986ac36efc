"""Fitting the ensemble: with a budget of gradient steps, or as in the paper until no member improves."""

import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import NamedTuple

import torch as th
from torch.func import grad_and_value

from sb3_mbpo.common.adam import Tensors, TrainState, adam_step, coefficients, count_steps, live_tensors
from sb3_mbpo.common.errors import DivergenceError
from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.dynamics.units import GOLDEN_RATIO, huber, operands_of, precision

BATCH_SIZE = 256
# With a budget: share of the transitions that no gradient step ever sees, and on how many of them the model is measured
HELD_OUT = 0.1
MAX_MEASURED = 2_000
# See `budget`
EXTRA_STEPS, MAX_STEPS = 1_000, 20_000
# Gradient steps of the first training between two looks at held-out rows
STEPS_PER_LOOK = 100
# Looks at held-out rows, or epochs of the paper's rule, without improvement of any member after which training stops
PATIENCE = 5
# See `Ensemble.loss`. With 0.25 for both, a reward that is another in 2 % of the rows was not learned; with 0.5 for both,
# changes of the observation were predicted with too much confidence.
NLL_BETAS = (0.5, 0.25)
# See `weight_decay`
MAX_WEIGHT_DECAY, ROWS_OF_PRIOR = 0.1, 300

# The paper's rule
HOLDOUT_RATIO = 0.2
MAX_HOLDOUT = 5_000
# A member improves if its holdout error falls by more than this share of its best
MIN_IMPROVEMENT = 0.01
# Fewest rows in an epoch: with less data it goes through them several times, to make as many steps of Adam. 4,000 are an
# epoch of the authors' first training; with 400, 5 epochs of one pass each were 10 steps, and trainings ended by chance with
# poor models.
MIN_EPOCH_ROWS = 4_000

# `train_step`, or what it is compiled to
Step = Callable[[Ensemble, TrainState, th.Tensor, th.Tensor, th.Tensor], th.Tensor]


class FitResult(NamedTuple):
    """
    What one training of the ensemble did.

    :param train_loss: Mean loss, of the last epoch or of the whole budget
    :param gradient_steps: How many there were
    :param r2: Share of the variance of the reward and of each dimension's change that the elites' mean explains in held-out
        transitions (with a budget, ones that no gradient step has seen), ``(1 + obs_dim,)``: 1 is perfect, 0 is as good as a
        constant. NaN where there is no variance.
    :param n_measured: Of how many transitions that is
    """

    train_loss: float
    gradient_steps: int
    r2: th.Tensor
    n_measured: int


def budget(steps_per_env_step: float | None, n_new: int, n: int) -> int | None:
    """
    The fewer transitions there are, the more each new one changes. With one gradient step per environment step the first
    training makes 1,000 more than there are transitions; one that comes 250 steps later on 1,000 makes 500, on 25,000 260.

    :param steps_per_env_step: Gradient steps of the model for each environment step, None for the paper's rule
    :param n_new: Environment steps since it was last trained; if it never was, all transitions
    :param n: How many transitions there have been, also if the buffer holds fewer
    :return: Gradient steps of the training, at least one; None for the paper's rule
    """
    if steps_per_env_step is None:
        return None
    return max(1, round(steps_per_env_step * min(n_new * (1 + EXTRA_STEPS / n), MAX_STEPS)))


def weight_decay(n: int) -> float:
    """
    By how much the weights shrink at each step, so that an ensemble that sees few transitions hundreds of times does not
    become sure of what it makes of them. A prior that counts as much as 300 transitions: the more data, the less.

    :param n: Number of training rows
    :return: Decoupled weight decay (Loshchilov & Hutter 2019) as a share of the learning rate
    """
    return min(MAX_WEIGHT_DECAY, ROWS_OF_PRIOR / n)


def split_for_good(n: int, device: th.device | str = "cpu") -> tuple[th.Tensor, th.Tensor]:
    """
    Hold out a tenth of the rows, the same ones whenever there are more: what no gradient step has seen tells how good a model
    is. They are spread evenly, but in no rhythm that parallel environments could have: the multiples of the golden ratio.

    :param n: Number of rows, at least two
    :return: Indices for training and for holdout
    """
    rows = th.arange(n, device=device)
    held_out = rows.double() * GOLDEN_RATIO % 1 >= 1 - HELD_OUT
    if not held_out.any():
        held_out[-1] = True
    return rows[~held_out], rows[held_out]


def split_at_random(n: int, device: th.device | str = "cpu") -> tuple[th.Tensor, th.Tensor]:
    """
    Split rows at random into training and holdout, the latter 20 % but 5,000 at most (authors' release).

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


def draw_batches(rows: th.Tensor, n_members: int, n_steps: int, batch_size: int = BATCH_SIZE) -> Iterator[th.Tensor]:
    """
    :param rows: Indices to draw from, with replacement
    :param n_members: Number of networks
    :param n_steps: Number of batches
    :param batch_size: Size of each member's batch
    :return: For each step a batch of each member's own, ``(n_members, batch_size)``
    """
    for _ in range(n_steps):
        yield rows[th.randint(len(rows), (n_members, batch_size), device=rows.device)]


def shuffle_rows(indices: th.Tensor) -> th.Tensor:
    """
    :param indices: ``(n_members, n)``
    :return: The same indices, each row in an order of its own
    """
    return indices.gather(1, th.rand(indices.shape, device=indices.device).argsort(dim=1))


def train_step(
    ensemble: Ensemble, state: TrainState, unit_inputs: th.Tensor, unit_targets: th.Tensor, coefficients: th.Tensor
) -> th.Tensor:
    """
    One step of Adam, in place, as a function of tensors that can be compiled to one graph.

    :param ensemble: Architecture
    :param state: Changed
    :param unit_inputs: ``(n_members, batch, obs_dim + action_dim)``
    :param unit_targets: ``(n_members, batch, 1 + obs_dim)``
    :param coefficients: Adam's, what the weights are multiplied with, and ``nll_betas`` of the loss, ``(10,)``
    :return: Loss before the step
    """

    def loss(parameters: Tensors) -> th.Tensor:
        return ensemble.loss(unit_inputs, unit_targets, parameters, coefficients[8:])

    gradients, value = grad_and_value(loss)(state.parameters)
    for name, parameter in state.parameters.items():
        if name.startswith("weights."):
            parameter.mul_(coefficients[7])
    adam_step(state, gradients, coefficients[:7])
    return value


def _numbers(ensemble: Ensemble, n_steps: int, decay: float, nll_betas: tuple[float, float]) -> th.Tensor:
    """The coefficients of :func:`train_step` for the next steps, ``(n_steps, 10)``."""
    shrink = 1 - decay * ensemble.optimizer.param_groups[0]["lr"]
    adams = coefficients(ensemble.optimizer, n_steps)
    return th.cat([adams, adams.new_tensor([shrink, *nll_betas]).expand(n_steps, 3)], dim=1)


def _train_state(ensemble: Ensemble) -> TrainState:
    """The ensemble's own tensors, not copies."""
    names = [name for name, _ in ensemble.named_parameters()]
    return TrainState(*(dict(zip(names, each, strict=True)) for each in live_tensors(ensemble.optimizer)))


@th.no_grad()
def try_step(ensemble: Ensemble, step: Step) -> None:
    """
    Make a step on a copy, on a batch of zeros: it is compiled then.

    :param ensemble: Not changed
    :param step: What :func:`train_step` is compiled to
    """
    n_in, n_out = ensemble.weights[0].shape[1], ensemble.weights[-1].shape[2] // 2
    inputs, targets = (ensemble.weights[0].new_zeros(ensemble.n_members, BATCH_SIZE, n) for n in (n_in, n_out))
    state = TrainState(*({name: tensor.clone() for name, tensor in each.items()} for each in _train_state(ensemble)))
    ensemble.train()
    step(ensemble, state, inputs, targets, _numbers(ensemble, 1, 0.0, NLL_BETAS)[0])
    ensemble.eval()


@th.no_grad()
def train_on(
    ensemble: Ensemble,
    inputs: th.Tensor,
    targets: th.Tensor,
    batches: Iterable[th.Tensor],
    n_steps: int,
    compiled_step: Step | None = None,
    decay: float = 0.0,
    nll_betas: tuple[float, float] = (0.0, 0.0),
    average: bool = False,
) -> th.Tensor:
    """
    One gradient step on each batch.

    :param ensemble: Trained in place
    :param inputs: (obs, action), raw, ``(n, obs_dim + action_dim)``
    :param targets: (reward, next_obs - obs), raw, ``(n, 1 + obs_dim)``
    :param batches: For each step the rows of each member, ``(n_members, batch)``
    :param n_steps: Number of batches
    :param compiled_step: What :func:`train_step` was compiled to, for batches of 256
    :param decay: Share of the learning rate by which weights shrink at each step (see :func:`weight_decay`)
    :param nll_betas: See :meth:`Ensemble.loss`
    :param average: Whether to end in the mean of the weights of the second half of these steps, which jump less (Izmailov
        et al. 2018)
    :return: Loss of each step, ``(n_steps,)``
    """
    state, losses = _train_state(ensemble), []
    parameters, half = list(state.parameters.values()), n_steps // 2
    for i, (rows, of_step) in enumerate(zip(batches, _numbers(ensemble, n_steps, decay, nll_betas).unbind(), strict=True)):
        x, y = (array.index_select(0, rows.reshape(-1)).view(*rows.shape, -1) for array in (inputs, targets))
        step = compiled_step if compiled_step is not None and rows.shape[1] == BATCH_SIZE else train_step
        losses.append(step(ensemble, state, ensemble.unit_inputs(x), ensemble.unit_targets(y), of_step))
        if average and i == half:
            means = [parameter.clone() for parameter in parameters]
        elif average and i > half:
            for mean, parameter in zip(means, parameters, strict=True):
                mean.lerp_(parameter, 1 / (i - half + 1))
    if average:
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.copy_(mean)
    count_steps(ensemble.optimizer, n_steps)
    return th.stack(losses)


@th.no_grad()
def holdout_errors(ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """
    Mean squared error in the ensemble's units, linear beyond five of them: a handful of jumps do not decide which member is
    the best.

    :param ensemble: Not changed
    :param inputs: (obs, action), raw, the same for every member, ``(n, obs_dim + action_dim)``
    :param targets: (reward, next_obs - obs), raw, ``(n, 1 + obs_dim)``
    :return: Of each member, ``(n_members,)``
    """
    mean, _ = ensemble(ensemble.unit_inputs(inputs).expand(ensemble.n_members, -1, -1))
    return (huber(mean - ensemble.unit_targets(targets)) * ensemble.varies).mean(dim=(1, 2))


@th.no_grad()
def holdout_nll(ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """
    Negative log-likelihood, times two and without its constant, averaged over rows and dimensions. Linear beyond five standard
    deviations, for the reward too: a rare one does not decide.

    :param ensemble: Not changed
    :param inputs: (obs, action), raw, the same for every member, ``(n, obs_dim + action_dim)``
    :param targets: (reward, next_obs - obs), raw, ``(n, 1 + obs_dim)``
    :return: Of each member, ``(n_members,)``
    """
    mean, log_var = ensemble(ensemble.unit_inputs(inputs).expand(ensemble.n_members, -1, -1))
    z = (ensemble.unit_targets(targets) - mean) * th.exp(-0.5 * log_var)
    return ((huber(z) + log_var) * ensemble.varies).mean(dim=(1, 2))


@th.no_grad()
def r2(ensemble: Ensemble, inputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """
    :param ensemble: Not changed
    :param inputs: (obs, action), raw, ``(n, obs_dim + action_dim)``
    :param targets: (reward, next_obs - obs), raw, ``(n, 1 + obs_dim)``
    :return: Share of the variance of each target that the mean of the elites explains, ``(1 + obs_dim,)``; NaN where they
        vary by no more than their rounding
    """
    mean, _ = ensemble(ensemble.unit_inputs(inputs).expand(ensemble.n_members, -1, -1))
    truth = ensemble.unit_targets(targets)
    residual = (mean[ensemble.elites.long()].mean(dim=0) - truth).square().mean(dim=0)
    least = precision(targets, operands_of(inputs, targets))
    varies = ensemble.varies & (targets.double().std(dim=0, correction=0) > least)
    return th.where(varies, 1 - residual / truth.var(dim=0, correction=0), th.nan)


class BestWeights:
    """
    The best weights of each member so far, by a score on held-out rows.

    :param ensemble: Whose weights to keep; those it has now are kept until a member improves
    :param min_improvement: By how much a score must fall
    """

    def __init__(self, ensemble: Ensemble, min_improvement: float = 0.0) -> None:
        self.ensemble = ensemble
        self.min_improvement = min_improvement
        self.score = th.full((ensemble.n_members,), th.inf, device=ensemble.elites.device)
        self.saved = [parameter.detach().clone() for parameter in self._parameters()]

    def _parameters(self) -> list[th.Tensor]:
        return [*self.ensemble.weights, *self.ensemble.biases]

    def update(self, score: th.Tensor) -> bool:
        """
        :param score: Of each member, the lower the better, ``(n_members,)``
        :return: Whether any member improved
        """
        improved = score < self.score - self.min_improvement
        for saved, parameter in zip(self.saved, self._parameters(), strict=True):
            saved[improved] = parameter.detach()[improved]
        self.score[improved] = score[improved]
        return bool(improved.any())

    @th.no_grad()
    def restore(self) -> None:
        """Put each member back to its own best weights."""
        for saved, parameter in zip(self.saved, self._parameters(), strict=True):
            parameter.copy_(saved)


def _train_within_budget(
    ensemble: Ensemble,
    inputs: th.Tensor,
    targets: th.Tensor,
    train: th.Tensor,
    holdout: th.Tensor,
    n_steps: int,
    compiled_step: Step | None,
) -> tuple[float, int]:
    """
    Gradient steps on batches that each member draws from all rows but those held out. The first training sees few rows
    hundreds of times: it ends early where the likelihood of held-out rows gets no better, and each member gets its best
    weights back. Later ones end in the mean of the weights of their second half.

    :return: Mean loss, and the number of gradient steps
    """
    decay, is_first = weight_decay(len(train)), not ensemble.is_fitted
    best = BestWeights(ensemble) if is_first else None
    losses: list[th.Tensor] = []
    since_improvement = 0
    while len(losses) < n_steps and since_improvement < PATIENCE:
        n = min(STEPS_PER_LOOK, n_steps - len(losses)) if is_first else n_steps
        batches = draw_batches(train, ensemble.n_members, n)
        losses += train_on(ensemble, inputs, targets, batches, n, compiled_step, decay, NLL_BETAS, not is_first).unbind()
        if best is not None:
            improved = best.update(holdout_nll(ensemble, inputs[holdout], targets[holdout]))
            since_improvement = 0 if improved else since_improvement + 1
    if best is not None:
        best.restore()
    loss = th.stack(losses).mean()
    _refuse_divergence(loss)
    return loss.item(), len(losses)


def _train_until_no_improvement(
    ensemble: Ensemble,
    inputs: th.Tensor,
    targets: th.Tensor,
    train: th.Tensor,
    holdout: th.Tensor,
    compiled_step: Step | None,
) -> tuple[float, int]:
    """
    Epochs over the same bootstraps until five pass in which no member improves on held-out rows; each member gets its best
    weights back (paper, section 5 and Appendix C; details of the authors' release).

    :return: Mean loss of the last epoch, and the number of gradient steps
    """
    # In logarithms a share is a difference
    best = BestWeights(ensemble, -math.log(1 - MIN_IMPROVEMENT))
    indices = train[bootstrap(len(train), ensemble.n_members, inputs.device)]
    # With less data than that, each pass is one step: more rows would be the same ones again
    batch_size = min(BATCH_SIZE, len(train))
    n_passes = math.ceil(MIN_EPOCH_ROWS / max(len(train), BATCH_SIZE))
    since_improvement = n_steps = 0
    while since_improvement < PATIENCE:
        epoch = th.cat([shuffle_rows(indices) for _ in range(n_passes)], dim=1)
        batches = epoch.split(batch_size, dim=1)
        loss = train_on(ensemble, inputs, targets, batches, len(batches), compiled_step).mean()
        n_steps += len(batches)
        mse = holdout_errors(ensemble, inputs[holdout], targets[holdout])
        _refuse_divergence(loss + mse.sum())
        since_improvement = 0 if best.update(mse.log()) else since_improvement + 1
    best.restore()
    return loss.item(), n_steps


def _refuse_divergence(value: th.Tensor) -> None:
    if not value.isfinite():
        raise DivergenceError(
            "Training of the dynamics model diverged: its error is not finite. Its weights are those from before. Lower "
            "`model_learning_rate`."
        )


def fit(
    ensemble: Ensemble,
    inputs: th.Tensor,
    targets: th.Tensor,
    n_steps: int | None = None,
    compiled_step: Step | None = None,
) -> FitResult:
    """
    Train the ensemble from its present weights on all transitions but those held out, in units refitted to them.

    :param ensemble: Trained in place
    :param inputs: (obs, action), raw, ``(n, obs_dim + action_dim)``, in the precision that the data have
    :param targets: (reward, next_obs - obs), raw, ``(n, 1 + obs_dim)``, in the precision that the data have
    :param n_steps: Gradient steps (see :func:`budget`); the first training makes fewer if held-out transitions become no
        likelier. None: as many epochs as the paper's rule takes, until no member improves on held-out transitions for 5
        epochs. An epoch is one pass over the training rows, or, if they are fewer than 4,000, as many as make 16 gradient
        steps.
    :param compiled_step: What :func:`train_step` was compiled to
    :return: What was done, and how good the model is
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

    before = deepcopy([ensemble.state_dict(), ensemble.optimizer.state_dict()])
    try:
        ensemble.set_stats(inputs, targets)
        ensemble.train()
        if n_steps is None:
            train, holdout = split_at_random(len(inputs), inputs.device)
            loss, n_steps = _train_until_no_improvement(ensemble, inputs, targets, train, holdout, compiled_step)
        else:
            train, holdout = split_for_good(len(inputs), inputs.device)
            holdout = holdout[:: math.ceil(len(holdout) / MAX_MEASURED)]
            loss, n_steps = _train_within_budget(ensemble, inputs, targets, train, holdout, n_steps, compiled_step)
        errors = holdout_errors(ensemble, inputs[holdout], targets[holdout])
        _refuse_divergence(errors.sum())
    # An interruption too: what is saved then must not be half-trained
    except BaseException:
        ensemble.load_state_dict(before[0])
        ensemble.optimizer.load_state_dict(before[1])
        ensemble.eval()
        raise
    ensemble.eval()
    ensemble.elites.copy_(errors.argsort()[: len(ensemble.elites)])
    ensemble.n_fits += 1
    return FitResult(loss, n_steps, r2(ensemble, inputs[holdout], targets[holdout]), len(holdout))
