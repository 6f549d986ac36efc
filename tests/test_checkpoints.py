"""Files of an agent: nothing half-written, nothing lost when the process is killed, and clear words about what is damaged."""

import base64
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import warnings
import zipfile
from copy import deepcopy
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.utils import LinearSchedule

from sb3_mbpo import DHMBPO, MBPO, __version__
from sb3_mbpo.common.checkpoints import atomic_file
from tests.agents import make_agent
from tests.envs import CountingEnv
from tests.test_save_load import assert_same_parameters

ROOT = Path(__file__).parents[1]
START = "import torch as th; th.set_num_threads(1); from tests.agents import make_agent; from sb3_mbpo import MBPO\n"


def run(code, *arguments):
    """Another process."""
    return subprocess.run(
        [sys.executable, "-c", START + code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def agent():
    return make_agent(rollout_schedule=[0, 200, 1, 3]).learn(120)


@pytest.fixture
def saved(agent, tmp_path):
    agent.save(tmp_path / "agent.zip")
    return tmp_path / "agent.zip"


# --- Resume across processes --------------------------------------------------------------------------------------------

RESUME = """
import sys
import gymnasium as gym
agent = MBPO.load(sys.argv[1], env=gym.make("Pendulum-v1"))
agent.load_replay_buffer(sys.argv[2])
agent.set_random_seed(7)
agent.learn(int(sys.argv[3]), reset_num_timesteps=False)
print(agent.num_timesteps, agent.lifetime_timesteps, int(agent.dynamics.n_fits), agent._n_updates)
agent.save(sys.argv[4])
"""


def test_goes_on_in_another_process(agent, saved, tmp_path):
    """The same steps, schedule, ensemble and updates, and in two processes the same numbers."""
    agent.save_replay_buffer(tmp_path / "buffer.pkl")
    results = [run(RESUME, saved, tmp_path / "buffer.pkl", 60, tmp_path / f"resumed{i}.zip") for i in range(2)]
    fits, updates = int(agent.dynamics.n_fits), agent._n_updates
    # Trained at 61 and 111, due again at 161; one update at each of the 60 steps: no second warm-up
    for result in results:
        assert result.returncode == 0, result.stdout
        assert result.stdout.split() == ["180", "180", str(fits + 1), str(updates + 60)]
    assert_same_parameters(*(MBPO.load(tmp_path / f"resumed{i}.zip") for i in range(2)))


class Watch(BaseCallback):
    """Notes what the agent is doing at each step, and saves it once, between two steps."""

    def __init__(self, folder=None, at_step=None):
        super().__init__()
        self.folder, self.at_step, self.seen = folder, at_step, {}

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        agent = self.model
        self.seen[agent.num_timesteps] = {
            "updates": agent._n_updates,
            "transitions": agent.replay_buffer.size(),
            "rollout_length": agent.rollout_length,
            "trainings of the model": int(agent.dynamics.n_fits),
            "last training": agent.last_model_training,
            "learning rate": agent.actor.optimizer.param_groups[0]["lr"],
            "episode": agent._episode_num,
        }
        if agent.num_timesteps == self.at_step:
            agent.save(self.folder / "agent")
            agent.save_replay_buffer(self.folder / "buffer")


def test_goes_on_as_if_it_had_not_stopped(tmp_path):
    """An agent that was saved at step 120 of 220 does at each later step what the one does that was not interrupted."""
    kwargs = dict(rollout_schedule=[100, 200, 1, 5], learning_rate=LinearSchedule(1e-3, 1e-4, 1.0))
    agent, whole = make_agent(CountingEnv(episode_length=20), **kwargs), Watch(tmp_path, at_step=120)
    agent.learn(220, callback=whole)
    resumed, rest = MBPO.load(tmp_path / "agent", env=CountingEnv(episode_length=20)), Watch()
    resumed.load_replay_buffer(tmp_path / "buffer")
    resumed.learn(100, callback=rest, reset_num_timesteps=False)
    assert list(rest.seen) == list(range(120, 220))
    for step, seen in rest.seen.items():
        assert seen == whole.seen[step], step
    # Something happened meanwhile
    first, last = rest.seen[120], rest.seen[219]
    assert all(last[name] > first[name] for name in first if name != "learning rate")
    assert last["learning rate"] < first["learning rate"]


# --- Killed -------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.utils import LinearSchedule
from sb3_mbpo.common import callbacks
from sb3_mbpo.dynamics import training

where, folder = sys.argv[1:]
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
agent = make_agent(model_gradient_steps=0.1)

def killing(module, name, when):
    "The `when`-th call goes half of the way."
    original, count = getattr(module, name), 0
    def call(*args, **kwargs):
        nonlocal count
        count += 1
        result = original(*args, **kwargs)
        if count == when:
            kill()
        return result
    setattr(module, name, call)

# The model is trained at steps 61, 111, 161; checkpoints are written at 40, 80, 120
if where == "model training":
    # 106 gradient steps, 50, and 20 of 36
    killing(training, "train_step", 176)
elif where == "rollout":
    from sb3_mbpo.common.buffers import ModelReplayBuffer
    killing(ModelReplayBuffer, "extend", 3)
elif where == "save":
    # In the middle of the zip of step 120
    saves = []
    original = th.save
    def save(*args, **kwargs):
        if agent.num_timesteps == 120:
            original(*args, **kwargs)
            if len(saves) == 3:
                kill()
            saves.append(1)
        else:
            original(*args, **kwargs)
    th.save = save
elif where == "save of the replay buffer":
    import pickle
    dump = pickle.dump
    def half(obj, file, protocol=None):
        data = pickle.dumps(obj, protocol)
        if agent.num_timesteps == 120:
            file.write(data[: len(data) // 2]); file.flush()
            kill()
        file.write(data)
    pickle.dump = half
# Under the same names each time, as the zoo does with its replay buffer
class Checkpoint(CheckpointCallback):
    def _checkpoint_path(self, checkpoint_type="", extension=""):
        return os.path.join(self.save_path, f"last{checkpoint_type}.{extension}")
agent.learn(200, callback=Checkpoint(40, folder, save_replay_buffer=True))
"""


@pytest.mark.parametrize(
    "where, last", [("model training", 160), ("rollout", 160), ("save", 80), ("save of the replay buffer", 120)]
)
def test_killed(where, last, tmp_path):
    """What is there can be loaded and goes on: the checkpoint before, or the new one."""
    result = run(KILLED, where, tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stdout
    loaded = MBPO.load(tmp_path / "last.zip", env=gym.make("Pendulum-v1"))
    loaded.load_replay_buffer(tmp_path / "lastreplay_buffer_.pkl")
    assert loaded.num_timesteps == last
    # Callbacks run before the step is stored and learned from
    assert loaded.replay_buffer.size() == (79 if "save" in where else last - 1)
    loaded.learn(30, reset_num_timesteps=False)
    assert loaded.num_timesteps == last + 30 and loaded.model_buffer.size() > 0
    assert loaded._n_updates == last - 1 + 30 - 60


# --- Written in one step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save, name", [("save", "agent.zip"), ("save_replay_buffer", "agent.pkl")])
def test_a_failed_save_leaves_the_old_file(agent, save, name, tmp_path, monkeypatch):
    getattr(agent, save)(tmp_path / name)
    before = (tmp_path / name).read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(th, "save", full_disk)
    monkeypatch.setattr(pickle, "dump", full_disk)
    with pytest.raises(OSError, match="No space left"):
        getattr(agent, save)(tmp_path / name)
    assert (tmp_path / name).read_bytes() == before and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("as_path", [str, Path])
def test_names_are_those_of_sb3(agent, as_path, tmp_path, recwarn):
    """Suffix, folders that are missing, a name that is a folder's, file objects: the files that SAC would write."""
    sac = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [4]}, buffer_size=10, device="cpu")
    files = []
    for folder, one in (("ours", agent), ("sacs", sac)):
        (tmp_path / folder / "taken").mkdir(parents=True)
        (tmp_path / folder / "taken.zip").mkdir()
        for name in ("plain", "suffix.zip", "other.suffix", "missing/folder/agent", "taken.zip"):
            one.save(as_path(tmp_path / folder / name))
            one.save_replay_buffer(as_path(tmp_path / folder / f"{name}_buffer"))
        files.append(sorted(path.relative_to(tmp_path / folder).as_posix() for path in (tmp_path / folder).rglob("*")))
    assert files[0] == files[1]
    messages = [str(warning.message).replace("/ours", "/sacs") for warning in recwarn if "ath" in str(warning.message)]
    half = len(messages) // 2
    assert half > 0 and sorted(messages[:half]) == sorted(messages[half:])


def test_file_objects(agent, tmp_path):
    stream, buffer = io.BytesIO(), io.BytesIO()
    agent.save(stream)
    agent.save_replay_buffer(buffer)
    stream.seek(0), buffer.seek(0)
    loaded = MBPO.load(stream)
    assert_same_parameters(agent, loaded)
    loaded.load_replay_buffer(buffer)
    assert loaded.replay_buffer.size() == 120
    with (tmp_path / "agent.zip").open("wb") as file:
        agent.save(file)
    with (tmp_path / "agent.zip").open("rb") as file:
        assert_same_parameters(agent, MBPO.load(file))


def test_links_permissions_and_devices(tmp_path):
    target = tmp_path / "target.zip"
    target.write_bytes(b"old")
    target.chmod(0o640)
    (tmp_path / "link.zip").symlink_to(target)
    with atomic_file(tmp_path / "link.zip", "zip") as file:
        file.write(b"new")
    assert (tmp_path / "link.zip").is_symlink() and target.read_bytes() == b"new" and target.stat().st_mode & 0o777 == 0o640
    with atomic_file(os.devnull, "zip") as file:
        file.write(b"new")
    assert Path(os.devnull).is_char_device()


# --- Read with care -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_zip(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="truncated or altered") as error:
        MBPO.load(saved)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize("seed", range(8))
def test_altered_zip(saved, seed):
    """A byte that is wrong, anywhere in what is saved."""
    data = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        info = archive.infolist()[seed % len(archive.infolist())]
        start = info.header_offset + 30 + len(info.filename)
        place = start + np.random.default_rng(seed).integers(info.compress_size)
    data[place] ^= 0xFF
    saved.write_bytes(data)
    with pytest.raises(ValueError, match=r"truncated or altered|checksum") as error:
        MBPO.load(saved)
    assert str(saved) in str(error.value)


def rewritten(path, change, **others):
    """The same zip, with ``change(attributes)`` made to its JSON, and other text files in it."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    attributes = json.loads(entries["data"])
    change(attributes)
    entries |= {"data": json.dumps(attributes).encode(), **{f"{name}.txt": text for name, text in others.items()}}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_no_zip_no_file(tmp_path):
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(ValueError, match=r"text\.zip is not the complete zip"):
        MBPO.load(tmp_path / "text.zip")
    with pytest.raises(FileNotFoundError, match=r"missing"):
        MBPO.load(tmp_path / "missing")


def test_a_model_in_other_units_is_refused(saved):
    rewritten(saved, lambda attributes: attributes.update(model_max_epochs=None))
    with pytest.raises(ValueError, match=r"saved by an earlier version of sb3_mbpo, whose model had other units.*train again"):
        MBPO.load(saved)


@pytest.mark.parametrize("unknown", [["target_std", "target_unit"], ["target_unit"]])
@pytest.mark.parametrize("exact_match", [True, False])
def test_parameters_of_a_model_in_other_units_are_refused(exact_match, unknown, agent):
    parameters = deepcopy(agent.get_parameters())
    for name in unknown:
        del parameters["dynamics"][name]
    with pytest.raises(ValueError, match="of an earlier version of sb3_mbpo, whose model had other units"):
        agent.set_parameters(parameters, exact_match=exact_match)


def test_versions(saved, agent):
    """What an older one did not know has its default, what a newer one knows beside is kept and does no harm."""
    assert json.loads(zipfile.ZipFile(saved).read("data"))["sb3_mbpo_version"] == __version__

    def change(attributes):
        del attributes["model_gradient_steps"], attributes["compile"]
        attributes.update(sb3_mbpo_version="9.9.9", argument_of_the_future=3)

    rewritten(saved, change)
    loaded = MBPO.load(saved, env=gym.make("Pendulum-v1"))
    assert loaded.model_gradient_steps == 1 and loaded.compile == "auto" and loaded.sb3_mbpo_version == "9.9.9"
    assert_same_parameters(agent, loaded)
    loaded.learn(5)
    loaded.save(saved)
    assert MBPO.load(saved).sb3_mbpo_version == __version__


def test_another_version_that_does_not_fit(saved):
    with zipfile.ZipFile(saved) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    state = th.load(io.BytesIO(entries["dynamics.pth"]), weights_only=True)
    state["new_weights"] = th.zeros(3)
    stream = io.BytesIO()
    th.save(state, stream)
    with zipfile.ZipFile(saved, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, stream.getvalue() if name == "dynamics.pth" else content)
    rewritten(saved, lambda attributes: attributes.update(sb3_mbpo_version="9.9.9"))
    with pytest.raises(
        ValueError,
        match=rf"(?s)agent\.zip, saved by sb3_mbpo 9\.9\.9, cannot be put together by sb3_mbpo {__version__}.*new_weights",
    ):
        MBPO.load(saved)


def test_without_a_version(saved):
    def change(attributes):
        del attributes["sb3_mbpo_version"]

    rewritten(saved, change)
    assert MBPO.load(saved).num_timesteps == 120
    with pytest.raises(ValueError, match=r"unknown version"):
        MBPO.load(saved, ensemble_size=4)


@pytest.mark.parametrize(
    "changes",
    # The second is out of range, too, with the number of elites that is saved
    [dict(ensemble_size=5), dict(ensemble_size=1), dict(model_hidden_sizes=[8, 8]), dict(model_hidden_sizes=[16])],
    ids=str,
)
def test_sizes_cannot_be_changed_at_loading(saved, changes):
    with pytest.raises(ValueError, match=rf"agent\.zip.*{next(iter(changes))} changed \(sizes of networks must be as saved\)"):
        MBPO.load(saved, **changes)


@pytest.mark.parametrize("changes", [dict(ensemble_size=5), dict(model_hidden_sizes=[8, 8]), dict(num_elites=1)], ids=str)
def test_sizes_cannot_be_changed_later(tmp_path, changes):
    """What was saved then could not be loaded."""
    agent = make_agent()
    name, value = next(iter(changes.items()))
    before = getattr(agent, name)
    setattr(agent, name, value)
    for do in (lambda: agent.save(tmp_path / "agent"), lambda: agent.learn(1)):
        with pytest.raises(ValueError, match=rf"`{name}` was changed to .*, but the model was made with"):
            do()
    assert list(tmp_path.iterdir()) == []
    # A tuple is as good as a list
    setattr(agent, name, tuple(before) if isinstance(before, list) else before)
    agent.save(tmp_path / "agent")


def test_module_that_is_missing_at_loading(tmp_path):
    """A function of the user's script, which lies elsewhere."""
    (tmp_path / "terminations.py").write_text("def never(obs, action, next_obs):\n    return next_obs[:, 0] > 1e9\n")
    code = (
        "from terminations import never\nfrom tests.agents import make_agent\nmake_agent(termination_fn=never).save('agent')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path)])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    with pytest.raises(
        ValueError, match=r"agent needs the module 'terminations', which.*custom_objects=\{'termination_fn': None\}"
    ):
        MBPO.load(tmp_path / "agent")
    # The advice is good
    assert MBPO.load(tmp_path / "agent", custom_objects={"termination_fn": None}).termination_fn is None


def test_zip_of_sac(tmp_path, agent):
    sac = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16]}, buffer_size=10, device="cpu")
    sac.save(tmp_path / "sac.zip")
    with pytest.raises(ValueError, match=r"sac\.zip was not saved by MBPO.*`agent\.set_parameters\(.*exact_match=False\)`"):
        MBPO.load(tmp_path / "sac.zip")
    # The advice is good
    ours = make_agent()
    ours.set_parameters(tmp_path / "sac.zip", exact_match=False)
    for name, tensor in sac.policy.state_dict().items():
        assert th.equal(ours.policy.state_dict()[name], tensor)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_loading_executes_no_more_than_sb3(saved, tmp_path):
    """Weights are data only; what is pickled among the attributes is left alone if something else is given for it."""
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("bomb.pth", pickle.dumps(Bomb(str(tmp_path / "exploded"))))
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        MBPO.load(saved)
    assert not (tmp_path / "exploded").exists()


