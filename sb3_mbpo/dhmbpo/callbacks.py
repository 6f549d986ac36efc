"""What DHMBPO takes over from each training of the model."""

from typing import TYPE_CHECKING

from sb3_mbpo.common.callbacks import DynamicsCallback
from sb3_mbpo.dynamics.rollouts import Transitions

if TYPE_CHECKING:
    from sb3_mbpo.dhmbpo.dhmbpo import DHMBPO


class DHMBPOCallback(DynamicsCallback):
    """
    After each training of the model, the policy standardises observations as the model does, and the agent knows from which
    real states to start.

    :param verbose: Verbosity level: 0 for no output, 1 for info messages
    """

    model: "DHMBPO"

    def _needs_rollouts(self) -> bool:
        # Where updates start, also if the model is not trained again (after loading without the replay buffer)
        return True

    def _use_model(self, transitions: Transitions) -> None:
        agent, dim = self.model, transitions.obs.shape[1]
        agent.policy.set_statistics(agent.dynamics.input_mean[:dim], agent.dynamics.input_std[:dim])
        agent.real_states, agent.model_env = self._with_goals(transitions).obs, self.model_env
