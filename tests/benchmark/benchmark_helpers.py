"""Small runs for the tests of the benchmark, and a child process that is killed at chosen moments."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

from llm_duel_env.benchmark.run_config import RunConfig

WORLD = {"task_kwargs": {"candidates": 6, "train_prompts": 40, "heldout_prompts": 24}}
SMALL_ERM = {"reward_model.members": 3, "reward_model.hidden": 8, "reward_model.start": 16, "reward_model.steps": 2}


def config(folder, **changes):
    """A run of well under a second."""
    base = RunConfig(
        agent="online_dpo",
        env="duel/Synthetic-v0",
        folder=str(folder),
        seed=3,
        budget=100,
        batch=8,
        overrides={"policy.learning_rate": 1e-2},
        env_kwargs=WORLD,
        eval_every=0.1,
        eval_prompts=24,
    )
    return dataclasses.replace(base, **changes)


def sea(folder, **changes):
    """The agent with the most state."""
    overrides = {"policy.learning_rate": 1e-2, "candidates": 4, "burn_in": 0.1} | SMALL_ERM
    return config(folder, agent="sea", overrides=overrides, budget=200, **changes)


def silent(_line):
    """Takes lines of progress and says nothing."""


def untimed(path):
    """The metrics of a run without its times."""
    lines = [json.loads(line) for line in Path(path, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(moment, number):
    """Makes this process kill itself at the `number`-th time that `moment` comes."""
    from llm_duel_env.benchmark.run_folder import MetricsFile, RunFolder
    from llm_duel_env.ledger import Ledger

    left = [number]

    def countdown():
        left[0] -= 1
        if left[0] == 0:
            _die()

    def after(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            countdown()
            return result

        setattr(owner, name, wrapped)

    if moment == "bought":  # labels on the disk, and nobody has learnt from them
        after(Ledger, "append")
    elif moment == "torn ledger":
        original = Ledger._write

        def write(self, lines):
            left[0] -= 1
            if left[0] == 0:
                whole = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
                with open(self.path, "ab") as file:
                    file.write(whole[: len(whole) - 20])
                _die()
            return original(self, lines)

        Ledger._write = write
    elif moment == "logged":
        after(MetricsFile, "append")
    elif moment == "between renames":
        original_rename = Path.rename

        def rename(self, target):
            result = original_rename(self, target)
            if Path(target).name == "checkpoint.old":
                countdown()
            return result

        Path.rename = rename
    elif moment == "half a checkpoint":
        original_save = RunFolder.save

        def save(self, write):
            left[0] -= 1
            if left[0] == 0:
                fresh = self.path / "checkpoint.new"
                fresh.mkdir(exist_ok=True)
                write(fresh)
                _die()
            original_save(self, write)

        RunFolder.save = save
    elif moment == "told":  # what a round brought has reached this rank
        from llm_duel_env.benchmark import shared

        after(shared, "step")
    else:
        raise ValueError(moment)


def as_rank():
    """Plays or resumes a run as one of several ranks; one of them may kill itself at a chosen moment."""
    from llm_duel_env.benchmark.runner import run

    plan = json.loads(sys.argv[1])
    if plan["victim"] == int(os.environ["RANK"]):
        _arm(*plan["moment"])
    run(RunConfig(**plan["config"]), resume=plan["resume"], say=silent)


def main():
    """For each kill on standard input, forks a child that plays or resumes the run and dies; prints their ends.

    One process imports torch, and its children are forked before any thread of torch's was started.
    """
    from llm_duel_env.benchmark import session  # noqa: F401  imported once, for all children
    from llm_duel_env.benchmark.run_folder import RunFolder
    from llm_duel_env.benchmark.runner import run

    plan = json.load(sys.stdin)
    fates = []
    for moment, number in plan["kills"]:
        told = RunConfig(**plan["config"])
        child = os.fork()
        if child == 0:
            if moment not in ("time", "never"):
                _arm(moment, number)
            run(told, resume=RunFolder(told.folder).begun, say=silent)
            os._exit(0)
        if moment == "time":
            time.sleep(number)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        fates.append(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
    print(json.dumps(fates))


if __name__ == "__main__":
    as_rank() if len(sys.argv) > 1 else main()
