"""What agents sample from and train."""

from __future__ import annotations

from llm_duel_env.agents.policies.base import Policy, PolicyConfig
from llm_duel_env.tasks.base import TaskView


def make_policy(task: TaskView, config: PolicyConfig, *, seed: int) -> Policy:
    """The policy that fits a task: a softmax over candidates on finite tasks, a causal language model on text tasks."""
    if task.kind == "finite":
        from llm_duel_env.agents.policies.candidate import CandidatePolicy

        return CandidatePolicy(task, config, seed=seed)
    from llm_duel_env.agents.policies.language_model import LanguageModelPolicy

    return LanguageModelPolicy(task, config, seed=seed)
