"""When updates and model training are compiled, and what happens where they cannot be."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch as th

from sb3_mbpo import MBPO, mbpo
from sb3_mbpo.compilation import call_each, compiled
from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.dynamics.training import BATCH_SIZE, fit, train_epoch, train_step, try_step
from tests.agents import make_agent


def test_compiled_model_training_gives_the_same_numbers():
    """Epochs of full batches and a smaller last one; weights, bounds and Adam's state."""
    ensembles = [Ensemble(3, 1, (16, 16), 3, 2, 1e-3) for _ in range(2)]
    ensembles[1].load_state_dict(ensembles[0].state_dict())
    generator = th.Generator().manual_seed(0)
    n = 3 * BATCH_SIZE + 100
    inputs, targets = th.randn(n, 4, generator=generator), th.randn(n, 4, generator=generator)
    try_step(ensembles[1], compiled(train_step, "cpu"))
    for name, tensor in ensembles[0].state_dict().items():
        assert th.equal(ensembles[1].state_dict()[name], tensor)
    for _ in range(10):
        indices = th.randint(n, (3, n), generator=generator)
        eager = train_epoch(ensembles[0], inputs, targets, indices)
        graph = train_epoch(ensembles[1], inputs, targets, indices, compiled(train_step, "cpu"))
        assert graph.item() == pytest.approx(eager.item(), rel=1e-5)
    for name, tensor in ensembles[0].state_dict().items():
        np.testing.assert_allclose(ensembles[1].state_dict()[name], tensor, rtol=1e-4, atol=1e-6, err_msg=name)
    states = [ensemble.optimizer.state_dict()["state"] for ensemble in ensembles]
    assert states[0].keys() == states[1].keys() and len(states[0]) == 8
    for i, state in states[0].items():
        assert state["step"] == states[1][i]["step"] == 40
        for key in ("exp_avg", "exp_avg_sq"):
            np.testing.assert_allclose(states[1][i][key], state[key], rtol=1e-3, atol=1e-6)


def test_cap_on_epochs():
    th.manual_seed(0)
    inputs, targets = th.randn(300, 4), th.randn(300, 4)
    assert fit(Ensemble(3, 1, (16, 16), 3, 2, 1e-3), inputs, targets, max_epochs=2).epochs == 2
    agent = make_agent(model_max_epochs=3).learn(61)
    assert agent.logger.name_to_value["model/epochs"] == 3


@pytest.mark.parametrize(
    "kwargs, total, updates",
    [
        (dict(gradient_steps=20, learning_starts=100), 600, 10_000),
        (dict(gradient_steps=20, train_freq=4), 1_060, 5_000),
        (dict(gradient_steps=-1, train_freq=4), 1_060, 1_000),
        (dict(gradient_steps=5, train_freq=(1, "episode")), 1_060, 1_000),
        (dict(gradient_steps=20), 50, 0),
    ],
)
def test_planned_updates(kwargs, total, updates):
    agent = make_agent(**kwargs)
    agent._convert_train_freq()
    assert agent._planned_updates(total) == updates


def test_planned_updates_of_a_second_run():
    agent = make_agent(gradient_steps=1).learn(80)
    # The warm-up is over
    assert agent._planned_updates(180) == 100


@pytest.mark.parametrize(
    "compile, bar, expected", [("auto", 50, True), ("auto", 51, False), (False, 1, False), (True, 51, True)]
)
def test_when_it_is_compiled(compile, bar, expected, monkeypatch, capsys):
    """50 updates are planned."""
    monkeypatch.setattr(mbpo, "MIN_UPDATES_TO_COMPILE", bar)
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
    with pytest.warns(UserWarning, match="Not compiled: gradient updates.*SAC.train.*because gSDE is in use"):
        agent.learn(70, log_interval=None)
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
        assert call_each(compiled(square, "cpu"), [(th.full((n,), 3.0),)])[0].tolist() == [9.0] * n


LEARN = """
from torch._dynamo.utils import counters
from sb3_mbpo import mbpo
from tests.agents import make_agent
mbpo.MIN_UPDATES_TO_COMPILE = 1
agent = make_agent(verbose=1, gradient_steps=10).learn(61, log_interval=None)
print("updates", agent._n_updates, agent.is_compiled, "misses", counters["inductor"]["fxgraph_cache_miss"])
"""


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


def test_second_run_starts_from_the_cache(tmp_path):
    first, _ = learn_in_a_process_of_its_own(tmp_path)
    second, _ = learn_in_a_process_of_its_own(tmp_path)
    assert "updates 10 {'updates': True, 'model': True} misses 2" in first
    assert "updates 10 {'updates': True, 'model': True} misses 0" in second
