"""Whether the model ends episodes where the environment does."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch as th

from sb3_mbpo.dynamics.rollouts import Transitions, concatenate

if TYPE_CHECKING:
    from sb3_mbpo.common.model_env import ModelEnv


class Terminations(NamedTuple):
    """
    Of real transitions, a timeout being none.

    :param real: Which were terminal, bool, ``(n,)``
    :param model: Probability that the model ends there, ``(n,)``
    """

    real: np.ndarray
    model: np.ndarray

    def foreseen(self) -> float:
        """
        :return: Probability that the model ends where an episode ended; NaN if none did
        """
        return float(self.model[self.real].mean()) if self.real.any() else float("nan")

    def invented(self) -> float:
        """
        :return: Expected number of transitions that the model ends, of those after which the episode went on
        """
        return float(self.model[~self.real].sum())


def terminations(model_env: "ModelEnv", trajectories: Sequence[Transitions], n_samples: int = 20) -> Terminations:
    """
    One step of the model from each real state with the recorded action, many times. A model that does not see where
    episodes end cannot teach a policy to avoid it. Not in the paper. What the model predicts to be infinite or NaN ends
    nothing.

    :param model_env: The model, and its termination function, known or learned
    :param trajectories: Real ones. The model seems better on those that it was trained on.
    :param n_samples: Of each transition, at least 1
    :return: What ended really, and under the model
    """
    data = concatenate(trajectories)
    ended = th.zeros(len(data.obs), device=data.obs.device)
    for _ in range(n_samples):
        finite, predicted = model_env.step(data.obs, data.actions)
        ended[finite] += predicted.terminated.float()
    return Terminations(data.terminated.cpu().numpy(), (ended / n_samples).cpu().numpy())
