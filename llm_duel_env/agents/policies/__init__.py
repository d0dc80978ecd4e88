"""What agents sample from and train."""

from __future__ import annotations

from llm_duel_env.agents.policies.base import Policy, PolicyConfig
from llm_duel_env.tasks.base import TaskView


def make_policy(task: TaskView, config: PolicyConfig, *, seed: int) -> Policy:
    """The policy that fits a task: a softmax over candidates on finite tasks, a causal language model on text tasks.

    Raises:
        ValueError: see the two policies; or a sampler of language models is chosen for a finite task.
    """
    if task.kind == "finite":
        if config.sampler != "torch":
            raise ValueError(f"policy.sampler={config.sampler} is for text; {task.name} has finite candidates")
        for name in ("learner", "gradient_checkpointing", "lora_rank", "offload_reference"):
            if getattr(config, name) != getattr(PolicyConfig, name):
                raise ValueError(
                    f"policy.{name}={getattr(config, name)} is for text; {task.name} has finite candidates"
                )
        from llm_duel_env.agents.policies.candidate import CandidatePolicy

        return CandidatePolicy(task, config, seed=seed)
    from llm_duel_env.agents.policies.language_model import LanguageModelPolicy

    return LanguageModelPolicy(task, config, seed=seed)
