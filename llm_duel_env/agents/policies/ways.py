"""How a model may be run so that work is shared, found out by trying each way on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from llm_duel_env.agents.policies import output_layer, packed_rows, shared_prefix


@dataclass(frozen=True)
class Ways:
    """What `scoring.log_probs` and `scoring.features` are told of a model."""

    share_prefix: bool
    """Whether responses can attend to one copy of their prompt: `shared_prefix.works`."""
    linear_head: bool
    """Whether logits are one linear layer of the last hidden states: `output_layer.is_linear`."""
    packed: bool
    """Whether responses can stand behind their prompt in one row: `packed_rows.works`."""

    @staticmethod
    def of(model: PreTrainedModel, *, rough: bool) -> Ways:
        """Tries each way. `rough` says that matrix products run in bfloat16, within the precision of which they agree."""
        states, logits = (0.1, 0.1) if rough else (1e-3, 1e-4)
        return Ways(
            share_prefix=shared_prefix.works(model, tolerance=states),
            linear_head=output_layer.is_linear(model, tolerance=logits),
            packed=packed_rows.works(model, tolerance=states),
        )
