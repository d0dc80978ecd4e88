"""TRL's OnlineDPOTrainer as an agent (extra ``trl``): online DPO (arXiv 2402.04792) as the most used library has it.

Generation, loss, backward pass and optimizer are the trainer's own code. Only its loop is turned inside out, as here
the runner holds the loop and the oracle: `act` calls the trainer's generation, and `learn` its ``training_step``, which
is handed those responses and, as rewards, the labels that were bought. A test shows that the weights come out as the
trainer's own ``train()`` makes them.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from llm_duel_env import ranks
from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.policies.base import PolicyConfig, learning_rate
from llm_duel_env.baselines.global_seed import global_seed
from llm_duel_env.extras import require
from llm_duel_env.quiet import no_progress_bars
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences

if TYPE_CHECKING:  # they bring transformers with them
    from llm_duel_env.agents.policies.language_model import LanguageModelPolicy
    from llm_duel_env.agents.policies.tokens import Tokens

LOSS_TYPES = {"dpo": "sigmoid", "ipo": "ipo"}
"""Our names of the trainer's losses."""
FIXED = ("passes", "sampler", "learner", "asynchronous", "gradient_checkpointing", "lora_rank", "offload_reference")
"""Settings of our policies that the trainer would not follow: refused where they are not the default."""


@dataclass(frozen=True)
class TRLPolicyConfig(PolicyConfig):
    """The trainer's defaults, where they are not ours."""

    final_learning_rate: float = 0.0
    """The cosine schedule ends at this share of the peak (TRL: a linear decay to 0, over steps and not queries)."""
    warmup: float = 0.0
    """Share of the query budget over which the learning rate rises from 0 (TRL: 0)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moments (TRL: 0.9, 0.999)."""
    passes: int = 1
    """Passes over each round's pairs: 1, the trainer takes one step on what it has generated."""
    batch: int = 128
    """Pairs per training step, at most (TRL: 8); a round with fewer pairs is one step."""
    microbatch: int = 128
    """Plays no part: a training step is one forward and backward pass."""
    temperature: float = 0.9
    """Sampling temperature for duels (TRL: 0.9)."""


@dataclass(frozen=True)
class TRLOnlineDPOConfig(AgentConfig):
    """Defaults are TRL's; its penalty on responses without an end is off there too."""

    policy: TRLPolicyConfig = field(default_factory=TRLPolicyConfig)
    """How the trainer samples and learns."""
    loss: str = "dpo"
    """The trainer's loss: dpo (its ``sigmoid``) or ipo."""
    beta: float = 0.1
    """Strength of the pull to the reference policy (TRL: 0.1); IPO's tau."""


