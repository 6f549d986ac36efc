"""When updates and model training are compiled, and what happens where they cannot be."""

import os
import subprocess
import sys
import threading
import warnings
from collections import Counter
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch.distributions import normal

from sb3_mbpo import MBPO
from sb3_mbpo.common import callbacks, compilation
from sb3_mbpo.common.buffers import MixedReplayBuffer, ModelReplayBuffer
from sb3_mbpo.common.compilation import compiled, planned_steps, planned_updates
from sb3_mbpo.common.update import optimizers
from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.dynamics.training import BATCH_SIZE, train_on, train_step, try_step
from sb3_mbpo.mbpo import mbpo
from tests.agents import make_agent


def test_compiled_model_training_gives_the_same_numbers():
    """Full batches and a smaller last one, weights that decay; weights, bounds and Adam's state."""
    ensembles = [Ensemble(3, 1, (16, 16), 3, 2, 1e-3) for _ in range(2)]
    ensembles[1].load_state_dict(ensembles[0].state_dict())
    generator = th.Generator().manual_seed(0)
    n = 3 * BATCH_SIZE + 100
    inputs, targets = th.randn(n, 4, generator=generator), th.randn(n, 4, generator=generator)
    try_step(ensembles[1], compiled(train_step, "cpu"))
    for name, tensor in ensembles[0].state_dict().items():
        assert th.equal(ensembles[1].state_dict()[name], tensor)
    for _ in range(10):
        batches = th.randint(n, (3, n), generator=generator).split(BATCH_SIZE, dim=1)
        eager = train_on(ensembles[0], inputs, targets, batches, 4, None, 0.3, (0.5, 0.25))
        graph = train_on(ensembles[1], inputs, targets, batches, 4, compiled(train_step, "cpu"), 0.3, (0.5, 0.25))
        np.testing.assert_allclose(graph, eager, rtol=1e-5)
    for name, tensor in ensembles[0].state_dict().items():
        np.testing.assert_allclose(ensembles[1].state_dict()[name], tensor, rtol=1e-4, atol=1e-6, err_msg=name)
    states = [ensemble.optimizer.state_dict()["state"] for ensemble in ensembles]
    assert states[0].keys() == states[1].keys() and len(states[0]) == 8
    for i, state in states[0].items():
        assert state["step"] == states[1][i]["step"] == 40
        for key in ("exp_avg", "exp_avg_sq"):
            np.testing.assert_allclose(states[1][i][key], state[key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs, total, updates",
    [
        (dict(gradient_steps=20, learning_starts=100), 600, 10_000),
        (dict(gradient_steps=20, train_freq=4), 1_060, 5_000),
        (dict(gradient_steps=-1, train_freq=4), 1_060, 1_000),
        (dict(gradient_steps=5, train_freq=(1, "episode")), 1_060, 1_000),
        (dict(gradient_steps=20), 50, 0),
        (dict(gradient_steps=20, env="two"), 1_060, 10_000),
        (dict(gradient_steps=-1, env="two"), 1_060, 1_000),
    ],
)
def test_planned_updates(kwargs, total, updates):
    if "env" in kwargs:
        kwargs = {**kwargs, "env": make_vec_env("Pendulum-v1", n_envs=2)}
    agent = make_agent(**kwargs)
    agent._convert_train_freq()
    assert planned_updates(agent, planned_steps(agent, total)) == updates


def test_planned_updates_of_a_second_run():
    agent = make_agent(gradient_steps=1).learn(80)
    # The warm-up is over
    assert planned_updates(agent, planned_steps(agent, 180)) == 100


@pytest.mark.parametrize("train_freq, n_envs, steps", [(4, 1, 12), (4, 2, 16), ((3, "episode"), 2, 10), (1, 1, 10)])
def test_planned_steps_are_those_of_whole_rollouts(train_freq, n_envs, steps):
    env = make_vec_env(
        "Pendulum-v1", n_envs=n_envs, wrapper_class=gym.wrappers.TimeLimit, wrapper_kwargs={"max_episode_steps": 5}
    )
    agent = make_agent(env, train_freq=train_freq)
    agent._convert_train_freq()
    assert planned_steps(agent, 10) == steps
    if train_freq != (3, "episode"):
        assert agent.learn(10).num_timesteps == steps


@pytest.mark.parametrize(
    "compile, bar, expected", [("auto", 50, True), ("auto", 51, False), (False, 1, False), (True, 51, True)]
)
def test_when_it_is_compiled(compile, bar, expected, monkeypatch, capsys):
    """50 updates are planned."""
    monkeypatch.setattr(MBPO, "min_updates_to_compile", bar)
    agent = make_agent(compile=compile, verbose=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.learn(110, log_interval=None)
    assert agent.is_compiled == {"updates": expected, "model": expected}
    printed = capsys.readouterr().out
    if expected:
        assert "Compiled: gradient updates and model training, in" in printed and agent.seconds["compile"] > 0
    else:
        reason = {"auto": "50 updates would not repay", False: "`compile` is False"}[compile]
        lines = [line for line in printed.splitlines() if "ompiled" in line]
        assert len(lines) == 1 and reason in lines[0] and "SAC.train" in lines[0]
    agent.dump_logs()
    assert agent._n_updates == 50 and agent.dynamics.n_fits == 1
    optimizers = (agent.actor.optimizer, agent.critic.optimizer, agent.ent_coef_optimizer)
    assert {int(s["step"]) for optimizer in optimizers for s in optimizer.state.values()} == {50}


def test_the_log_says_which_path_is_in_use(tmp_path):
    agent = make_agent(compile=True, use_sde=True)
    with pytest.warns(UserWarning, match="Not compiled: gradient updates.*SAC.train.*because gSDE is in use") as caught:
        agent.learn(70, log_interval=None)
    # Of the line that calls `learn()`
    assert [warning.filename for warning in caught if "Not compiled" in str(warning.message)] == [__file__]
    values = []
    agent.logger.dump = lambda step: values.append(dict(agent.logger.name_to_value))
    agent.dump_logs()
    assert values[0]["train/compiled"] == 0 and values[0]["model/compiled"] == 1
    assert values[0]["time/compile_seconds"] > 0


def test_checkpoints_pass_between_both_paths(tmp_path):
    agent = make_agent(compile=True).learn(80)
    agent.save(tmp_path / "compiled.zip")
    eager = MBPO.load(tmp_path / "compiled.zip", env=agent.get_env(), compile=False)
    for name, tensor in agent.policy.state_dict().items():
        assert th.equal(eager.policy.state_dict()[name], tensor)
    eager.replay_buffer = agent.replay_buffer
    eager.learn(20)
    assert eager._n_updates == 40 and eager.is_compiled == {"updates": False, "model": False}
    eager.save(tmp_path / "eager.zip")
    again = MBPO.load(tmp_path / "eager.zip", env=agent.get_env(), compile=True)
    assert {int(s["step"]) for s in again.critic.optimizer.state.values()} == {40}
    again.replay_buffer = agent.replay_buffer
    again.learn(20)
    assert again._n_updates == 60 and again.is_compiled == {"updates": True, "model": True}
    assert {int(s["step"]) for s in again.critic.optimizer.state.values()} == {60}


def test_other_sizes_later_in_the_same_process():
    """A user's own call of ``train`` with another batch size; other networks. torch by itself allows 8 of them."""
    agent = make_agent(compile=True).learn(61)
    agent.train(2, 16)
    assert agent._n_updates == 3


def square(x):
    return x * x


def test_more_sizes_than_torch_allows_by_itself():
    for n in range(2, 12):
        assert compiled(square, "cpu")(th.full((n,), 3.0)).tolist() == [9.0] * n


@pytest.fixture
def graphs(monkeypatch):
    """Nothing is compiled; what would be, and how often it was called."""
    calls = Counter()

    def compiled(function, device_type):
        def call(*arguments):
            calls[function.__name__] += 1
            return function(*arguments)

        return call

    for module in (mbpo, callbacks, compilation):
        monkeypatch.setattr(module, "compiled", compiled)
    return calls


class Recorded:
    """
    Stands in for the mixed buffer: gives batch after batch of those that another agent had.

    :param batches: ``(n_batches, batch_size, ...)``
    """

    def __init__(self, batches):
        self.batches, self.next = batches, 0

    def sample(self, batch_size, env=None):
        self.next += 1
        return ReplayBufferSamples(*(None if column is None else column[self.next - 1] for column in self.batches))


def test_not_in_a_thread():
    """Where torch.compile fails from the second thread of a process on: trials of Optuna's ``n_jobs``, for instance."""
    agents, reports = [make_agent(compile=True) for _ in range(2)], []

    def learn(agent):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            agent.learn(70)
        reports.extend(str(each.message) for each in caught)

    # One after the other, as warnings are caught for the whole process
    for agent in agents:
        thread = threading.Thread(target=learn, args=[agent])
        thread.start()
        thread.join()
    assert [agent._n_updates for agent in agents] == [10, 10]
    assert not any(is_compiled for agent in agents for is_compiled in agent.is_compiled.values())
    assert sum("torch.compile does not work in threads" in report for report in reports) == 2


@pytest.mark.parametrize("n_steps", [1, 3])
def test_the_compiled_path_of_an_agent_is_sacs_train(n_steps, graphs, monkeypatch):
    """Normalised observations, a learning-rate schedule, real and generated transitions: weights, losses, counts."""
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=0))
    agent = make_agent(env, compile=True, real_ratio=0.5, learning_rate=lambda progress: 1e-2 * progress, n_steps=n_steps)
    agent.learn(100)
    # Both were tried first
    assert graphs["sac_update"] == agent._n_updates + 1 == 21 and graphs["train_step"] == 1 + 11
    agent._current_progress_remaining = 0.3
    sac = deepcopy(agent.policy), deepcopy(agent.log_ent_coef.detach())

    batches, noises, n_generated = [], [], []
    sample_batches, randn, sample = MixedReplayBuffer.sample_batches, th.randn, ModelReplayBuffer.sample

    def watched_sample(self, batch_size, env=None):
        n_generated.append(batch_size)
        return sample(self, batch_size, env=env)

    def watched_batches(self, n_batches, batch_size, env=None):
        assert env is agent.get_vec_normalize_env()
        batches.append(sample_batches(self, n_batches, batch_size, env=env))
        return batches[-1]

    def watched_noise(*shape, **kwargs):
        noises.append(randn(*shape, **kwargs))
        return noises[-1]

    states = [deepcopy(optimizer.state_dict()) for optimizer in optimizers(agent)]
    with monkeypatch.context() as patch:
        patch.setattr(MixedReplayBuffer, "sample_batches", watched_batches)
        patch.setattr(th, "randn", watched_noise)
        patch.setattr(ModelReplayBuffer, "sample", watched_sample)
        agent.train(7, 32)
    logged = dict(agent.logger.name_to_value)
    after = {name: tensor.clone() for name, tensor in agent.policy.state_dict().items()}
    after["log_ent_coef"] = agent.log_ent_coef.detach().clone()
    assert batches[0].rewards.shape == (7, 32, 1) and (batches[0].discounts is None) == (n_steps == 1)
    # Half of each is real, all normalised
    assert n_generated == [7 * 16] and batches[0].observations.abs().max() <= 10
    assert noises[0].shape == (2, 7, 32, 1) and noises[0].std() == pytest.approx(1, abs=0.1)
    assert not th.equal(noises[0][0], noises[0][1])

    # Once more from the same start, with SB3's own `train`
    agent.policy.load_state_dict(sac[0].state_dict())
    agent.log_ent_coef.data.copy_(sac[1])
    for optimizer, state in zip(optimizers(agent), states, strict=True):
        optimizer.load_state_dict(state)
    agent.compile = False
    draws = iter(noises[0].transpose(0, 1).flatten(0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(MBPO, "mixed_buffer", Recorded(batches[0]))
        patch.setattr(normal, "_standard_normal", lambda shape, dtype, device: next(draws))
        agent.train(7, 32)
    for name, tensor in [*agent.policy.state_dict().items(), ("log_ent_coef", agent.log_ent_coef.detach())]:
        np.testing.assert_allclose(after[name], tensor, rtol=1e-4, atol=1e-6, err_msg=name)
    expected = agent.logger.name_to_value
    for key in ("critic_loss", "actor_loss", "ent_coef", "ent_coef_loss", "learning_rate"):
        assert logged[f"train/{key}"] == pytest.approx(expected[f"train/{key}"], rel=1e-4), key
    assert logged["train/n_updates"] == 27 and expected["train/n_updates"] == 34
    assert expected["train/learning_rate"] == pytest.approx(3e-3)


def test_what_the_user_changes_between_updates_counts(graphs):
    agent = make_agent(compile=True).learn(65)
    assert graphs["sac_update"] == 1 + 5
    for parameter in agent.actor.parameters():
        parameter.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in agent.actor.state_dict().items()}
    agent.train(1, 16)
    assert agent.logger.name_to_value["train/compiled"] == 0
    assert all(th.equal(before[name], tensor) for name, tensor in agent.actor.state_dict().items())
    assert graphs["sac_update"] == 6
    agent.actor.requires_grad_(True)
    agent.train(1, 16)
    agent.compile = False
    agent.train(1, 16)
    assert graphs["sac_update"] <= 7


@pytest.mark.parametrize("error", [OSError(20, "Not a directory"), RuntimeError("not on this Python\nmore"), ValueError()])
def test_whatever_stops_the_compiler_is_no_failure(error, monkeypatch, capsys):
    def fails(*arguments):
        raise error

    for module in (mbpo, callbacks, compilation):
        monkeypatch.setattr(module, "compiled", lambda function, device_type: fails)
    monkeypatch.setattr(MBPO, "min_updates_to_compile", 1)
    agent = make_agent(verbose=1).learn(65, log_interval=1_000)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "ompiled:" in line]
    assert f"because torch.compile failed: {type(error).__name__}" in line and agent._n_updates == 5


