"""The policy of finite tasks: a softmax over each prompt's K recorded responses."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm_duel_env.agents.policies import background
from llm_duel_env.agents.policies.background import Background
from llm_duel_env.agents.policies.base import DirectOptimizer, Policy, PolicyConfig, check_mixture
from llm_duel_env.agents.policies.learners.lesson import prepare
from llm_duel_env.agents.policies.learners.loop import train
from llm_duel_env.agents.policies.learners.torch_learner import TorchLearner
from llm_duel_env.randomness import generator, torch_generator, uniforms, visits
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Metrics, Observation

HIDDEN = 64
OUTER_LIMIT = 1024  # largest C * D for which every product x_c a_d is a feature
STATISTICS_PROMPTS = 256
STD_FLOOR = 1e-6


class CandidateScorer(nn.Module):
    """f(x, a) = out . relu(W phi(x, a) + b), one number per candidate; zero at the start, so all are equally probable.

    phi is [x, a, x (outer) a] where that is small, else [a, x * a] where the sizes agree, else [x, a]. phi is never
    built: for one prompt W phi is linear in a, so the first layer is one (D, H) matrix per prompt.
    """

    context: Tensor
    candidate: Tensor
    pair: Tensor
    context_mean: Tensor
    context_std: Tensor
    candidate_mean: Tensor
    candidate_std: Tensor

    def __init__(self, context_dim: int, candidate_dim: int, draw: torch.Generator) -> None:
        super().__init__()
        c, d = context_dim, candidate_dim
        self.kind = "outer" if c * d <= OUTER_LIMIT else "product" if c == d else "concat"
        shapes = {
            "outer": {"context": (c, HIDDEN), "candidate": (d, HIDDEN), "pair": (c, d * HIDDEN)},
            "product": {"candidate": (d, HIDDEN), "pair": (d, HIDDEN)},
            "concat": {"context": (c, HIDDEN), "candidate": (d, HIDDEN)},
        }[self.kind]
        self.feature_size = {"outer": c + d + c * d, "product": 2 * d, "concat": c + d}[self.kind]
        bound = 1 / math.sqrt(self.feature_size)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=draw)))
        self.bias = nn.Parameter(torch.empty(HIDDEN).uniform_(-bound, bound, generator=draw))
        self.out = nn.Parameter(torch.zeros(HIDDEN))
        # Fixed statistics of the inputs, (C,) and (D,).
        self.register_buffer("context_mean", torch.zeros(c))
        self.register_buffer("context_std", torch.ones(c))
        self.register_buffer("candidate_mean", torch.zeros(d))
        self.register_buffer("candidate_std", torch.ones(d))

    def standardise(self, context: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs with the statistics taken out, same shapes."""
        return (context - self.context_mean) / self.context_std, (candidates - self.candidate_mean) / self.candidate_std

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        """(M, C), (M, K, D) -> scores (M, K)."""
        x, a = self.standardise(context, candidates)
        offset = self.bias if self.kind == "product" else self.bias + x @ self.context  # (H,) or (M, H)
        if self.kind == "concat":
            hidden = a @ self.candidate + offset[:, None]
        else:
            pair = (x @ self.pair).view(len(x), -1, HIDDEN) if self.kind == "outer" else x[:, :, None] * self.pair
            hidden = torch.baddbmm(offset.expand(len(x), HIDDEN)[:, None], a, self.candidate + pair)
        return hidden.relu_() @ self.out

    def features(self, context: Tensor, candidates: Tensor) -> Tensor:
        """phi itself, (M, C), (M, N, D) -> (M, N, feature_size): for the few candidates a reward model looks at."""
        x, a = self.standardise(context, candidates)
        x = x[:, None].expand(-1, a.shape[1], -1)
        if self.kind == "outer":
            return torch.cat([x, a, (x[..., :, None] * a[..., None, :]).flatten(2)], dim=2)
        return torch.cat([a, x * a] if self.kind == "product" else [x, a], dim=2)


