"""What each rank does in the tests of the DeepSpeed learner: `deepspeed_worker.py FOLDER`, under a launcher.

FOLDER holds job.json: a model folder, and cases by name, each a DeepSpeed configuration with settings of the policy.
Rank 0 leaves FOLDER/NAME.json and FOLDER/NAME.safetensors for each; a case with "resume" also checkpoints, and one
with "reset" too also exports and begins anew. A case with "from" goes on from the checkpoint in that folder, and saves
it again. One with "differ" has a weight of rank 1 change by itself at the end.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.language_model import LanguageModelPolicy
from llm_duel_env.agents.policies.learners import torch_learner
from llm_duel_env.ranks import RanksDiffer
from llm_duel_env.types import Candidates

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

CONFIG = PolicyConfig(learning_rate=3e-3, warmup=0.0, batch=4, microbatch=1, grad_clip=0.5)
ROUNDS, CUT = 4, 2
LOSS = direct_optimizer("dpo", 0.5)


def ranked(policy: LanguageModelPolicy, number: int) -> Candidates:
    """Seven fixed pairs for a round, of many lengths, one of a single token."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(1, 11, (7, 2))
    lengths[0] = 1
    tokens = rng.integers(6, 46, (7, 2, 10))
    tokens[np.arange(10) >= lengths[..., None]] = 0
    observation = fixtures.observe(rng.integers(0, 50, 7))
    return Candidates(observation, policy.tokens.decode(tokens, lengths), tokens, lengths)


def play(policy: LanguageModelPolicy, rounds: range) -> list[dict]:
    return [
        policy.learn(LOSS, ranked(policy, number), progress=number / ROUNDS, key=("round", number)) for number in rounds
    ]


def make(model: str, config: PolicyConfig) -> LanguageModelPolicy:
    return LanguageModelPolicy(fixtures.make_view(model), config, seed=0, device="cpu")


def drift(policy: LanguageModelPolicy) -> str:
    """What a step says after which one of rank 1's weights is not rank 0's."""
    torch_learner.CHECK_EVERY = 1
    take_step = policy.learner.engine.step

    def step() -> None:
        take_step()
        if policy.learner.rank == 1:
            next(iter(policy.learner.parameters.values())).data.flatten()[0] += 1.0

    policy.learner.engine.step = step
    try:
        play(policy, range(1))
    except RanksDiffer as error:
        return str(error)
    return ""


def run_case(name: str, case: dict, model: str, folder: Path) -> None:
    path = folder / f"{name}.deepspeed.json"
    path.write_text(json.dumps(case["deepspeed"]))
    settings = replace(CONFIG, learner="deepspeed", deepspeed_config=str(path), **case.get("policy", {}))
    policy = make(model, settings)
    if "from" in case:
        policy.load(Path(case["from"]))
        policy.save(folder / name / "checkpoint")
    metrics = [] if "from" in case else play(policy, range(CUT))
    if case.get("resume"):
        policy.save(folder / name / "checkpoint")
    metrics += play(policy, range(CUT, ROUNDS))
    tensors = policy.learner.weights()
    result = {"metrics": metrics, "rank": policy.learner.rank, "world": policy.learner.world}
    pairs = ranked(policy, 9)
    result["log_prob"] = policy.log_prob(pairs).tolist()
    result["reference"] = policy.reference_log_prob(pairs).tolist()
    result["sampled"] = policy.sample(fixtures.observe([3, 11]), 2, ("s",)).tokens.tolist()
    if case.get("resume"):
        again = make(model, settings)
        again.load(folder / name / "checkpoint")
        told = json.loads((folder / name / "checkpoint" / "deepspeed.json").read_text())
        result["own form"] = all(told[key] == value for key, value in again.learner.form.items())
        play(again, range(CUT, ROUNDS))
        resumed = again.learner.weights()
        if again.learner.rank == 0:
            result["resumed"] = all(np.array_equal(tensors[key], resumed[key]) for key in tensors)
    if case.get("reset"):
        again.export(folder / name / "export")
        again.reset()
        play(again, range(ROUNDS))
        anew = again.learner.weights()
        if again.learner.rank == 0:
            save_file({k: v.contiguous() for k, v in anew.items()}, folder / f"{name}.anew.safetensors")
        try:
            broken = ranked(again, 0)
            again.learn(lambda r: (r.policy.sum() * float("nan"), {}), broken, progress=0.0, key=("nan",))
        except FloatingPointError as error:
            result["diverged"] = str(error)
        result["kept"] = all(np.array_equal(anew[k], v) for k, v in again.learner.weights().items())
    if policy.learner.rank == 0:
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    if case.get("differ"):
        result["differ"] = drift(policy)
    (folder / f"{name}.{policy.learner.rank}.json").write_text(json.dumps(result))


def main() -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    for name, case in job["cases"].items():
        run_case(name, case, job["model"], folder)


if __name__ == "__main__":
    main()