def test_custom_objects_keep_functions_from_being_unpickled(tmp_path):
    agent = make_agent(CountingEnv(), termination_fn=lambda obs, action, next_obs: next_obs[:, 0] > 5)
    agent.save(tmp_path / "agent.zip")

    def change(attributes):
        attributes["termination_fn"] = {":type:": "function", ":serialized:": "bm90IGEgcGlja2xl"}

    rewritten(tmp_path / "agent.zip", change)
    assert MBPO.load(tmp_path / "agent.zip", custom_objects={"termination_fn": None}).termination_fn is None


def is_high(obs, action, next_obs):
    return next_obs[:, 0] > 5


@pytest.mark.parametrize("cls", [MBPO, DHMBPO])
@pytest.mark.parametrize("target", ["path", "stream"])
def test_bytecode_of_another_python_is_not_unpickled(cls, target, tmp_path):
    """It would crash the interpreter, or blame pickling."""
    arguments = {"termination_fn": lambda obs, action, next_obs: next_obs[:, 0] > 5, "learning_rate": lambda left: 1e-3 * left}
    agent = cls("MlpPolicy", CountingEnv(), buffer_size=100, device="cpu", **arguments)
    agent.save(tmp_path / "agent.zip")
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive:
        info = archive.read("system_info.txt").decode()
    assert "Python: 3." in info

    def change(attributes):
        # So that unpickling it shows
        for name in ("termination_fn", "learning_rate", "lr_schedule"):
            pickled = base64.b64decode(attributes[name][":serialized:"])
            attributes[name][":serialized:"] = base64.b64encode(pickled.replace(b"_make_function", b"_make_nonsense")).decode()

    rewritten(tmp_path / "agent.zip", change, system_info=info.replace("Python: 3.", "Python: 3.9"))

    def load(**kwargs):
        file = io.BytesIO((tmp_path / "agent.zip").read_bytes()) if target == "stream" else tmp_path / "agent.zip"
        return cls.load(file, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"saved by Python 3\.9\d+, .* cannot run: .*`termination_fn`") as error:
            load()
    # The advice is good
    advice = re.search(r"`custom_objects=(\{.*?\})`", str(error.value))[1]
    assert sorted(eval(advice)) == ["learning_rate", "lr_schedule", "termination_fn"]
    loaded = load(custom_objects=eval(advice))
    obs = np.zeros(agent.observation_space.shape, np.float32)
    assert loaded.predict(obs, deterministic=True)[0] == agent.predict(obs, deterministic=True)[0]
    assert load(custom_objects={**eval(advice), "termination_fn": is_high}).termination_fn is is_high