LEARN = """
from torch._dynamo.utils import counters
from sb3_mbpo import MBPO
from tests.agents import make_agent
MBPO.min_updates_to_compile = 1
agent = make_agent(verbose=1, gradient_steps=10).learn(61, log_interval=None)
print("updates", agent._n_updates, agent.is_compiled, "misses", counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.parametrize("switch", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_compilation_switched_off(switch, monkeypatch, capsys):
    monkeypatch.setenv(switch, "1")
    monkeypatch.setattr(MBPO, "min_updates_to_compile", 1)
    agent = make_agent(verbose=1).learn(62, log_interval=1_000)
    assert f"because {switch} is set" in capsys.readouterr().out
    assert agent.is_compiled == {"updates": False, "model": False} and agent._n_updates == 2


def learn_in_a_process_of_its_own(tmp_path, **environment):
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", LEARN],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_without_a_compiler_it_says_so_and_learns(tmp_path):
    """One clear line; SB3's own updates."""
    out, err = learn_in_a_process_of_its_own(tmp_path, CXX="/no/such/compiler")
    lines = [line for line in out.splitlines() if "ompiled:" in line]
    assert len(lines) == 1 and "gradient updates (by SB3's SAC.train) and model training" in lines[0]
    assert "No working C++ compiler found" in lines[0]
    assert "updates 10 {'updates': False, 'model': False}" in out and err == ""


@pytest.mark.slow
def test_second_run_starts_from_the_cache(tmp_path):
    first, _ = learn_in_a_process_of_its_own(tmp_path)
    second, _ = learn_in_a_process_of_its_own(tmp_path)
    assert "updates 10 {'updates': True, 'model': True} misses 2" in first
    assert "updates 10 {'updates': True, 'model': True} misses 0" in second
