"""Value expansion: the targets by hand and by an oracle in float64 NumPy, and agents that learn with them."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.distributions import normal

from sb3_mbpo import MBPO
from sb3_mbpo.common import compilation
from sb3_mbpo.common.buffers import combine, real_transitions
from sb3_mbpo.common.callbacks import DynamicsCallback
from sb3_mbpo.common.errors import DivergenceError
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.common.update import networks_state, not_covered
from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.mbpo import mbpo, value_expansion
from sb3_mbpo.mbpo.value_expansion import expanded_loss, expanded_targets, pairs, roll_out
from tests.agents import make_agent
from tests.envs import CountingEnv, GoalEnv, PointEnv
from tests.test_faults import same
from tests.test_features import FEATURES, SEEDED, Normalizing, architecture, assert_same, make, never
from tests.test_update import assert_equal, state_of


def linear_ensemble(matrix, bias, n_members=3):
    """
    (reward, next_obs - obs) = (obs, action) @ matrix + bias, without noise, by every member.

    :param matrix: ``(obs_dim + action_dim, 1 + obs_dim)``
    :param bias: ``(1 + obs_dim,)``
    """
    matrix, bias = (th.as_tensor(each, dtype=th.float32) for each in (matrix, bias))
    ensemble = Ensemble(matrix.shape[1] - 1, matrix.shape[0] - matrix.shape[1] + 1, (), n_members, n_members - 1, 1e-3)
    with th.no_grad():
        ensemble.min_log_var.fill_(-80)
        ensemble.weights[0].copy_(th.cat([matrix, th.zeros_like(matrix)], dim=1))
        ensemble.biases[0].copy_(th.cat([bias, th.full_like(bias, -90)]))
        ensemble.n_fits.fill_(1)
    return ensemble


def column(*values):
    return th.tensor(values, dtype=th.float32)[:, None]


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_targets_by_hand():
    """
    The model adds the action, which is 1, to the state s, and gives the reward 10 + s; beyond 3.5 it is over. gamma is 1/2 and
    H is 2. The action's log-density is -s and alpha is 2: an entropy bonus of 2 s. The lowest target critic is 8 + 4 s.
    """
    agent = make_agent(PointEnv(), gamma=0.5, termination_fn=lambda obs, action, next_obs: next_obs[:, 0] > 3.5)
    agent.dynamics = linear_ensemble([[1, 0], [0, 1]], [10, 0])
    start, terminal = column(0, 2, 3, 0), th.tensor([False, False, False, True])
    rollouts = roll_out(ModelEnv(agent, agent.env), lambda obs: (th.ones_like(obs), -obs), start, terminal, 2)
    # The second rollout ends at its second step, the third at its first; the fourth does not begin
    assert rollouts.obs.squeeze(2).tolist() == [[0, 2, 3, 0], [1, 3, 4, 0], [2, 4, 4, 0]]
    assert rollouts.rewards.squeeze(2).tolist() == [[10, 12, 13, 0], [11, 13, 0, 0]]
    assert rollouts.discounts.squeeze(2).tolist() == [[0.5, 0.5, 0, 0], [0.5, 0, 0, 0]]
    assert rollouts.is_step.squeeze(2).tolist() == [[True, True, True, False], [True, True, False, False]]
    last_values = 8 + 4 * rollouts.obs[-1]
    discounts = column(0.5, 0.5, 0.5, 0)
    targets = expanded_targets(column(5, 5, 5, 5), discounts, rollouts, last_values, th.tensor([2.0])).squeeze(2)
    # First row, backwards: V(2) = 8 + 4 * 2 + 2 * 2 = 20; Q(1) = 11 + 20 / 2 = 21, V(1) = 21 + 2 * 1 = 23;
    # Q(0) = 10 + 23 / 2 = 21.5, V(0) = 21.5 + 0; and of the real transition 5 + 21.5 / 2 = 15.75.
    assert targets[:, 0].tolist() == [15.75, 21.5, 21]
    # Q(3) = 13, V(3) = 13 + 6; Q(2) = 12 + 19 / 2 = 21.5, V(2) = 21.5 + 4; 5 + 25.5 / 2
    assert targets[:, 1].tolist() == [17.75, 21.5, 13]
    # Q(3) = 13, V(3) = 19; 5 + 19 / 2
    assert targets[:2, 2].tolist() == [14.5, 13]
    assert targets[0, 3] == 5
    # What critics learn: four times (state, action) of the real transition, then the steps that there are
    obs, actions, is_pair = pairs(column(-1, -2, -3, -4), column(0, 0, 0, 0), rollouts)
    assert obs.squeeze(1).tolist() == [-1, -2, -3, -4, 0, 2, 3, 0, 1, 3, 4, 0]
    assert actions.squeeze(1).tolist() == [0] * 4 + [1] * 8
    assert is_pair.squeeze(1).tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0]
    # Two critics that say 0 and 1 everywhere: half of each mean over 4 * 3 pairs
    values = th.stack([th.zeros(12, 1), th.ones(12, 1)])
    learned = [15.75, 17.75, 14.5, 5, 21.5, 21.5, 13, 21, 13]
    expected = sum(target**2 + (target - 1) ** 2 for target in learned) / 12 / 2
    assert expanded_loss(values, targets.reshape(12, 1), is_pair).item() == pytest.approx(expected)


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_predictions_that_are_not_finite_end_a_rollout_before(horizon, broken, monkeypatch):
    """From the state 1 on, the prediction is broken: the rollout's last value is that of 1, whatever H is."""
    sample = Ensemble.sample

    def broken_sample(self, obs, actions):
        next_obs, rewards = sample(self, obs, actions)
        return next_obs, th.where(obs[:, 0] > 0.5, broken, rewards)

    monkeypatch.setattr(Ensemble, "sample", broken_sample)
    agent = make_agent(PointEnv(), gamma=0.5, termination_fn=never)
    agent.dynamics = linear_ensemble([[1, 0], [0, 1]], [10, 0])
    rollouts = roll_out(
        ModelEnv(agent, agent.env), lambda obs: (th.ones_like(obs), -obs), column(0, 1), th.tensor([False, False]), horizon
    )
    assert all(th.isfinite(each).all() for each in rollouts)
    assert rollouts.is_step.sum(dim=(0, 2)).tolist() == [1, 0] and (rollouts.obs[1:] == 1).all()
    last_values = 8 + 4 * rollouts.obs[-1]
    targets = expanded_targets(column(5, 5), column(0.5, 0.5), rollouts, last_values, th.tensor([2.0])).squeeze(2)
    # V(1) = 12 + 2; Q(0) = V(0) = 10 + 14 / 2; 5 + 17 / 2
    assert targets[0].tolist() == [13.5, 12] and targets[1, 0] == 17


