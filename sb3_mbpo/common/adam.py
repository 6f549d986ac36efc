"""Adam (Kingma & Ba 2015) as a function that can be part of a compiled graph, on the state of ``torch.optim.Adam``."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch as th

Tensors = dict[str, th.Tensor]

# Options of torch.optim.Adam that change its arithmetic to what `adam_step` does not do
_UNKNOWN_OPTIONS = ("amsgrad", "maximize", "decoupled_weight_decay", "differentiable")


class TrainState(NamedTuple):
    """
    Parameters and what Adam keeps for each of them, by the parameters' names.

    :param parameters: Parameters
    :param first: Running mean of the gradient (``exp_avg``)
    :param second: Running mean of its square (``exp_avg_sq``)
    """

    parameters: Tensors
    first: Tensors
    second: Tensors


def is_plain_adam(optimizer: th.optim.Optimizer, parameters: Sequence[th.Tensor]) -> bool:
    """
    :param optimizer: Any optimizer
    :param parameters: What it should optimise
    :return: Whether its steps are those of :func:`adam_step`
    """
    if type(optimizer) is not th.optim.Adam or len(optimizer.param_groups) != 1:
        return False
    group = optimizer.param_groups[0]
    return not any(group.get(option) for option in _UNKNOWN_OPTIONS) and list(map(id, group["params"])) == list(
        map(id, parameters)
    )


def live_tensors(optimizer: th.optim.Optimizer) -> tuple[list[th.Tensor], list[th.Tensor], list[th.Tensor]]:
    """
    The optimizer's own tensors, not copies. Before the first step its state is made as the optimizer itself would.

    :param optimizer: One for which :func:`is_plain_adam` holds
    :return: Its parameters, detached, and the first and the second moment of each, in its order
    """
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = th.tensor(0.0)
            state["exp_avg"] = th.zeros_like(parameter)
            state["exp_avg_sq"] = th.zeros_like(parameter)
    states = [optimizer.state[parameter] for parameter in parameters]
    return (
        [parameter.detach() for parameter in parameters],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
    )


def count_steps(optimizer: th.optim.Optimizer, n_steps: int) -> None:
    """
    :param optimizer: One for which :func:`is_plain_adam` holds
    :param n_steps: How many steps :func:`adam_step` has made for it
    """
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter]["step"] += n_steps


def coefficients(optimizer: th.optim.Optimizer, n_steps: int) -> th.Tensor:
    """
    The numbers of the next steps, computed in float64. They are tensors so that none of them is compiled in.

    :param optimizer: One for which :func:`is_plain_adam` holds
    :param n_steps: Number of steps
    :return: ``(n_steps, 7)``, float32: the size of the step, the bias correction of the root of the second moment, the
        weights of the new gradient in the first moment and of the old and of the new one in the second, epsilon, weight decay
    """
    group = optimizer.param_groups[0]
    beta1, beta2 = (float(beta) for beta in group["betas"])
    done = float(optimizer.state[group["params"][0]].get("step", 0))
    steps = done + np.arange(1, n_steps + 1)
    table = np.empty((n_steps, 7))
    table[:, 0] = float(group["lr"]) / (1 - beta1**steps)
    table[:, 1] = np.sqrt(1 - beta2**steps)
    table[:, 2:] = 1 - beta1, beta2, 1 - beta2, group["eps"], group["weight_decay"]
    return th.as_tensor(table, dtype=th.float32, device=group["params"][0].device)


def adam_step(state: TrainState, gradients: Tensors, coefficients: th.Tensor) -> None:
    """
    One step, in place.

    :param state: Changed
    :param gradients: Of the loss, in the order of the parameters
    :param coefficients: One row of :func:`coefficients`
    """
    step_size, correction, new_first, old_second, new_second, eps, weight_decay = coefficients.unbind()
    tensors = zip(*(each.values() for each in (*state, gradients)), strict=True)
    for parameter, first, second, gradient in tensors:
        gradient = gradient + weight_decay * parameter
        first.lerp_(gradient, new_first)
        second.mul_(old_second).add_(new_second * gradient.square())
        parameter.sub_(step_size * first / (second.sqrt() / correction + eps))
