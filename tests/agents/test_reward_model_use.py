import numpy as np
import torch

from llm_duel_env.agents import selection
from llm_duel_env.agents.reward_models.ensemble import EnsembleConfig, EnsembleRewardModel
from llm_duel_env.agents.reward_models.use import rewards_of


def test_a_response_that_a_prompt_has_twice_is_looked_at_once_and_stands_in_all_its_places():
    texts = np.array([["b", "a", "b", "c"], ["a", "a", "a", "a"], ["c", "a", "d", "b"]], dtype=object)
    vectors = {text: torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i, text in enumerate("abcd")}
    features = torch.stack([torch.stack([vectors[text][m] for text in row]) for m, row in enumerate(texts)])
    ensemble = EnsembleRewardModel(5, EnsembleConfig(members=3, hidden=8), seed=0)
    seen = []

    class Counting:
        def __call__(self, asked):
            seen.append(tuple(asked.shape))
            return ensemble(asked)

    found = rewards_of(Counting(), features, torch.from_numpy(selection.identities(texts)))
    assert seen == [(3 + 1 + 4, 5)]  # "a" in two prompts is two responses
    torch.testing.assert_close(found, ensemble(features))
    assert torch.equal(found[:, 0, 0], found[:, 0, 2])