def test_gradients_only_where_there_is_a_pair():
    values, targets = th.randn(2, 12, 1, requires_grad=True), th.randn(12, 1)
    is_pair = (th.rand(12, 1) > 0.3).float()
    expanded_loss(values, targets, is_pair).backward()
    th.testing.assert_close(values.grad, (values.detach() - targets) * is_pair / 12)
    assert (values.grad[:, is_pair.squeeze(1) == 0] == 0).all() and 0 < is_pair.sum() < 12


def test_targets_have_no_gradient():
    """Of the actor: it is not moved by what critics learn."""
    agent = make_agent(real_ratio=1, value_expansion_horizon=2).learn(61)
    before = [parameter.grad.clone() for parameter in agent.actor.parameters()]
    seen = []
    minimize = value_expansion._minimize

    def watched(loss, optimizer):
        minimize(loss, optimizer)
        if optimizer is agent.critic.optimizer:
            seen.extend(parameter.grad.clone() for parameter in agent.actor.parameters())
            assert all(parameter.grad is None for parameter in agent.critic_target.parameters())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(value_expansion, "_minimize", watched)
        agent.train(1, 32)
    assert seen and all(th.equal(*each) for each in zip(seen, before, strict=True))


# --- Against an oracle ------------------------------------------------------------------------------------------------

N, OBS_DIM, ACTION_DIM, GAMMA, HORIZON = 24, 2, 1, 0.8, 3
MATRIX, BIAS = np.array([[0.3, -0.2, 0.1], [0.5, 0.3, -0.4], [1.0, 0.6, 0.5]]), np.array([0.4, 0.1, -0.1])


