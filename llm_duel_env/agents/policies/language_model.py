"""A causal language model as a policy: a sampler, a learner, a frozen reference and a frozen encoder."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_duel_env import ranks
from llm_duel_env.agents.policies import background
from llm_duel_env.agents.policies.background import Background
from llm_duel_env.agents.policies.base import DirectOptimizer, Policy, PolicyConfig, check_mixture
from llm_duel_env.agents.policies.checkpointing import checkpointing
from llm_duel_env.agents.policies.encoder import FrozenEncoder, load_encoder
from llm_duel_env.agents.policies.learners.lesson import prepare
from llm_duel_env.agents.policies.learners.loop import train
from llm_duel_env.agents.policies.models import Models
from llm_duel_env.agents.policies.response_embedding import mean_hidden_states
from llm_duel_env.agents.policies.samplers.base import Sampler, numbered, weights
from llm_duel_env.agents.policies.samplers.torch_sampler import TorchSampler
from llm_duel_env.agents.policies.samplers.vllm_sampler import VLLMSampler
from llm_duel_env.agents.policies.scoring import Prompts, log_probs
from llm_duel_env.agents.policies.tokens import Tokens, end_tokens
from llm_duel_env.agents.policies.ways import Ways
from llm_duel_env.quiet import no_progress_bars
from llm_duel_env.randomness import generator
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.timing import Stopwatch
from llm_duel_env.types import Candidates, Metrics, Observation, batch_size

FEATURE_PROMPTS, FEATURE_SAMPLES = 64, 4
"""Training prompts, and the encoder's samples for each, that the features are standardised on."""


