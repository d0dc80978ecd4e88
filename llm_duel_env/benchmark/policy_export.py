"""The language model of a run, for others to load: an ordinary folder of transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.run_folder import RunFolder


def export_policy(run: Path, out: Path) -> Path:
    """Writes the policy of a run's last checkpoint as a model folder with its tokenizer, an adapter merged.

    Nothing is bought and nothing in the run changes. It is the policy that the agent samples from and trains; an agent
    that deploys otherwise, as best-of-N does, deploys more than this model.

    Args:
        run: folder of the run.
        out: the folder to write; it appears whole or not at all.

    Raises:
        ValueError: no run or no checkpoint there, a finite task, whose policy is no language model, or `out` is taken.
    """
    config, folder = RunConfig.read(run), RunFolder(run)
    checkpoint = folder.saved()
    if checkpoint is None:
        raise ValueError(f"export: expected a checkpoint in {run}, got none: the run has not saved yet")
    if out.exists():
        raise ValueError(f"export: expected a folder that does not exist yet, got {out}")
    from llm_duel_env.benchmark.session import Session  # brings torch

    with Session(config, folder) as session:
        policy = session.agent.policy
        if not hasattr(policy, "export"):
            raise ValueError(f"export: {config.env} is a finite task: its policy is no language model")
        session.agent.load(checkpoint / "agent")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=out.name, dir=out.parent) as fresh:
            policy.export(Path(fresh) / "policy")
            (Path(fresh) / "policy").rename(out)
    return out