def is_over(next_obs):
    return np.abs(next_obs[..., 0]) > 1.3


def fixed_noise(*shape, **kwargs):
    """The same at every draw, so that both ways to make updates may draw in any order."""
    *_, n, dim = shape
    return th.as_tensor(np.random.default_rng(5).normal(size=(n, dim)), dtype=th.float32).expand(shape)


def layers(module):
    return [(layer.weight, layer.bias) for layer in module.modules() if isinstance(layer, th.nn.Linear)]


def as_numpy(agent):
    """All networks in float64."""

    def convert(module):
        return [tuple(tensor.detach().numpy().astype(np.float64) for tensor in layer) for layer in layers(module)]

    return SimpleNamespace(
        latent=convert(agent.actor.latent_pi),
        mu=convert(agent.actor.mu),
        log_std=convert(agent.actor.log_std),
        critics=[convert(critic) for critic in agent.critic.q_networks],
        targets=[convert(critic) for critic in agent.critic_target.q_networks],
        alpha=float(agent.log_ent_coef.detach().double().exp()),
    )


def mlp(x, net, last_relu=False):
    for i, (weight, bias) in enumerate(net):
        x = weight @ x + bias
        if last_relu or i < len(net) - 1:
            x = np.maximum(x, 0)
    return x


def act(nets, state, noise):
    latent = mlp(state, nets.latent, last_relu=True)
    mean, log_std = mlp(latent, nets.mu), np.clip(mlp(latent, nets.log_std), -20, 2)
    action = np.tanh(mean + np.exp(log_std) * noise)
    density = np.exp(-(noise**2) / 2) / (np.sqrt(2 * np.pi) * np.exp(log_std)) / (1 - action**2 + 1e-6)
    return action, np.log(density).sum()


def oracle(nets, samples, noise, horizon):
    """One row at a time: the paper's sum for every pair, and the critics' loss."""
    targets, loss = {}, 0.0
    for i in range(N):
        obs, action, state = (each[i].numpy().astype(np.float64) for each in samples[:3])
        visited, rewards, densities, ended = [(obs, action)], [float(samples.rewards[i])], [], bool(samples.dones[i])
        for _ in range(horizon):
            if ended:
                break
            action, density = act(nets, state, noise[i])
            visited.append((state, action))
            densities.append(density)
            reward, *change = np.concatenate([state, action]) @ MATRIX + BIAS
            state = state + change
            rewards.append(reward)
            ended = bool(is_over(state))
        if not ended:
            action, density = act(nets, state, noise[i])
            densities.append(density)
            value = min(mlp(np.concatenate([state, action]), net)[0] for net in nets.targets)
        for t, pair in enumerate(visited):
            target = sum(GAMMA ** (k - t) * rewards[k] for k in range(t, len(rewards)))
            # The action after the one of t is worth gamma
            target -= nets.alpha * sum(GAMMA ** (k + 1 - t) * densities[k] for k in range(t, len(densities)))
            if not ended:
                target += GAMMA ** (len(rewards) - t) * value
            targets[i, t] = target
            loss += sum((mlp(np.concatenate(pair), net)[0] - target) ** 2 for net in nets.critics)
    return targets, 0.5 * loss / (N * (horizon + 1))


