"""Runs with DeepSpeed's learner on two ranks: the duels, labels and learning of the torch learner on one, whoever
starts them, and whoever is killed."""

import dataclasses
import importlib.util
import shlex
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from benchmark_helpers import SMALL_ERM, config, silent
from test_ranks_run import KILLED, assert_alike, play

from llm_duel_env.benchmark.launcher import launch
from llm_duel_env.benchmark.run_folder import RunFolder
from llm_duel_env.benchmark.runner import command_line, run

if importlib.util.find_spec("deepspeed") is None:
    not_tested = "NOT TESTED: deepspeed is not installed here; `make test-deepspeed` runs these tests where it is"
    warnings.warn(not_tested, stacklevel=1)
    pytest.skip(not_tested, allow_module_level=True)

pytestmark = pytest.mark.timeout(900)  # the first run builds DeepSpeed's communication op
ZERO3 = '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for name, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "PASSIVE"), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.setenv(name, value)


def told(folder, learner="deepspeed", **overrides):
    policy = {"learning_rate": 1e-4, "temperature": 1.0, "encoder": "task", "learner": learner} | overrides
    return config(
        folder,
        agent="sea",
        env="duel/TinyTLDR-v0",
        overrides=SMALL_ERM
        | {"candidates": 4, "reward_model.start": 8, "burn_in": 0.3}
        | {f"policy.{name}": value for name, value in policy.items()},
        env_kwargs={"task_kwargs": {"oracle": "reward_model"}},  # which shares its work among the ranks
        budget=24,
        batch=5,  # no rank has as much as the other
        eval_prompts=7,
        eval_every=0.5,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The torch learner's run on one rank."""
    plan = told(tmp_path_factory.mktemp("alone") / "run", learner="torch")
    run(plan, say=silent)
    return plan


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def words(plan):
    return shlex.split(command_line(plan, resume=False))[1:]


def test_llm_duel_run_with_ranks(tmp_path, alone, capfd):
    plan = told(tmp_path / "run")
    assert launch([sys.executable, "-m", "llm_duel_env.cli", *words(plan)], 2) == 0, capfd.readouterr().err
    assert_alike(alone, plan)


def test_killed_on_two_ranks_it_goes_on_with_one_under_another_stage(tmp_path, alone, capfd):
    settings = tmp_path / "zero.json"
    settings.write_text(ZERO3)
    plan = told(tmp_path / "run", deepspeed_config=str(settings))
    plan = dataclasses.replace(plan, checkpoint_every=0.01)
    assert play(plan, 2, victim=0, moment=["bought", 4]) == KILLED
    saved = RunFolder(plan.folder).saved()
    assert saved is not None
    assert (saved / "agent" / "policy" / "deepspeed.json").exists()
    settings.write_text('{"zero_optimization": {"stage": 2}}')
    assert play(plan, 1, resume=True) == 0, capfd.readouterr().err
    assert_alike(alone, plan)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_other_launchers(tmp_path, alone, launcher):
    plan = told(tmp_path / "run")
    if launcher == "torchrun":
        command = ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "llm_duel_env.cli"]
    else:
        command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
        command += ["--no_local_rank", "--module", "llm_duel_env.cli"]
    command[0] = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run([*command, *words(plan)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert_alike(alone, plan)
