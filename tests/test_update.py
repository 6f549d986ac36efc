"""The gradient update as functions: the same numbers as ``SAC.train``, compiled or not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.sac.policies import SACPolicy
from torch import nn
from torch.distributions import normal

from sb3_mbpo.common.buffers import combine
from sb3_mbpo.common.compilation import compiled
from sb3_mbpo.common.update import not_covered, run_updates, sac_update, try_update
from tests.envs import CountingEnv

LOSSES = ["train/critic_loss", "train/actor_loss", "train/ent_coef_loss", "train/ent_coef"]
BATCH_SIZE, OBS_SHAPE, ACTION_DIM = 32, (3,), 2


def make_sac(policy="MlpPolicy", obs_shape=OBS_SHAPE, policy_kwargs=None, **kwargs):
    env = CountingEnv(obs_shape=obs_shape, action_dim=ACTION_DIM)
    policy_kwargs = {"net_arch": [16, 16], **(policy_kwargs or {})}
    agent = SAC(policy, env, policy_kwargs=policy_kwargs, seed=0, device="cpu", buffer_size=10, **kwargs)
    agent.set_logger(configure(None, []))
    return agent


def make_data(n_updates, obs_shape=OBS_SHAPE, discounts=False, seed=0):
    """Batches, and noise for the actor in observations and successors."""
    rng = np.random.default_rng(seed)

    def gauss(*shape):
        return th.as_tensor(rng.normal(size=(n_updates, BATCH_SIZE, *shape)), dtype=th.float32)

    samples = ReplayBufferSamples(
        observations=gauss(*obs_shape),
        actions=gauss(ACTION_DIM).tanh(),
        next_observations=gauss(*obs_shape),
        dones=(gauss(1) > 1).float(),
        rewards=3 * gauss(1),
        discounts=0.9 + 0.05 * gauss(1).tanh() if discounts else None,
    )
    return samples, th.stack([gauss(ACTION_DIM), gauss(ACTION_DIM)])


def sb3_updates(agent, samples, noise):
    """SAC's own ``train``, made to use these batches and this noise."""
    rows = [combine(lambda column, i=i: column[i], samples) for i in range(len(samples.rewards))]
    batches = iter(rows)
    # SB3 draws for the observations first, then for their successors
    draws = iter(noise.transpose(0, 1).flatten(0, 1))
    agent.replay_buffer = SimpleNamespace(sample=lambda batch_size, env: next(batches))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normal, "_standard_normal", lambda shape, dtype, device: next(draws))
        agent.train(len(rows), BATCH_SIZE)
    assert next(draws, None) is None
    return [agent.logger.name_to_value.get(key, 0.0) for key in LOSSES]


def state_of(agent):
    """All that an update changes: weights, Adam's state, entropy coefficient."""
    tensors = dict(agent.policy.state_dict())
    optimizers = {"actor": agent.actor.optimizer, "critic": agent.critic.optimizer, "ent_coef": agent.ent_coef_optimizer}
    for name, optimizer in optimizers.items():
        if optimizer is not None:
            for i, state in optimizer.state_dict()["state"].items():
                tensors.update({f"{name}.{i}.{key}": value for key, value in state.items()})
    if agent.log_ent_coef is not None:
        tensors["log_ent_coef"] = agent.log_ent_coef.detach().clone()
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(ours, sb3s):
    assert ours.keys() == sb3s.keys()
    for name in sb3s:
        # Relative to the largest number in a tensor: what is nearly 0 is a difference of rounded numbers
        scale = sb3s[name].abs().max().clamp(min=1e-6).item()
        np.testing.assert_allclose(ours[name] / scale, sb3s[name] / scale, atol=1e-5, rtol=0, err_msg=name)


class ParametricActivation(nn.PReLU):
    """An activation with a weight of its own."""


CONFIGURATIONS = {
    "default": {},
    "no hidden layer": dict(policy_kwargs={"net_arch": []}),
    "two architectures": dict(policy_kwargs={"net_arch": {"pi": [8], "qf": [24, 12, 6]}}),
    "tanh": dict(policy_kwargs={"activation_fn": nn.Tanh}),
    "ELU": dict(policy_kwargs={"activation_fn": nn.ELU}),
    "activation with a weight": dict(policy_kwargs={"activation_fn": ParametricActivation}),
    "one critic": dict(policy_kwargs={"n_critics": 1}),
    "five critics": dict(policy_kwargs={"n_critics": 5}),
    "shared extractor": dict(policy_kwargs={"share_features_extractor": True}),
    "Adam's options": dict(policy_kwargs={"optimizer_kwargs": dict(weight_decay=0.05, betas=(0.7, 0.9), eps=1e-3)}),
    "learning rate": dict(learning_rate=lambda progress: 1e-2 * progress),
    "fixed entropy coefficient": dict(ent_coef=0.3),
    "no entropy": dict(ent_coef=0.0),
    "negative entropy coefficient": dict(ent_coef=-0.1),
    "entropy coefficient's start": dict(ent_coef="auto_0.1", target_entropy=-0.7),
    "target interval": dict(target_update_interval=3, tau=0.3),
    "hard target updates": dict(target_update_interval=2, tau=1.0),
    "gamma": dict(gamma=0.5),
    "shaped observations": dict(obs_shape=(2, 3)),
    "n-step returns": dict(n_steps=3),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("n_updates", [1, 100])
def test_same_numbers_as_sb3(name, n_updates):
    configuration = CONFIGURATIONS[name]
    ours, sb3s = make_sac(**configuration), make_sac(**configuration)
    assert not_covered(ours) is None
    start = state_of(ours)
    data = make_data(n_updates, configuration.get("obs_shape", OBS_SHAPE), "n_steps" in configuration)
    for agent in (ours, sb3s):
        agent._current_progress_remaining = 0.6
    expected_losses = sb3_updates(sb3s, *data)
    ours._update_learning_rate([ours.actor.optimizer, ours.critic.optimizer, *filter(None, [ours.ent_coef_optimizer])])
    losses = run_updates(ours, *data).mean(dim=0)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, atol=1e-6)
    assert_equal(state_of(ours), state_of(sb3s))
    # It is not that nothing happened
    assert all(
        not th.equal(start[key], value) for key, value in state_of(ours).items() if key in start and "target" not in key
    )