@pytest.fixture
def known(monkeypatch):
    """An agent whose target critics are not its critics, a batch, and the noise of all draws."""
    agent = make_agent(
        CountingEnv(obs_shape=(OBS_DIM,)),
        real_ratio=1,
        value_expansion_horizon=HORIZON,
        gamma=GAMMA,
        ent_coef="auto_0.4",
        termination_fn=lambda obs, action, next_obs: is_over(next_obs),
    )
    agent.set_logger(configure(None, []))
    agent.dynamics = linear_ensemble(MATRIX, BIAS)
    generator = th.Generator().manual_seed(0)
    with th.no_grad():
        for parameter in [*agent.critic.parameters(), *agent.critic_target.parameters(), *agent.actor.parameters()]:
            parameter.copy_(th.randn(parameter.shape, generator=generator) / 2)

    def gauss(*shape):
        return th.randn(1, N, *shape, generator=generator)

    samples = ReplayBufferSamples(
        gauss(OBS_DIM), gauss(ACTION_DIM).tanh(), gauss(OBS_DIM), (gauss(1) > 1).float(), 2 * gauss(1), None
    )
    buffer = SimpleNamespace(
        sample=lambda n, env: combine(lambda each: each[0], samples), sample_batches=lambda n_batches, n, env: samples
    )
    monkeypatch.setattr(MBPO, "mixed_buffer", buffer)
    monkeypatch.setattr(normal, "_standard_normal", lambda shape, dtype, device: fixed_noise(*shape))
    monkeypatch.setattr(th, "randn", fixed_noise)
    monkeypatch.setattr(th, "randn_like", lambda tensor: fixed_noise(*tensor.shape))
    return agent, combine(lambda each: each[0], samples), fixed_noise(N, ACTION_DIM).double().numpy()


def ways(agent, n_updates, batch_size):
    env = ModelEnv(agent, agent.env)
    return {
        "modules": lambda: value_expansion.train(agent, env, n_updates, batch_size),
        "functions": lambda: value_expansion.run_expanded_updates(agent, env, n_updates, batch_size),
    }


@pytest.mark.parametrize("horizon", [0, 1, HORIZON])
@pytest.mark.parametrize("way", ["modules", "functions"])
def test_loss_against_float64(known, way, horizon):
    agent, samples, noise = known
    agent.value_expansion_horizon = horizon
    targets, expected = oracle(as_numpy(agent), samples, noise, horizon)
    # Rollouts of all lengths are in it: the real transition alone, and those that end on their way
    lengths = np.bincount([i for i, _ in targets], minlength=N)
    assert set(lengths) == set(range(1, horizon + 2))
    results = ways(agent, 1, N)[way]()
    assert results.shape == (1, 4) and results[0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_every_target_against_float64(known):
    agent, samples, noise = known
    expected, _ = oracle(as_numpy(agent), samples, noise, HORIZON)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(value_expansion, "expanded_loss", lambda *each: seen.append(each) or expanded_loss(*each))
        value_expansion.train(agent, ModelEnv(agent, agent.env), 1, N)
    _, targets, is_pair = seen[0]
    found = {(i, t): targets[t * N + i].item() for i in range(N) for t in range(HORIZON + 1) if is_pair[t * N + i].item() == 1}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-4, atol=1e-5)


