"""Whether DHMBPO's own arguments are in their ranges."""

from typing import TYPE_CHECKING, Any

from sb3_mbpo.common.adam import is_plain_adam
from sb3_mbpo.common.arguments import check_number, check_whole
from sb3_mbpo.common.update import optimizers
from sb3_mbpo.dhmbpo.policies import DHMBPOPolicy

if TYPE_CHECKING:
    from sb3_mbpo.dhmbpo import DHMBPO


def check_arguments(agent: "DHMBPO") -> None:
    """
    :param agent: With the arguments as its attributes
    :raises ValueError: if one of those that only DHMBPO has, or needs in another range, is not in it
    """
    check_whole(agent, "training_horizon", "distribution_horizon")
    allowed = "a number from 0 to below 1: the bounds of the critics are those of an endless sum of discounted rewards"
    check_number(agent, "gamma", lambda value: 0 <= value < 1, allowed)
    if not issubclass(agent.policy_class, DHMBPOPolicy):
        raise ValueError(
            f"`policy` must be 'MlpPolicy', 'MultiInputPolicy' or a subclass of DHMBPOPolicy, not {agent.policy_class}"
        )
    # Where `load` or a user has set them
    for name, value, only in (
        ("use_sde", agent.use_sde, False),
        ("n_steps", agent.n_steps, 1),
        ("target_update_interval", agent.target_update_interval, 1),
    ):
        if value != only:
            raise ValueError(f"`{name}` has no meaning in DHMBPO: leave it at {only!r}, not {value!r}")
    vec_normalize = agent.get_vec_normalize_env()
    if vec_normalize is not None and vec_normalize.norm_obs:
        raise ValueError(
            "`env` normalises observations (`VecNormalize`), but the policy of DHMBPO does so itself, with statistics that "
            "are saved with it: leave the wrapper out, or pass `norm_obs=False` to it. Rewards need no normalisation either."
        )


def check_optimizers(agent: "DHMBPO") -> None:
    """
    :param agent: With its networks
    :raises ValueError: if its updates do not know an optimizer
    """
    ent_coef = [] if agent.ent_coef_optimizer is None else [[agent.log_ent_coef]]
    optimized: list[list[Any]] = [list(agent.actor.parameters()), list(agent.policy.critic.parameters()), *ent_coef]
    for optimizer, parameters in zip(optimizers(agent), optimized, strict=True):
        if not is_plain_adam(optimizer, parameters):
            raise ValueError(
                "`policy_kwargs`: DHMBPO's updates know Adam only (`optimizer_class=torch.optim.Adam`, without amsgrad, "
                f"maximize or decoupled weight decay), not {optimizer}"
            )