def test_functions_of_a_module_are_loaded_by_another_python(tmp_path):
    agent = make_agent(CountingEnv(), termination_fn=is_high)
    agent.save(tmp_path / "agent.zip")
    rewritten(tmp_path / "agent.zip", lambda attributes: None, system_info="- Python: 3.9.1\n")
    assert MBPO.load(tmp_path / "agent.zip").termination_fn is is_high


def test_a_function_that_cannot_be_unpickled_is_not_lost_silently(tmp_path):
    """As of another version of Python; SB3 itself warns and goes on without it."""
    agent = make_agent(CountingEnv(), reward_fn=lambda obs, action, next_obs: action[:, 0])
    agent.save(tmp_path / "agent.zip")

    class Unreadable:
        def __reduce__(self):
            return len, (3,)

    def change(attributes):
        attributes["reward_fn"][":serialized:"] = base64.b64encode(pickle.dumps(Unreadable())).decode()

    rewritten(tmp_path / "agent.zip", change)
    with (
        pytest.warns(UserWarning, match="Could not deserialize object reward_fn"),
        pytest.raises(ValueError, match=r"`reward_fn` in .*agent\.zip cannot be unpickled.*custom_objects"),
    ):
        MBPO.load(tmp_path / "agent.zip")
    assert MBPO.load(tmp_path / "agent.zip", custom_objects={"reward_fn": None}).reward_fn is None