class CandidatePolicy(Policy):
    """Softmax over each prompt's candidates of a small network; the reference is the policy at the start, uniform."""

    def __init__(self, task: TaskView, config: PolicyConfig, *, seed: int) -> None:
        if task.kind != "finite":
            raise ValueError(f"a candidate policy needs a finite task, got {task.name} of kind {task.kind!r}")
        if config.encoder != "policy":
            raise ValueError(f"policy.encoder: a finite task's features are its own, got {config.encoder!r}")
        self.config, self.seed = config, seed
        context, candidates = task.observation_space["context"].shape, task.observation_space["candidates"].shape
        assert context is not None
        assert candidates is not None
        self.scorer = CandidateScorer(context[0], candidates[1], torch_generator(seed, "policy"))
        self.feature_size = self.scorer.feature_size
        self._measure(task.observe(np.arange(min(STATISTICS_PROMPTS, task.train_prompts))))
        self.reference = copy.deepcopy(self.scorer).requires_grad_(False)
        self.reference_version = 0
        self.trained = self.scorer
        """What trains; `scorer` is what the policy acts by."""
        self.background: Background | None = None
        if config.asynchronous:
            background.check(config)
            self.background = Background(self.trained)
            self.scorer = cast(CandidateScorer, self.background.acting)
        self.learner = TorchLearner(self.trained, config, fused=True)
        self._start = copy.deepcopy(self.scorer.state_dict())  # for `reset`

    def _measure(self, observation: Observation) -> None:
        """Fixes the statistics that standardise inputs and features."""
        context, candidates = _tensors(observation)
        for name, values in (("context", context), ("candidate", candidates.flatten(0, 1))):
            getattr(self.scorer, f"{name}_mean").copy_(values.mean(dim=0))
            getattr(self.scorer, f"{name}_std").copy_(values.std(dim=0, correction=0).clamp_min(STD_FLOOR))
        features = self.scorer.features(context, candidates).flatten(0, 1)
        self.feature_mean, self.feature_std = (
            features.mean(dim=0),
            features.std(dim=0, correction=0).clamp_min(STD_FLOOR),
        )

    def _log_softmax(self, scorer: CandidateScorer, observation: Observation, temperature: float = 1.0) -> Tensor:
        """Log-probability of all K candidates, (M, K)."""
        context, candidates = _tensors(observation)
        if scorer is self.reference and not scorer.out.any():  # every score is zero
            return torch.full(candidates.shape[:2], -math.log(candidates.shape[1]))
        return (scorer(context, candidates) / temperature).log_softmax(dim=1)

    @torch.no_grad()
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
        """Draws with replacement, as a language model does, so n may exceed K. See `Policy.sample`."""
        check_mixture(mixture, reference)
        temperature = self.config.temperature if temperature is None else temperature
        scorer = self.reference if reference else self.scorer
        log_prob = self._log_softmax(scorer, observation, temperature)
        if mixture:
            other = self._log_softmax(self.reference, observation, temperature)
            log_prob = torch.lerp(log_prob, other, mixture).log_softmax(dim=1)
        cumulative = log_prob.double().exp().cumsum(dim=1)
        draws = torch.from_numpy(_uniforms(self.seed, key, observation["prompt_id"], n))
        # The first candidate whose cumulative probability exceeds the draw; scaled, as the last entry is 1 only nearly.
        chosen = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
        responses = chosen.clamp_max(cumulative.shape[1] - 1).numpy()
        return Candidates(observation, responses, from_reference=np.full(responses.shape, True) if reference else None)

    @torch.no_grad()
    def greedy(self, observation: Observation) -> Candidates:
        """The most probable candidate of each prompt, (M, 1)."""
        return Candidates(observation, self._log_softmax(self.scorer, observation).argmax(dim=1, keepdim=True).numpy())

    @torch.no_grad()
    def log_prob(self, candidates: Candidates) -> Tensor:
        """See `Policy.log_prob`."""
        return self._gather(self.scorer, candidates)

    @torch.no_grad()
    def reference_log_prob(self, candidates: Candidates) -> Tensor:
        """See `Policy.reference_log_prob`."""
        return self._gather(self.reference, candidates)

    def _gather(self, scorer: CandidateScorer, candidates: Candidates) -> Tensor:
        return self._log_softmax(scorer, candidates.observation).gather(1, torch.from_numpy(candidates.responses))

    @torch.no_grad()
    def embed(self, candidates: Candidates) -> Tensor:
        """phi(x, a), standardised by fixed statistics of the first training prompts: (M, N, D)."""
        context, vectors = _tensors(candidates.observation)
        chosen = vectors[torch.arange(len(vectors))[:, None], torch.from_numpy(candidates.responses)]
        return (self.scorer.features(context, chosen) - self.feature_mean) / self.feature_std

    def embed_responses(self, candidates: Candidates) -> Tensor:
        """The candidates' own vectors, as the task gives them: (M, N, D)."""
        _, vectors = _tensors(candidates.observation)
        return vectors[torch.arange(len(vectors))[:, None], torch.from_numpy(candidates.responses)]

    @property
    def gradient_steps(self) -> int:
        """Optimizer steps so far."""
        return self.learner.gradient_steps

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
        """See `Policy.learn`. A response is one token. In the background the metrics are those of the lesson before."""
        learnt = self.settle()
        lesson = prepare(loss, ranked, scores, bonus, torch.no_grad()(partial(self._score, self.reference)))
        rng = generator(self.seed, "shuffle", *key)
        score = partial(self._score, self.trained)
        train_on = partial(train, self.learner, loss, lesson, score, config=self.config, progress=progress, rng=rng)
        if self.background is None:
            return train_on()
        self.background.start(train_on)
        return learnt

    def settle(self) -> Metrics:
        """See `Policy.settle`."""
        return self.background.settle() if self.background else {}

    def _score(self, scorer: CandidateScorer, candidates: Candidates, per_token: bool) -> Tensor:
        """See `Score`."""
        values = self._gather(scorer, candidates)
        return values[..., None] if per_token else values

    @torch.no_grad()
    def diagnose(self, observation: Observation, key: tuple[int | str, ...]) -> Metrics:
        """``kl`` and ``entropy`` in nats, mean over prompts; exact, as all K candidates are known."""
        own, reference = self._log_softmax(self.scorer, observation), self._log_softmax(self.reference, observation)
        probability = own.exp()
        return {
            "kl": float((probability * (own - reference)).sum(dim=1).mean()),
            "entropy": float(-(probability * own).sum(dim=1).mean()),
        }

    def move_reference(self) -> None:
        """Makes the present policy the reference; features stay as they are."""
        self.settle()
        self.reference = copy.deepcopy(self.scorer).requires_grad_(False)
        self.reference_version += 1

    def reset(self) -> None:
        """See `Policy.reset`."""
        self.settle()
        self.trained.load_state_dict(self._start)
        if self.background is not None:
            self.background.take_on()
        self.learner.reset()

    def save(self, folder: Path) -> None:
        """See `Policy.save`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.background is not None:
            self.background.save(folder)
        tensors = {f"policy.{name}": value for name, value in self.trained.state_dict().items()}
        tensors |= {f"reference.{name}": value for name, value in self.reference.state_dict().items()}
        tensors |= {"feature_mean": self.feature_mean, "feature_std": self.feature_std}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "policy.safetensors")
        self.learner.save(folder)
        (folder / "policy.json").write_text(json.dumps({"reference_version": self.reference_version}))

    def load(self, folder: Path) -> None:
        """See `Policy.load`."""
        tensors = load_file(folder / "policy.safetensors")
        for prefix, scorer in (("policy.", self.trained), ("reference.", self.reference)):
            scorer.load_state_dict({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
        self.feature_mean, self.feature_std = tensors["feature_mean"], tensors["feature_std"]
        self.learner.load(folder)
        if self.background is not None:
            self.background.load(folder)
        self.reference_version = json.loads((folder / "policy.json").read_text())["reference_version"]


def _uniforms(seed: int, key: tuple[int | str, ...], prompt_ids: np.ndarray, n: int) -> np.ndarray:
    """(M, n) float64 in [0, 1), one stream per prompt; the second visit to a prompt in a batch has draws of its own."""
    ids = np.asarray(prompt_ids, np.int64)
    numbers = (ids << 32)[:, None] + visits(ids)[:, None] * n + np.arange(n)
    return uniforms(seed, ("sample", *key), numbers)


def _tensors(observation: Observation) -> tuple[Tensor, Tensor]:
    """Contexts (M, C) and candidates (M, K, D) of a batch observation."""
    context, candidates = observation["context"], observation["candidates"]
    if context.ndim != 2 or candidates.ndim != 3 or len(context) != len(candidates):
        raise ValueError(
            f"expected context (M, C) and candidates (M, K, D), got {context.shape} and {candidates.shape}"
        )
    return torch.from_numpy(context), torch.from_numpy(candidates)