def test_gradient_of_the_critics_against_finite_differences(known):
    """Targets held fixed: the gradient is that of the critics' own values."""
    agent, samples, noise = known
    nets, gradients = as_numpy(agent), []
    minimize = value_expansion._minimize

    def watched(loss, optimizer):
        minimize(loss, optimizer)
        if optimizer is agent.critic.optimizer:
            gradients.extend(
                [[tuple(tensor.grad.clone() for tensor in layer) for layer in layers(net)] for net in agent.critic.q_networks]
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(value_expansion, "_minimize", watched)
        value_expansion.train(agent, ModelEnv(agent, agent.env), 1, N)
    rng = np.random.default_rng(0)
    for critic in range(2):
        for layer, (weight, _) in enumerate(nets.critics[critic]):
            for _ in range(4):
                place, losses = tuple(rng.integers(size) for size in weight.shape), []
                for shift in (1e-5, -1e-5):
                    weight[place] += shift
                    losses.append(oracle(nets, samples, noise, HORIZON)[1])
                    weight[place] -= shift
                expected = (losses[0] - losses[1]) / 2e-5
                assert gradients[critic][layer][0][place].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


# --- Two ways, and SAC ------------------------------------------------------------------------------------------------

BOTH_WAYS = {
    "default": {},
    "horizon": dict(value_expansion_horizon=5),
    "n-step returns": dict(n_steps=3),
    "fixed entropy coefficient": dict(ent_coef=0.3),
    "target interval": dict(target_update_interval=2, tau=0.5),
    "three critics": dict(policy_kwargs={"net_arch": [16], "n_critics": 3}),
    "normalised": dict(env=lambda: VecNormalize(make_vec_env(PointEnv, n_envs=2, seed=0))),
    "Dict": dict(env=lambda: VecNormalize(make_vec_env(GoalEnv, seed=0)), policy="MultiInputPolicy"),
    "hindsight": dict(env=GoalEnv, policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer),
}


@pytest.mark.filterwarnings("ignore:`termination_fn` disagrees")
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_modules_and_functions_give_the_same_numbers(name, monkeypatch):
    """Five updates on real and generated transitions, whose terminations are somewhere on the way."""
    kwargs = {"env": PointEnv, "value_expansion_horizon": 2, "real_ratio": 0.5, **BOTH_WAYS[name]}

    def make_one():
        termination_fn = {"termination_fn": lambda obs, action, next_obs: action[:, 0] > 0.7}
        return make_agent(**{**kwargs, **termination_fn, "env": kwargs["env"]()}).learn(62)

    agents = [make_one() for _ in range(2)]
    assert_equal(state_of(agents[0]), state_of(agents[1]))
    before = state_of(agents[0])
    batches = agents[0].mixed_buffer.sample_batches(
        5, 32, env=value_expansion.of_rewards_only(agents[0].get_vec_normalize_env())
    )
    rows = iter([combine(lambda each, i=i: each[i], batches) for i in range(5)])
    buffer = SimpleNamespace(sample=lambda n, env: next(rows), sample_batches=lambda n_batches, n, env: batches)
    monkeypatch.setattr(MBPO, "mixed_buffer", buffer)
    monkeypatch.setattr(normal, "_standard_normal", lambda shape, dtype, device: fixed_noise(*shape))
    monkeypatch.setattr(th, "randn", fixed_noise)
    monkeypatch.setattr(th, "randn_like", lambda tensor: fixed_noise(*tensor.shape))
    # The noise of the model too is fixed; which elite predicts must be as well
    monkeypatch.setattr(th, "randint", lambda high, size, device=None: th.zeros(size, dtype=th.long))
    assert not_covered(agents[0]) is None
    results = [ways(agent, 5, 32)[way]() for agent, way in zip(agents, ("modules", "functions"), strict=True)]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert_equal(state_of(agents[0]), state_of(agents[1]))
    assert any(not th.equal(before[key], tensor) for key, tensor in state_of(agents[0]).items())


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "gradient_steps: 0"])
def test_without_steps_it_is_sac(name, monkeypatch):
    """With H = 0, all that SAC can do comes out as by SAC: the same data, weights and entropy coefficient."""
    monkeypatch.setattr(MBPO, "expands_values", True)
    sac, ours = make(SAC, **FEATURES[name]()).learn(80), make(MBPO, real_ratio=1, **FEATURES[name]()).learn(80)
    assert sac._n_updates == ours._n_updates > 0
    assert_same(sac, ours)
    for agent in (sac, ours):
        agent.get_env().close()


# --- Agents -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How many updates had expanded targets, and for how many steps the model was asked."""
    counts = SimpleNamespace(updates=0, steps=0, trainings=[])
    original, step, train_model = value_expansion._update, ModelEnv.step, DynamicsCallback._train_model

    def update(*arguments):
        counts.updates += 1
        return original(*arguments)

    def counted_step(*arguments):
        counts.steps += 1
        return step(*arguments)

    def trained(self, transitions):
        counts.trainings.append(self.model.lifetime_timesteps)
        return train_model(self, transitions)

    monkeypatch.setattr(value_expansion, "_update", update)
    monkeypatch.setattr(ModelEnv, "step", counted_step)
    monkeypatch.setattr(DynamicsCallback, "_train_model", trained)
    return counts


def assert_finite(agent):
    for name, tensor in [*agent.policy.state_dict().items(), *agent.dynamics.state_dict().items()]:
        assert th.isfinite(tensor).all(), name