def test_arrays_as_arguments(saved):
    """Which are neither equal nor unequal to what is saved."""
    with pytest.raises(ValueError, match="with ensemble_size changed"):
        MBPO.load(saved, ensemble_size=4, stats_window_size=np.array([1, 2]))


def test_replay_buffer_that_was_deleted(agent, tmp_path):
    agent.save_replay_buffer(tmp_path / "buffer.pkl")
    fresh = make_agent(seed=3)
    del fresh.replay_buffer
    fresh.load_replay_buffer(tmp_path / "buffer.pkl")
    assert fresh.replay_buffer.size() == 120


def test_damaged_replay_buffer(agent, tmp_path):
    path = tmp_path / "buffer.pkl"
    agent.save_replay_buffer(path)
    data = path.read_bytes()
    fresh = make_agent(seed=3)
    before = fresh.replay_buffer
    for damaged in (data[: len(data) // 2], b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"buffer\.pkl cannot be loaded \(truncated or altered\?\)"):
            fresh.load_replay_buffer(path)
        assert fresh.replay_buffer is before
    with pytest.raises(FileNotFoundError):
        fresh.load_replay_buffer(tmp_path / "missing")
    path.write_bytes(pickle.dumps("a string"))
    with pytest.raises(AssertionError, match="must inherit from ReplayBuffer"):
        fresh.load_replay_buffer(path)
    assert fresh.replay_buffer is before


@pytest.mark.parametrize(
    "other, name",
    [(CountingEnv(), "observation space"), (gym.make("Pendulum-v1", disable_env_checker=True), "action space")],
    ids=["observations", "actions"],
)
def test_replay_buffer_of_another_environment(other, name, agent, tmp_path):
    if name == "action space":
        other = gym.wrappers.RescaleAction(other, -1.0, 1.0)
    make_agent(other).save_replay_buffer(tmp_path / "buffer.pkl")
    fresh = make_agent()
    with pytest.raises(ValueError, match=rf"buffer\.pkl has the {name} Box.*agent's is Box"):
        fresh.load_replay_buffer(tmp_path / "buffer.pkl")
    fresh.learn(62)


@pytest.mark.parametrize("name", ["termination_fn", "reward_fn"])
def test_functions_that_cannot_be_saved_are_refused_at_once(name):
    lock = threading.Lock()

    def function(obs, action, next_obs):
        with lock:
            return np.zeros(len(obs), dtype=bool if name == "termination_fn" else float)

    with pytest.raises(ValueError, match=rf"`{name}` must be picklable.*lock"):
        make_agent(**{name: function})


def test_checkpoints_of_a_run_are_all_complete(tmp_path):
    make_agent().learn(130, callback=CheckpointCallback(30, tmp_path, save_replay_buffer=True))
    assert sorted(path.name for path in tmp_path.iterdir() if "buffer" not in path.name) == sorted(
        f"rl_model_{step}_steps.zip" for step in (30, 60, 90, 120)
    )
    for path in tmp_path.glob("*.zip"):
        assert zipfile.ZipFile(path).testzip() is None
