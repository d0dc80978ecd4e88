"""A causal language model as a policy: a sampler, a learner, a frozen reference and a frozen encoder."""

from __future__ import annotations

import copy
import json
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llm_duel_env.agents.policies.base import DirectOptimizer, Policy, PolicyConfig
from llm_duel_env.agents.policies.learners.torch_learner import TorchLearner
from llm_duel_env.agents.policies.samplers.torch_sampler import sample_tokens
from llm_duel_env.agents.policies.scoring import features, log_probs
from llm_duel_env.agents.policies.shared_prefix import works
from llm_duel_env.agents.policies.tokens import Tokens, end_tokens
from llm_duel_env.quiet import no_progress_bars
from llm_duel_env.randomness import generator
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.timing import Stopwatch
from llm_duel_env.types import Candidates, Metrics, Observation, Preferences, batch_size

SAMPLE_ROWS = 2048
"""Responses sampled at a time, at most."""
SAMPLE_LOGITS = 1 << 27
"""Logits of one step of sampling, at most; fewer responses at a time where the vocabulary is large."""
FEATURE_PROMPTS, FEATURE_SAMPLES = 64, 4
"""Training prompts, and the encoder's samples for each, that the features are standardised on."""


@no_progress_bars()
def load_model(name: str, device: torch.device) -> PreTrainedModel:
    """A causal language model in float32 and eval mode (no dropout, ever), from a folder or the hub; no remote code."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # Only eager attention knows Gemma 2's cap of the attention scores.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model: Any = AutoModelForCausalLM.from_pretrained(
        name,
        config=config,
        dtype=torch.float32,
        attn_implementation=attention,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return model.to(device).eval()


class LanguageModelPolicy(Policy):
    """Any causal language model that transformers loads.

    The reference and the encoder are one frozen copy of the start until `move_reference` gives the reference weights
    of its own: two models in memory, three after it.

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
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.bf16 = self.device.type == "cuda" if bf16 is None else bf16
        self.task, self.config, self.seed = task, config, seed
        self.model = load_model(task.model, self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(task.model, trust_remote_code=False)
        self.tokens = Tokens(
            self.tokenizer,
            eos=end_tokens(self.tokenizer, self.model.generation_config),
            max_prompt_tokens=self._prompt_limit(task),
            max_new_tokens=task.max_new_tokens,
        )
        # Its parameters keep requires_grad, or autocast would cast its weights anew at every token that it samples.
        self.encoder = copy.deepcopy(self.model)
        self.reference = self.encoder
        self.reference_version = 0
        with self._precision():
            self.share_prefix = works(self.encoder, tolerance=0.1 if self.bf16 else 1e-3)
        self.embedder, self.share_embedder_prefix = self._load_embedder()
        self.learner = TorchLearner(self.model, config)
        self.feature_size = int(self.embedder.config.get_text_config().hidden_size) + 4
        self._feature_statistics: Tensor | None = None
        self.generated_tokens = 0
        """Tokens of all responses that `sample` gave; greedy decoding and diagnosis are not counted."""
        self.clock = Stopwatch()

    def _load_embedder(self) -> tuple[PreTrainedModel, bool]:
        """The model that features come from, frozen, and whether it can share prefixes."""
        if self.config.encoder == "policy":
            return self.encoder, self.share_prefix
        folder = self.task.encoder if self.config.encoder == "task" else self.config.encoder
        if folder is None:
            raise ValueError(f"policy.encoder: task {self.task.name} offers no encoder; take 'policy' or a model folder")
        vocabulary = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
        if vocabulary != self.tokenizer.get_vocab():
            raise ValueError(f"policy.encoder: {folder} has another vocabulary than the policy, {self.task.model}")
        embedder = load_model(folder, self.device)
        with self._precision():
            return embedder, works(embedder, tolerance=0.1 if self.bf16 else 1e-3)

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
    def gradient_steps(self) -> int:
        """Optimizer steps so far."""
        return self.learner.gradient_steps

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def sample(
        self,
        observation: Observation,
        n: int,
        key: tuple[int | str, ...],
        *,
        reference: bool = False,
        temperature: float | None = None,
    ) -> Candidates:
        """See `Policy.sample`. Draws are keyed by the prompt's id too: they do not depend on the rest of the batch."""
        temperature = self.config.temperature if temperature is None else temperature
        with self.clock("sample"):
            model = self.reference if reference else self.model
            candidates = self._generate(model, observation, n, temperature, (self.seed, *key))
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
    ) -> Candidates:
        """n responses to each prompt: by the draws that `stream` (seed, *key) names, or greedily where it is None."""
        if n < 1 or (temperature is not None and not temperature > 0):
            raise ValueError(f"expected n >= 1 and a positive temperature, got {n} and {temperature}")
        prompts = self._prompts(observation)
        limit = self.tokens.max_new_tokens
        vocabulary = int(model.config.get_text_config().vocab_size)
        group = max(min(SAMPLE_ROWS, SAMPLE_LOGITS // vocabulary) // n, 1)
        uniform = None if stream is None else _uniforms(stream, observation["prompt_id"], n, limit)
        parts = []
        for start in range(0, len(prompts), group):
            draws = None if uniform is None else torch.from_numpy(uniform[start : start + group]).to(self.device)
            with self._precision():
                sampled = sample_tokens(
                    model,
                    prompts[start : start + group],
                    draws,
                    n=n,
                    max_new_tokens=limit,
                    eos=sorted(self.tokens.eos),
                    temperature=temperature or 1.0,
                    share_prefix=self.share_prefix,
                )
            parts.append([part.cpu().numpy() for part in sampled])
        lengths = np.concatenate([part[1] for part in parts])
        tokens = np.concatenate([part[0] for part in parts])[:, :, : int(lengths.max())]
        return Candidates(observation, self.tokens.decode(tokens, lengths), tokens, lengths)

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
            return self._log_prob(self.model, candidates).cpu()

    def reference_log_prob(self, candidates: Candidates) -> Tensor:
        """See `Policy.reference_log_prob`: (M, N) float32 on the CPU."""
        if candidates.reference_log_prob is not None and candidates.reference_version == self.reference_version:
            return torch.from_numpy(candidates.reference_log_prob)
        with torch.no_grad(), self.clock("reference"):
            return self._log_prob(self.reference, candidates).cpu()

    def _tensors(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        if candidates.tokens is None or candidates.lengths is None:
            raise ValueError("these candidates carry no token ids; make them with sample() or from_text()")
        return torch.from_numpy(candidates.tokens).to(self.device), torch.from_numpy(candidates.lengths).to(self.device)

    def _log_prob(self, model: PreTrainedModel, candidates: Candidates) -> Tensor:
        prompts = self._prompts(candidates.observation)
        with self._precision():
            return log_probs(model, prompts, *self._tensors(candidates), share_prefix=self.share_prefix)

    def embed(self, candidates: Candidates) -> Tensor:
        """See `Policy.embed`: on the CPU, each feature standardised on the encoder's own samples."""
        with self.clock("embed"):
            if self._feature_statistics is None:
                self._feature_statistics = self._measure_features()
            mean, scale = self._feature_statistics
            return (self._features(candidates) - mean) / scale

    def _features(self, candidates: Candidates) -> Tensor:
        prompts = self._prompts(candidates.observation)
        with self._precision():
            return features(
                self.embedder, prompts, *self._tensors(candidates), share_prefix=self.share_embedder_prefix
            ).cpu()  # fmt: skip

    def _measure_features(self) -> Tensor:
        """(2, D): mean and standard deviation of features, the same for every seed and every agent."""
        observation = self.task.observe(np.arange(min(FEATURE_PROMPTS, self.task.train_prompts)))
        samples = self._generate(self.encoder, observation, FEATURE_SAMPLES, 1.0, (0, "feature statistics"))
        flat = self._features(samples).flatten(0, 1)
        return torch.stack([flat.mean(0), flat.std(0).clamp(min=1e-4)])

    def update(
        self, loss: DirectOptimizer, preferences: Preferences, *, progress: float, key: tuple[int | str, ...]
    ) -> Metrics:
        """See `Policy.update`. FloatingPointError where training diverges."""
        decided = preferences.decided()
        if len(decided) == 0:
            return {}
        pairs = decided.ordered()
        reference = self.reference_log_prob(pairs).to(self.device)
        with self.clock("learn"):
            return self.learner.update(
                loss,
                pairs,
                reference,
                lambda part: self._log_prob(self.model, part),
                progress=progress,
                rng=generator(self.seed, *key),
            )

    def diagnose(self, observation: Observation, key: tuple[int | str, ...]) -> Metrics:
        """See `Policy.diagnose`."""
        with self.clock("evaluate"), torch.no_grad():
            samples = self._generate(self.model, observation, 1, 1.0, (self.seed, *key))
            assert samples.lengths is not None
            own = self._log_prob(self.model, samples).double()
            reference = self._log_prob(self.reference, samples).double()
        kl, entropy = float((own - reference).mean()), float(-own.mean())
        return {"kl": kl, "entropy": entropy, "length": float(samples.lengths.mean())}

    def move_reference(self) -> None:
        """See `Policy.move_reference`."""
        if self.reference is self.encoder:
            self.reference = copy.deepcopy(self.model)
        else:
            self.reference.load_state_dict(self.model.state_dict())
        self.reference_version += 1

    @no_progress_bars()
    def save(self, folder: Path) -> None:
        """See `Policy.save`. ``model/`` is a model folder like any other: transformers and vLLM load it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        if self.reference_version:
            self.reference.save_pretrained(folder / "reference")
        if self._feature_statistics is not None:
            save_file({"mean_and_scale": self._feature_statistics.contiguous()}, folder / "features.safetensors")
        self.learner.save(folder)
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
        self.model.load_state_dict(load_model(str(folder / "model"), self.device).state_dict())
        self.learner.load(folder)
        self.reference_version = state["reference_version"]
        self.reference = self.encoder
        if self.reference_version:
            self.reference = load_model(str(folder / "reference"), self.device)
        statistics = folder / "features.safetensors"
        self._feature_statistics = load_file(statistics)["mean_and_scale"] if statistics.exists() else None
        self.generated_tokens = state["generated_tokens"]
        self.clock.seconds = dict(state["seconds"])


def _uniforms(stream: tuple, prompt_ids: np.ndarray, n: int, tokens: int) -> np.ndarray:
    """(M, n, tokens) float64 in [0, 1), one stream per prompt; the second visit to a prompt in a batch has its own."""
    seed, *key = stream
    visits: Counter[int] = Counter()
    draws = np.empty((len(prompt_ids), n, tokens))
    for row, prompt in enumerate(int(i) for i in prompt_ids):
        draws[row] = generator(seed, *key, prompt, visits[prompt]).random((n, tokens))
        visits[prompt] += 1
    return draws
