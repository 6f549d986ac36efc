"""What DHMBPO takes over from each training of the model."""

from typing import TYPE_CHECKING

from sb3_mbpo.common.callbacks import DynamicsCallback
from sb3_mbpo.dynamics.rollouts import Transitions

if TYPE_CHECKING:
    from sb3_mbpo.dhmbpo.dhmbpo import DHMBPO


class DHMBPOCallback(DynamicsCallback):
    """
    After each training of the model, the agent knows the model, and from which real states to start.

    :param verbose: Verbosity level: 0 for no output, 1 for info messages
    """

    model: "DHMBPO"

    def _needs_rollouts(self) -> bool:
        # Where updates start, also if the model is not trained again (after loading without the replay buffer)
        return True

    def _use_model(self, transitions: Transitions) -> None:
        self.model.real_states, self.model.model_env = self._with_goals(transitions).obs, self.model_env
