"""An agent by somebody else: the sample that DPO has raised most duels with the one that it has lowered most.

`pip install -e .` in this folder, and `llm-duel enter margin_duelist` plays it beside online DPO and prints the table.
Not installed, the same is `llm-duel enter their_agent.py:MarginDuelist`. It plays finite tasks and text alike.
"""

from dataclasses import dataclass, field

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.policies.base import PolicyConfig


@dataclass(frozen=True)
class MarginDuelistConfig(AgentConfig):
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(learning_rate=0.03, warmup=0.0, temperature=1.0))
    candidates: int = 8
    beta: float = 0.2


class MarginDuelist(Agent):
    Config = MarginDuelistConfig

    def act(self, observation):
        drawn = self.policy.sample(observation, self.config.candidates, ("act", self.round))
        raised = self.policy.log_prob(drawn) - self.policy.reference_log_prob(drawn)  # (M, N), DPO's implicit reward
        order = raised.argsort(dim=1).numpy()
        return drawn.duel(order[:, -1], order[:, 0])

    def learn(self, preferences):
        loss = direct_optimizer("dpo", self.config.beta)
        return self.policy.update(loss, preferences, progress=self.progress, key=("learn", self.round))