class TRLOnlineDPO(Agent):
    """Two samples of the present policy duel; TRL's trainer takes a step on the label."""

    Config = TRLOnlineDPOConfig
    paper = "https://arxiv.org/abs/2402.04792"
    provenance = "paper"
    policy_fixed = FIXED
    kinds: ClassVar[frozenset[str]] = frozenset({"text"})
    config: TRLOnlineDPOConfig
    policy: LanguageModelPolicy

    def __init__(self, task: TaskView, config: TRLOnlineDPOConfig, *, seed: int, budget: int) -> None:
        if config.loss not in LOSS_TYPES:
            raise ValueError(f"loss: TRL's trainer has {sorted(LOSS_TYPES)}, got {config.loss!r}")
        if not 0 < config.beta < float("inf"):
            raise ValueError(f"beta: expected a finite positive number, got {config.beta!r}")
        for setting in fields(config.policy):
            value = getattr(config.policy, setting.name)
            if setting.name in FIXED and value != setting.default:
                wanted = f"TRL's trainer takes {setting.default!r} only"
                raise ValueError(f"policy.{setting.name}: {wanted}, got {value!r}")
        if ranks.world() > 1:
            raise ValueError(f"trl_online_dpo: TRL's trainer plays on one rank, got {ranks.world()}")
        super().__init__(task, config, seed=seed, budget=budget)
        require("trl", f"agent {type(self).__name__}")
        self.devices = [self.policy.device] if self.policy.device.type == "cuda" else []
        self.labels: list[float] = []
        """What the trainer's reward function says of the responses of the training step in progress, (2 M,)."""
        with global_seed(seed, "trl", "trainer", devices=self.devices), no_progress_bars():
            self.trainer = self._make_trainer()
        # Its moments are saved, loaded and counted by the learner, like those of our own optimizer.
        learner: Any = self.policy.learner  # torch's: the others are refused above
        learner.optimizer = self.trainer.create_optimizer()
        learner.fused = bool(learner.optimizer.defaults.get("fused"))

    def _make_trainer(self) -> Any:
        policy, config = self.policy, self.config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the module is experimental, and that beta is no list
            library = importlib.import_module("trl.experimental.online_dpo")
        # The trainer makes its folder at once, and would write to it at checkpoints only.
        with tempfile.TemporaryDirectory() as folder:
            arguments = library.OnlineDPOConfig(
                output_dir=folder,
                report_to="none",
                save_strategy="no",
                use_cpu=policy.device.type == "cpu",
                bf16=policy.bf16,
                gradient_checkpointing=False,
                seed=self.seed,
                learning_rate=config.policy.learning_rate,
                adam_beta1=config.policy.betas[0],
                adam_beta2=config.policy.betas[1],
                weight_decay=config.policy.weight_decay,
                max_grad_norm=config.policy.grad_clip,
                temperature=config.policy.temperature,
                max_new_tokens=policy.tokens.max_new_tokens,
                max_length=policy.tokens.max_prompt_tokens + policy.tokens.max_new_tokens,
                loss_type=LOSS_TYPES[config.loss],
                beta=config.beta,
            )
            trainer = _with_given_responses(library.OnlineDPOTrainer)(
                model=policy.model,
                ref_model=policy.reference,
                reward_funcs=self._rewards,
                args=arguments,
                train_dataset=[],  # never read: prompts come with `act`
                processing_class=copy.deepcopy(policy.tokenizer),  # which may be given a padding token
            )
        policy.model = trainer.accelerator.prepare_model(policy.model)
        trainer.processing_class = _Processing(policy.tokens, policy.device)
        return trainer

    def _rewards(self, **_: object) -> list[float]:
        return self.labels

    def act(self, observation: Observation) -> Duels:
        """Two samples for each prompt, by the trainer's generation."""
        policy, prompts = self.policy, list(observation["prompt"])
        with policy.clock("sample"):
            with global_seed(self.seed, "trl", "act", self.round, devices=self.devices):
                _, _, ids, mask, _ = self.trainer._generate(policy.model, prompts)
            # The trainer has all first responses before all second ones.
            tokens = (ids * mask).view(2, len(prompts), -1).transpose(0, 1).cpu().numpy()
            lengths = mask.sum(dim=1).view(2, len(prompts)).T.cpu().numpy()
        policy.generated_tokens += int(lengths.sum())
        return Candidates(observation, policy.tokens.decode(tokens, lengths), tokens, lengths).first_two()

    def learn(self, preferences: Preferences) -> Metrics:
        """A training step on each `batch` of the round's labelled duels; of a tie the trainer prefers the first."""
        told = preferences.rows(~np.isnan(preferences.first_wins))
        if not len(told):
            return {}
        rate, size = learning_rate(self.config.policy, self.progress), self.config.policy.batch
        totals: dict[str, float] = {}
        norms = []
        with self.policy.clock("learn"), global_seed(self.seed, "trl", "learn", self.round, devices=self.devices):
            for start in range(0, len(told), size):
                part = told.rows(np.arange(start, min(start + size, len(told))))
                self.policy.learner.begin(rate)
                for name, value in self.backward(part).items():
                    totals[name] = totals.get(name, 0.0) + value * len(part) / len(told)
                norms.append(self.policy.learner.step())
        return totals | {
            "grad_norm": float(np.mean(norms)),
            "learning_rate": rate,
            "gradient_steps": float(len(norms)),
            "pairs": float(len(told)),
        }

    def backward(self, preferences: Preferences) -> Metrics:
        """The trainer's ``training_step`` on duels that all have a label: adds the gradients of its loss to those there
        are, and returns ``loss``, ``margin`` and ``accuracy``."""
        trainer, model = self.trainer, self.policy.model
        first = preferences.first_wins
        self.labels = np.concatenate([first, 1 - first]).tolist()
        trainer.given = self._tensors(preferences.pair)
        try:
            loss = float(trainer.training_step(model, {"prompt": list(preferences.pair.observation["prompt"])}))
        finally:
            trainer.given = None
            model.eval()
        logged, trainer.stats = trainer.stats, {name: [] for name in trainer.stats}
        (margin,), (accuracy,) = logged["rewards/margins"], logged["rewards/accuracies"]
        return {"loss": loss, "margin": margin / self.config.beta, "accuracy": accuracy}

    def _tensors(self, pair: Candidates) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """What the trainer's generation would have returned for these M pairs: prompts and completions with their
        masks, (2 M, tokens) each, all first responses before all second ones; and no images."""
        device = self.policy.device
        assert pair.tokens is not None
        assert pair.lengths is not None
        prompts = self.trainer.processing_class(pair.observation["prompt"])
        tokens = torch.from_numpy(pair.tokens).transpose(0, 1).flatten(0, 1).to(device)
        lengths = torch.from_numpy(pair.lengths).T.flatten().to(device)
        inside = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        tokens = tokens.masked_fill(~inside, self.trainer._tokenizer.pad_token_id)
        ids, mask = (prompts[name].repeat(2, 1) for name in ("input_ids", "attention_mask"))
        return ids, mask, tokens, inside.long(), None


def _with_given_responses(trainer: type) -> type:
    """The trainer, whose ``training_step`` learns from `given` instead of generating anew, where there is any."""

    class Trainer(trainer):  # type: ignore[misc]
        given: tuple | None = None

        def _generate(self, model: Any, prompts: Any, images: Any = None) -> tuple:
            return super()._generate(model, prompts, images) if self.given is None else self.given

    return Trainer


class _Processing:
    """Stands for the trainer's tokenizer: prompts get the tokens that every other agent sees (BOS, chat template, cut
    at the same place), which the trainer leaves to the data set."""

    def __init__(self, tokens: Tokens, device: torch.device) -> None:
        self.tokens, self.device = tokens, device

    def __call__(self, text: Sequence[str], **_: object) -> dict[str, Tensor]:
        from llm_duel_env.agents.policies.shared_prefix import pad_left

        ids, mask = pad_left(self.tokens.prompts(text), self.device)
        return {"input_ids": ids, "attention_mask": mask.long()}

    def batch_decode(self, ids: Tensor, **options: Any) -> list[str]:
        return self.tokens.tokenizer.batch_decode(ids, **options)