@pytest.mark.parametrize("env", [PointEnv, "Pendulum-v1"])
@pytest.mark.parametrize("real_ratio", [0, 0.05, 1])
def test_agents(env, real_ratio, counted):
    agent = make_agent(env if isinstance(env, str) else env(), real_ratio=real_ratio, value_expansion_horizon=3)
    agent.learn(130, log_interval=None)
    assert agent.uses_model and agent.uses_generated_data == (real_ratio < 1)
    # All of them, as the model is trained first; and the model goes on being trained
    assert counted.updates == agent._n_updates == 70 and counted.steps == 3 * 70 and counted.trainings == [61, 111]
    # Without generated transitions in batches there are no rollouts to make them
    assert agent.model_buffer.size() == (0 if real_ratio == 1 else 200)
    assert (
        (len(agent.model_buffer.rewards) == 1)
        == (real_ratio == 1)
        == ("model/rollout_length" not in agent.logger.name_to_value)
    )
    assert {"train/critic_loss", "train/actor_loss", "train/ent_coef", "train/ent_coef_loss"} <= set(
        agent.logger.name_to_value
    )
    assert_finite(agent)


WITH = {
    "several environments": lambda: dict(env=make_vec_env(PointEnv, n_envs=3)),
    "VecNormalize": lambda: dict(env=VecNormalize(make_vec_env(PointEnv, n_envs=2))),
    "rewards normalised only": lambda: dict(env=VecNormalize(make_vec_env(PointEnv), norm_obs=False)),
    "n-step returns": lambda: dict(n_steps=3),
    "gSDE": lambda: dict(use_sde=True),
    "reward_fn": lambda: dict(reward_fn=lambda obs, action, next_obs: -np.abs(next_obs[:, 0] - 1)),
    "batch norm and dropout": lambda: architecture(features_extractor_class=Normalizing),
    "memory-efficient buffer": lambda: dict(
        optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}
    ),
    "hindsight": lambda: dict(env=GoalEnv(terminate=True), policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer),
    "hindsight, info": lambda: dict(
        env=GoalEnv(needs_info=True),
        policy="MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"copy_info_dict": True},
    ),
    "bits": lambda: dict(env=BitFlippingEnv(n_bits=3, continuous=True), policy="MultiInputPolicy"),
    "initial states": lambda: dict(env=PointEnv(), rollout_start="initial"),
}


@pytest.mark.filterwarnings("ignore:`reward_fn` disagrees")
@pytest.mark.parametrize("name", WITH)
@pytest.mark.parametrize("real_ratio", [0.5, 1])
def test_agents_with(name, real_ratio, counted):
    agent = make_agent(**{**WITH[name](), "value_expansion_horizon": 2, "real_ratio": real_ratio}).learn(130)
    assert counted.updates == agent._n_updates > 20
    assert_finite(agent)


def test_memory_efficient_buffer_still_cannot_teach_terminations():
    kwargs = dict(optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False})
    agent = make_agent(CountingEnv(), real_ratio=1, value_expansion_horizon=1, **kwargs)
    with pytest.raises(ValueError, match=r"`optimize_memory_usage=True`.*`termination_fn`"):
        agent.learn(10)


@pytest.mark.filterwarnings("ignore:`termination_fn` disagrees")
def test_units_under_vec_normalize():
    """The model in raw units; policy, critics and their rewards in normalised ones."""
    env = VecNormalize(DummyVecEnv([lambda: CountingEnv(episode_length=30)]))
    agent = make_agent(env, real_ratio=1, value_expansion_horizon=2, termination_fn=never).learn(90)
    # Every step counts one on; the reward is 3
    agent.dynamics = linear_ensemble(np.zeros((3, 3)), [3, 1, 1])
    raw = th.tensor([[5.0, 5.0], [20.0, 20.0]])
    seen = []

    def policy(obs):
        seen.append(obs)
        return th.zeros(2, 1), th.zeros(2, 1)

    rollouts = roll_out(ModelEnv(agent, agent.env), policy, raw, th.tensor([False, False]), 2)
    for t in range(3):
        np.testing.assert_allclose(rollouts.obs[t], env.normalize_obs(raw.numpy() + t), rtol=1e-5)
        assert th.equal(seen[t], rollouts.obs[t])
    np.testing.assert_allclose(rollouts.rewards, np.full((2, 2, 1), env.normalize_reward(np.float32(3))), rtol=1e-5)
    # Of a batch: raw successors, normalised rewards
    batch = agent.mixed_buffer.sample(64, env=value_expansion.of_rewards_only(env))
    assert th.equal(batch.next_observations, batch.next_observations.round()) and batch.next_observations.max() > 15
    real = real_transitions(agent.replay_buffer).rewards.numpy()
    assert np.isin(batch.rewards.numpy(), env.normalize_reward(real)).all() and env.norm_obs