class LanguageModelPolicy(Policy):
    """Any causal language model that transformers loads.

    The reference and the encoder are one frozen copy of the start until `move_reference` gives the reference weights
    of its own: two models in memory, three after it; with LoRA one and two (`Models`).

    Args:
        task: names the model, its token limits, and the training prompts that features are standardised on.
        config: how it samples and learns.
        seed: of the keyed draws.
        device: None takes the GPU where there is one.
        bf16: run matrix products in bfloat16 (the weights stay float32); None does so on a GPU.

    Raises:
        ValueError: the task names no model or no limits, or prompt and response exceed the model's context.
    """

    def __init__(
        self,
        task: TaskView,
        config: PolicyConfig,
        *,
        seed: int,
        device: str | torch.device | None = None,
        bf16: bool | None = None,
    ) -> None:
        if not task.model or not task.max_new_tokens:
            got = f"{task.model!r}, {task.max_new_tokens!r}"
            raise ValueError(f"task {task.name}: a language-model policy needs model and max_new_tokens, got {got}")
        self.device = torch.device(device or ranks.device())
        self.bf16 = self.device.type == "cuda" if bf16 is None else bf16
        self.task, self.config, self.seed = task, config, seed
        self.models = Models(task.model, config, device=self.device, seed=seed, bf16=self.bf16)
        if config.asynchronous:
            background.check(config)
        self.model = self.models.policy
        """What the policy acts by; with `PolicyConfig.asynchronous` not what trains."""
        self.tokenizer = self.models.tokenizer()
        self.tokens = Tokens(
            self.tokenizer,
            eos=end_tokens(self.tokenizer, self.model.generation_config),
            max_prompt_tokens=self._prompt_limit(task),
            max_new_tokens=task.max_new_tokens,
        )
        self.encoder = self.models.encoder
        self.reference_version = 0
        with self.precision():
            self.ways = ways = Ways.of(self.encoder, rough=self.bf16)
        other = self.encoder
        if config.encoder != "policy":
            other = load_encoder(config.encoder, task, self.tokenizer, self.device)
            with self.precision():
                ways = Ways.of(other, rough=self.bf16)
        self.embedder = FrozenEncoder(other, self.precision, ways)
        self.feature_size = self.embedder.feature_size
        self.background: Background | None = None
        if config.asynchronous:
            self.background = Background(self.models.policy, lambda: self.models.using(self.models.policy))
            self.model = cast(PreTrainedModel, self.background.acting)
        self.models.start_learning()
        self.learner = self.models.learner
        self.vllm = self._make_vllm(task.model) if config.sampler == "vllm" else None
        self.generated_tokens = 0
        """Tokens of all responses that `sample` gave; greedy decoding and diagnosis are not counted."""
        self.clock = Stopwatch()

    def _prompt_limit(self, task: TaskView) -> int:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        assert task.max_new_tokens is not None
        if task.max_prompt_tokens is None:
            return min(1024, (context or 1 << 20) - task.max_new_tokens)
        if context is not None and task.max_prompt_tokens + task.max_new_tokens > context:
            got = f"max_prompt_tokens {task.max_prompt_tokens} + max_new_tokens {task.max_new_tokens}"
            raise ValueError(f"{task.model}: expected at most {context} tokens (its context), got {got}")
        return task.max_prompt_tokens

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage: sample, embed, reference, learn, evaluate."""
        return self.clock.seconds

    @property
    def reference(self) -> PreTrainedModel:
        """What the policy is held near: the encoder until `move_reference`."""
        return self.models.reference

    @property
    def gradient_steps(self) -> int:
        """Optimizer steps so far."""
        return self.learner.gradient_steps

    def precision(self) -> AbstractContextManager:
        """Within it matrix products run in bfloat16, where the policy does so."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def sample(
        self,
        observation: Observation,
        n: int,
        key: tuple[int | str, ...],
        *,
        reference: bool = False,
        temperature: float | None = None,
        mixture: float = 0.0,
    ) -> Candidates:
        """See `Policy.sample`. Draws are keyed by the prompt's id too: they do not depend on the rest of the batch."""
        check_mixture(mixture, reference)
        temperature = self.config.temperature if temperature is None else temperature
        with self.clock("sample"):
            model = self.reference if reference else self.model
            candidates = self._generate(model, observation, n, temperature, (self.seed, *key), mixture)
            assert candidates.lengths is not None
            self.generated_tokens += int(candidates.lengths.sum())
        if reference:
            return replace(candidates, from_reference=np.ones(candidates.shape, bool))
        return candidates

    def greedy(self, observation: Observation) -> Candidates:
        """See `Policy.greedy`."""
        with self.clock("evaluate"):
            return self._generate(self.model, observation, 1, None, None)

    def _generate(
        self,
        model: PreTrainedModel,
        observation: Observation,
        n: int,
        temperature: float | None,
        stream: tuple | None,
        mixture: float = 0.0,
    ) -> Candidates:
        """n responses to each prompt: by the draws that `stream` (seed, *key) names, or greedily where it is None; of
        the model and, with weight `mixture`, the reference."""
        if n < 1 or (temperature is not None and not temperature > 0):
            raise ValueError(f"expected n >= 1 and a positive temperature, got {n} and {temperature}")
        sampler = self._sampler(model, mixture)
        called = [] if sampler is self.vllm else [model, *([self.reference] if mixture else [])]
        prompts, draws = self._prompts(observation), numbered(observation["prompt_id"])
        rows = ranks.share(len(prompts))
        with self.models.using(*called):
            own = sampler.sample([prompts[i] for i in rows], draws[rows], stream, n=n, temperature=temperature or 1.0)
        tokens, lengths = (
            ranks.gather(torch.from_numpy(part), len(prompts)).numpy() for part in (own.tokens, own.lengths)
        )
        return Candidates(observation, self.tokens.decode(tokens, lengths), tokens, lengths)

    def _sampler(self, model: PreTrainedModel, mixture: float) -> Sampler:
        """vLLM's engine holds the policy alone: what is drawn from another model, or from a mixture, torch draws."""
        if self.vllm is not None and model is self.model and not mixture:
            return self.vllm
        return TorchSampler(
            model,
            eos=sorted(self.tokens.eos),
            max_new_tokens=self.tokens.max_new_tokens,
            share_prefix=self.ways.share_prefix,
            precision=self.precision,
            other=self.reference if mixture else None,
            mixture=mixture,
        )

    def _make_vllm(self, model: str) -> VLLMSampler:
        def score(prompts: Prompts, tokens: np.ndarray, lengths: np.ndarray) -> Tensor:
            ids, ends = torch.from_numpy(tokens).to(self.device), torch.from_numpy(lengths).to(self.device)
            with torch.no_grad(), self.precision(), self.models.using(self.model):
                return log_probs(self.model, prompts, ids, ends, share_prefix=self.ways.share_prefix)

        return VLLMSampler(
            model,
            self.models.whole_weights if self.background is None else lambda: weights(self.model),
            score,
            eos=sorted(self.tokens.eos),
            max_prompt_tokens=self.tokens.max_prompt_tokens,
            max_new_tokens=self.tokens.max_new_tokens,
            device=self.device,
            bf16=self.bf16,
            memory=self.config.sampler_memory,
        )

    def _prompts(self, observation: Observation) -> list[tuple[int, ...]]:
        if "prompt" not in observation or batch_size(observation) == 0:
            raise ValueError(f"expected an observation with at least one text prompt, got {sorted(observation)}")
        return self.tokens.prompts(observation["prompt"])

    def from_text(self, observation: Observation, responses: np.ndarray) -> Candidates:
        """Responses (M, N) str that were not sampled here (edited or recorded ones) as candidates, EOS added."""
        tokens, lengths = self.tokens.encode_responses(observation["prompt"], responses)
        return Candidates(observation, responses, tokens, lengths)

    def log_prob(self, candidates: Candidates) -> Tensor:
        """See `Policy.log_prob`: (M, N) float32 on the CPU."""
        with torch.no_grad():
            return self._score(self.model, candidates).cpu()

    def reference_log_prob(self, candidates: Candidates) -> Tensor:
        """See `Policy.reference_log_prob`: (M, N) float32 on the CPU."""
        if candidates.reference_log_prob is not None and candidates.reference_version == self.reference_version:
            return torch.from_numpy(candidates.reference_log_prob)
        with torch.no_grad(), self.clock("reference"):
            return self._score(self.reference, candidates).cpu()

    def _tensors(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        if candidates.tokens is None or candidates.lengths is None:
            raise ValueError("these candidates carry no token ids; make them with sample() or from_text()")
        return torch.from_numpy(candidates.tokens).to(self.device), torch.from_numpy(candidates.lengths).to(self.device)

    def _score(self, model: PreTrainedModel, candidates: Candidates, per_token: bool = False) -> Tensor:
        """See `Score`; without gradient, every rank its share of the prompts."""
        count = candidates.shape[0]
        with torch.no_grad(), self.models.using(model):
            own = self._log_probs(model, candidates.rows(ranks.share(count)), per_token)
        return ranks.gather(own, count)

    def _learning_score(self, candidates: Candidates, per_token: bool) -> Tensor:
        """See `Score`; of the policy, with gradient."""
        one_call = self.learner.uniform or self.config.gradient_checkpointing
        return self._log_probs(self.models.policy, candidates, per_token, one_call=one_call)

    def _log_probs(self, model: PreTrainedModel, candidates: Candidates, per_token: bool, **ways: bool) -> Tensor:
        prompts, (tokens, lengths) = self._prompts(candidates.observation), self._tensors(candidates)
        with self.precision():
            return log_probs(model, prompts, tokens, lengths, per_token=per_token, **ways, **asdict(self.ways))

    def embed(self, candidates: Candidates) -> Tensor:
        """See `Policy.embed`: on the CPU, standardised on the encoder's own samples, the same for every seed."""
        with self.clock("embed"), self.models.using(self.encoder):
            if self.embedder.statistics is None:
                observation = self.task.observe(np.arange(min(FEATURE_PROMPTS, self.task.train_prompts)))
                samples = self._generate(self.encoder, observation, FEATURE_SAMPLES, 1.0, (0, "feature statistics"))
                self.embedder.measure(self._prompts(observation), *self._tensors(samples))
            count = candidates.shape[0]
            own = candidates.rows(ranks.share(count))
            return ranks.gather(self.embedder(self._prompts(own.observation), *self._tensors(own)), count)

    def embed_responses(self, candidates: Candidates) -> Tensor:
        """See `Policy.embed_responses`: (M, N, hidden size) on the CPU, of the ids that were sampled."""
        with self.clock("embed"), self.precision(), self.models.using(self.encoder):
            count = candidates.shape[0]
            own = self._tensors(candidates.rows(ranks.share(count)))
            return ranks.gather(mean_hidden_states(self.encoder, *own).cpu(), count)

    def learn(
        self,
        loss: DirectOptimizer,
        ranked: Candidates,
        *,
        progress: float,
        key: tuple[int | str, ...],
        scores: np.ndarray | None = None,
        bonus: Candidates | None = None,
    ) -> Metrics:
        """See `Policy.learn`. In the background the metrics are those of the lesson before."""
        learnt = self.settle()
        lesson = prepare(loss, ranked, scores, bonus, self._reference_score)
        rng = generator(self.seed, *key)

        def train_on() -> Metrics:
            with self.clock("learn"), checkpointing(self.models.policy, self.config.gradient_checkpointing):
                score = self._learning_score
                return train(self.learner, loss, lesson, score, config=self.config, progress=progress, rng=rng)

        if self.background is None:
            if self.vllm is not None:
                self.vllm.rest()
            return train_on()
        self.background.start(train_on)
        return learnt

    def settle(self) -> Metrics:
        """See `Policy.settle`."""
        learnt = self.background.settle() if self.background else {}
        if learnt and self.vllm is not None:
            self.vllm.invalidate()
        return learnt

    def _reference_score(self, candidates: Candidates, per_token: bool) -> Tensor:
        if not per_token:
            return self.reference_log_prob(candidates).to(self.device)
        with torch.no_grad(), self.clock("reference"):
            return self._score(self.reference, candidates, per_token=True)

    def diagnose(self, observation: Observation, key: tuple[int | str, ...]) -> Metrics:
        """See `Policy.diagnose`."""
        with self.clock("evaluate"), torch.no_grad():
            samples = self._generate(self.model, observation, 1, 1.0, (self.seed, *key))
            assert samples.lengths is not None
            own = self._score(self.model, samples).double()
            reference = self._score(self.reference, samples).double()
        kl, entropy = float((own - reference).mean()), float(-own.mean())
        return {"kl": kl, "entropy": entropy, "length": float(samples.lengths.mean())}

    def move_reference(self) -> None:
        """See `Policy.move_reference`."""
        self.settle()
        self.models.move_reference()
        self.reference_version += 1

    def reset(self) -> None:
        """See `Policy.reset`."""
        self.settle()
        self.models.reset()
        if self.background is not None:
            self.background.take_on()
        if self.vllm is not None:
            self.vllm.invalidate()

    @no_progress_bars()
    def save(self, folder: Path) -> None:
        """See `Policy.save`. ``model/`` is a model folder like any other, for transformers and vLLM; with LoRA it is a
        peft adapter's."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.background is not None:
            self.background.save(folder)
        self.models.save(folder, reference=self.reference_version > 0)
        if self.learner.rank:  # what follows is the same on all ranks
            return
        self.tokenizer.save_pretrained(folder / "model")
        self.embedder.save(folder)
        state = {
            "start": self.task.model,
            "reference_version": self.reference_version,
            "generated_tokens": self.generated_tokens,
            "seconds": self.seconds,
        }
        (folder / "policy.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """See `Policy.load`. The encoder, and a reference that never moved, are the task's model again."""
        state = json.loads((folder / "policy.json").read_text())
        self.reference_version = state["reference_version"]
        self.models.load(folder, reference=self.reference_version > 0)
        if self.background is not None:
            self.background.load(folder)
        self.embedder.load(folder)
        self.generated_tokens = state["generated_tokens"]
        self.clock.seconds = dict(state["seconds"])
        if self.vllm is not None:
            self.vllm.invalidate()

    def export(self, folder: Path) -> None:
        """Writes the policy as an ordinary model folder with its tokenizer, an adapter merged, ZeRO's parts together:
        transformers and vLLM load it. Called on all ranks."""
        self.settle()
        self.models.export(folder)
