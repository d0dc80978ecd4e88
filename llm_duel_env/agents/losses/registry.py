"""What is known of a loss, and a loss with its settings fixed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llm_duel_env.agents.policies.ranked import RankedLogProbs, TokenLogProbs
from llm_duel_env.types import Metrics


@dataclass(frozen=True)
class LossInfo:
    """One direct optimizer, as the zoo and its listing know it."""

    function: Callable[..., tuple[Tensor, Metrics]]
    """Takes `RankedLogProbs`, and its settings by keyword."""
    paper: str
    """Where it was published."""
    needs: AbstractSet[str]
    """What it looks at beyond the policy's log-probabilities: a subset of {scores, tokens, ranking, reference}."""
    provenance: Literal["paper", "reconstructed", "ours"]
    """Whether it follows a paper's text, was rebuilt from notes, code or memory, or is this project's own."""

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword settings with their defaults; `inspect.Parameter.empty` for beta."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def options(self) -> dict[str, float]:
        """The settings other than beta, with their defaults."""
        return {name: default for name, default in self.settings.items() if name != "beta"}

    @property
    def summary(self) -> str:
        """The rule in one line."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class NamedLoss:
    """A loss with its settings fixed: a `DirectOptimizer`."""

    name: str
    info: LossInfo
    settings: Mapping[str, Any]

    @property
    def needs_tokens(self) -> bool:
        """Whether it looks at single tokens."""
        return "tokens" in self.info.needs

    def __call__(self, ranked: RankedLogProbs, /) -> tuple[Tensor, Metrics]:
        """The mean over the B rows, and what to log."""
        return self.info.function(ranked, **self.settings)


def named_loss(
    name: str, info: LossInfo, beta: float, options: Mapping[str, Any], gives: AbstractSet[str]
) -> NamedLoss:
    """See `direct_optimizer`."""
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta: expected a positive number, got {beta!r}")
    missing = info.needs & {"scores", "ranking"} - gives
    if missing:
        got = f"got {sorted(gives)} beyond duels" if gives else "got duels alone"
        raise ValueError(f"loss {name} needs {sorted(missing)}, which this agent does not hand over: {got}")
    known = info.options
    settings: dict[str, Any] = {"beta": beta} if "beta" in info.settings else {}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"loss {name} has no option {option!r}; it has {sorted(known)}")
        settings[option] = _checked(f"loss_options.{option}", value, known[option])
    loss = NamedLoss(name, info, settings)
    loss(_example())  # a setting that can only fail fails here, before anything is spent
    return loss


def _checked(name: str, value: Any, default: Any) -> Any:
    """The value as the default's type. ValueError where it is not of that kind, or not finite."""
    if isinstance(default, bool):
        fits = isinstance(value, bool)
    else:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        fits = fits and (isinstance(default, float) or value == int(value))
    if not fits:
        raise ValueError(f"{name}: expected something like {default!r} ({type(default).__name__}), got {value!r}")
    return type(default)(value)


def _example() -> RankedLogProbs:
    """One pair of one-token responses with everything that a loss can ask for."""
    log_probs = torch.tensor([[-1.0, -2.0]])
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    return RankedLogProbs(
        policy=log_probs,
        reference=log_probs,
        lengths=torch.ones(1, 2),
        from_reference=mask[..., 0],
        scores=torch.tensor([[1.0, 0.0]]),
        tokens=TokenLogProbs(log_probs[..., None], log_probs[..., None], mask, torch.tensor([[[0], [1]]])),
    )