def test_goals_stay_and_bits_are_bits():
    agent = make_agent(
        make_vec_env(lambda: BitFlippingEnv(n_bits=3, continuous=True), seed=0),
        "MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        real_ratio=1,
        value_expansion_horizon=3,
    ).learn(70)
    start = real_transitions(agent.replay_buffer).next_obs
    env = ModelEnv(agent, agent.env)
    rollouts = roll_out(env, lambda obs: (th.zeros(len(obs), 3), th.zeros(len(obs), 1)), start, th.zeros(len(start)) > 0, 3)
    assert set(rollouts.obs.unique().tolist()) == {0, 1} and rollouts.is_step.sum() > len(start)
    assert (rollouts.obs[:, :, env.goal_dims] == start[:, env.goal_dims]).all()
    assert set(rollouts.rewards[rollouts.is_step].tolist()) <= {0, -1}


def test_timeouts_are_rolled_out_and_terminations_are_not(known):
    """As far as SB3's buffer knows: what it calls done is over."""
    agent, _, _ = known
    real = agent.replay_buffer
    row = np.zeros((1, OBS_DIM))
    for truncated in (False, True):
        real.add(row, row, np.zeros((1, 1)), np.zeros(1), np.ones(1), [{"TimeLimit.truncated": truncated}])
    dones = real._get_samples(np.array([0, 1])).dones.squeeze(1)
    rollouts = roll_out(ModelEnv(agent, agent.env), lambda obs: (obs[:, :1], obs[:, :1]), th.zeros(2, 2), dones > 0, 1)
    assert rollouts.is_step.flatten().tolist() == [False, True]


def test_nothing_is_asked_where_no_rollout_is_left():
    """Functions of the user need not know what to do with no rows."""
    rows = []
    agent = make_agent(PointEnv(), termination_fn=lambda obs, action, next_obs: rows.append(len(obs)) or next_obs[:, 0] > -9)
    agent.dynamics = linear_ensemble([[1, 0], [0, 1]], [10, 0])
    rows.clear()
    for terminal in (False, True):
        rollouts = roll_out(
            ModelEnv(agent, agent.env), lambda obs: (obs, obs), column(1, 2), th.tensor([terminal, terminal]), 4
        )
        assert rollouts.is_step.sum() == (0 if terminal else 2)
    assert rows == [2]


def test_before_there_is_a_model_it_is_sac(counted):
    agent, sac = (make_agent(real_ratio=1, value_expansion_horizon=horizon).learn(30) for horizon in (2, 0))
    for each in (agent, sac):
        each.set_random_seed(1)
        each.train(3, 32)
    assert_same(agent, sac)
    assert not agent.expands_values and counted.updates == counted.steps == 0 and agent._n_updates == 3
    agent.learn(65)
    assert agent.expands_values and counted.updates == agent._n_updates - 3


def test_save_and_load(tmp_path, counted):
    agent = make_agent(PointEnv(), value_expansion_horizon=2, real_ratio=1, rollout_start="initial").learn(80)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer")
    loaded = MBPO.load(tmp_path / "agent", env=PointEnv())
    assert loaded.value_expansion_horizon == 2 and loaded.rollout_start == "initial" and loaded.expands_values
    loaded.load_replay_buffer(tmp_path / "buffer")
    counted.updates = 0
    loaded.set_logger(configure(None, []))
    loaded.train(3, 32)
    loaded.learn(20, reset_num_timesteps=False)
    assert counted.updates == 3 + 20
    # Without an environment it can predict, but nobody knows when episodes end
    alone = MBPO.load(tmp_path / "agent")
    alone.load_replay_buffer(tmp_path / "buffer")
    alone.set_logger(configure(None, []))
    with pytest.raises(ValueError, match="`set_env`"):
        alone.train(1, 32)
    alone.set_env(PointEnv())
    alone.train(1, 32)