def test_the_two_ways_alternate():
    """One goes on from where the other stopped, Adam's state included."""
    mixed, sb3s = make_sac(), make_sac()
    for i in range(4):
        data = make_data(5, seed=i)
        sb3_updates(sb3s, *data)
        if i % 2 == 0:
            run_updates(mixed, *data)
        else:
            sb3_updates(mixed, *data)
    assert_equal(state_of(mixed), state_of(sb3s))


@pytest.mark.parametrize("name", ["default", "fixed entropy coefficient"])
def test_compiled_it_gives_the_same_numbers(name):
    """100 updates, in calls of several; each agent is compiled for itself or finds the graph of an equal one."""
    ours, sb3s = (make_sac(**CONFIGURATIONS[name]) for _ in range(2))
    start = state_of(ours)
    try_update(ours, BATCH_SIZE, compiled(sac_update, "cpu"))
    assert_equal({key: state_of(ours)[key] for key in start}, start)
    for i in range(4):
        data = make_data(25, seed=i)
        expected_losses = sb3_updates(sb3s, *data)
        losses = run_updates(ours, *data, compiled(sac_update, "cpu")).mean(dim=0)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, atol=1e-6)
    assert_equal(state_of(ours), state_of(sb3s))


def test_interrupted_it_changes_nothing():
    agent, calls = make_sac(), []

    def interrupted(*arguments):
        calls.append(sac_update(*arguments))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return calls[-1]

    run_updates(agent, *make_data(2))
    before = state_of(agent)
    with pytest.raises(KeyboardInterrupt):
        run_updates(agent, *make_data(5), interrupted)
    after = state_of(agent)
    assert all(th.equal(before[name], after[name]) for name in before)


class OwnPolicy(SACPolicy):
    pass


class OwnExtractor(FlattenExtractor):
    pass


class OwnAdam(th.optim.Adam):
    pass


@pytest.mark.parametrize(
    "kwargs, why",
    [
        (dict(use_sde=True), "gSDE"),
        (dict(policy=OwnPolicy), "OwnPolicy"),
        (dict(policy_kwargs={"features_extractor_class": OwnExtractor}), "OwnExtractor"),
        (dict(policy_kwargs={"optimizer_class": OwnAdam}), "OwnAdam"),
        (dict(policy_kwargs={"optimizer_class": th.optim.SGD}), "SGD"),
        (dict(policy_kwargs={"optimizer_class": th.optim.AdamW}), "AdamW"),
        (dict(policy_kwargs={"optimizer_kwargs": {"amsgrad": True}}), "amsgrad: True"),
        (dict(policy_kwargs={"optimizer_kwargs": {"maximize": True}}), "maximize: True"),
        (dict(policy_kwargs={"optimizer_kwargs": {"decoupled_weight_decay": True}}), "decoupled_weight_decay: True"),
        (dict(policy_kwargs={"optimizer_kwargs": {"differentiable": True}}), "differentiable: True"),
        (dict(policy_kwargs={"activation_fn": nn.Dropout}), "Dropout acts at random"),
    ],
    ids=str,
)
def test_what_is_not_covered(kwargs, why):
    assert why in not_covered(make_sac(**kwargs))


def test_what_the_user_changed_afterwards_is_not_covered():
    agent = make_sac()
    agent.critic.optimizer = th.optim.Adam([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(agent.critic.parameters())])
    assert "not a plain Adam" in not_covered(agent)
    agent = make_sac()
    agent.actor.optimizer = th.optim.Adam(list(agent.actor.parameters())[:-1])
    assert "not a plain Adam" in not_covered(agent)
    agent = make_sac()
    agent.critic.qf0.append(nn.BatchNorm1d(1))
    assert "statistics" in not_covered(agent)


def test_parameters_that_sb3_treats_differently_are_not_covered():
    agent = make_sac()
    agent.actor.latent_pi.requires_grad_(False)
    assert "frozen" in not_covered(agent)
    sb3_updates(agent, *make_data(2))
    agent.actor.requires_grad_(True)
    run_some = make_data(2, seed=1)
    sb3_updates(agent, *run_some)
    assert "more steps" in not_covered(agent)
    agent = make_sac()
    next(agent.critic.parameters()).register_hook(lambda gradient: gradient.clamp(-1, 1))
    assert "hook" in not_covered(agent)