def test_another_environment_brings_its_termination():
    agent = make_agent(gym.make("Hopper-v5"), real_ratio=1, value_expansion_horizon=1).learn(62)
    start = real_transitions(agent.replay_buffer).obs.float()

    def share_of_terminal_steps():
        rollouts = roll_out(agent._expansion_env(), agent_policy, start, th.zeros(len(start)) > 0, 1)
        return (rollouts.discounts == 0).float().mean().item()

    def agent_policy(obs):
        return agent.actor.action_log_prob(obs)[0], th.zeros(len(obs), 1)

    assert share_of_terminal_steps() < 1
    agent.set_env(gym.make("Hopper-v5", healthy_z_range=(50.0, 60.0)))
    assert share_of_terminal_steps() == 1


@pytest.mark.parametrize("name", ["default", "VecNormalize", "hindsight", "gSDE", "dropout", "compiled"])
def test_one_seed_one_agent(name):
    first, second, other = (
        make(MBPO, **{**SEEDED[name](), "seed": seed, "value_expansion_horizon": 2}).learn(80) for seed in (3, 3, 4)
    )
    assert_same(first, second)
    assert first._n_updates > 0 and not th.equal(*(next(iter(agent.critic.parameters())) for agent in (first, other)))


@pytest.mark.parametrize("compile", [False, True])
def test_diverging_updates(compile):
    """The weights are those from before."""
    agent = make_agent(compile=compile, real_ratio=1, value_expansion_horizon=2, gradient_steps=3).learn(62)
    assert agent.is_compiled["updates"] is compile
    agent.learning_rate = 1e30
    agent._setup_lr_schedule()
    with pytest.raises(DivergenceError, match=r"Gradient updates diverged at step 62: .*from before"):
        for _ in range(5):
            good = networks_state(agent)
            agent.train(3, 32)
    assert same(good[0], networks_state(agent)[0]) and same(good[2], networks_state(agent)[2])
    assert_finite(agent)


@pytest.mark.filterwarnings("ignore:`reward_fn` disagrees")
def test_functions_of_the_user_that_fail_are_an_error():
    def reward_fn(obs, action, next_obs):
        # The model is fitted by 61 transitions, a batch has 32
        return np.full(len(obs), np.nan if len(obs) == 32 else 0.0)

    with pytest.raises(ValueError, match="`reward_fn` must return finite numbers"):
        make_agent(reward_fn=reward_fn, real_ratio=1, value_expansion_horizon=1).learn(62)


def test_compiled(monkeypatch, capsys):
    """One graph for all updates, which is compiled before training; none that is not used."""
    compilations = []
    original = mbpo.compiled

    def compiled(function, device_type):
        graph = original(function, device_type)

        def call(*arguments):
            before = th._dynamo.utils.counters["stats"]["unique_graphs"]
            result = graph(*arguments)
            compilations.append((function.__name__, th._dynamo.utils.counters["stats"]["unique_graphs"] - before))
            return result

        return call

    for module in (mbpo, compilation):
        monkeypatch.setattr(module, "compiled", compiled)
    agent = make_agent(compile=True, verbose=1, value_expansion_horizon=2, real_ratio=0.3, gradient_steps=3).learn(
        80, log_interval=None
    )
    assert "Compiled: gradient updates and model training" in capsys.readouterr().out
    updates = [n for name, n in compilations if name == "expanded_update"]
    assert len(updates) == 1 + agent._n_updates == 61 and sum(updates[1:]) == 0
    assert agent.logger.name_to_value["train/compiled"] == 1 and "sac_update" not in dict(compilations)
    assert_finite(agent)


def test_what_is_printed_when_it_is_not_compiled(capsys):
    make_agent(real_ratio=1, value_expansion_horizon=1, verbose=1).learn(61)
    printed = capsys.readouterr().out
    assert "Not compiled: gradient updates and model training, because" in printed and "SAC.train" not in printed
    assert "Model buffer" not in printed and "Model training at step 61" in printed
