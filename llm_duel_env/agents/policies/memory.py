"""What each rank of a run holds in memory, estimated before anything is loaded.

Weights, gradients and moments are counted on a model on torch's meta device; keys and values, logits and buffers by the
limits that sampler and scorer keep to; activations on fake tensors (`traced`). Supposed are GPUs, with matrix products
in bfloat16, prompts and responses of the greatest length, and a model that `shared_prefix.works` and
`packed_rows.works` for.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from llm_duel_env.agents.policies import output_layer, scoring, traced
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.language_model import FEATURE_PROMPTS, FEATURE_SAMPLES
from llm_duel_env.agents.policies.learners.deepspeed_config import filled, read_config
from llm_duel_env.agents.policies.memory_parts import FLOAT, HALF, Part, Weights, Work, always, from_first_step
from llm_duel_env.agents.policies.samplers import torch_sampler

CONTEXT = 1 << 30
"""Bytes of the CUDA context, kernels and communication buffers: assumed."""
LIVE = 1_000_000_000
"""Weights that ZeRO 3 keeps gathered while it learns, at most, where its JSON says nothing."""


def kv_bytes(config: PretrainedConfig, bf16: bool) -> int:
    """Bytes of one token's keys and values in all layers."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * text.num_hidden_layers * groups * size * (HALF if bf16 else FLOAT)


def estimate(config: PolicyConfig, work: Work) -> list[Part]:
    """The parts of a rank's memory.

    Args:
        config: how the policy samples and learns.
        work: sizes and models.

    Raises:
        ValueError: settings that contradict each other, the DeepSpeed JSON and the number of ranks among them.
        MissingExtraError: an adapter without peft.
    """
    if config.asynchronous and (work.ranks > 1 or config.lora_rank):
        raise ValueError("policy.asynchronous: expected one rank and no adapter")
    weights = Weights.of(traced.on_meta(work.policy, config), work.bf16)
    parts = [*_models(config, work, weights), *_training(config, work, weights)]
    parts += [*_sampling(config, work), *_scoring(work), *_learning(config, work, weights), *_oracle(work)]
    return [*parts, Part("CUDA context, communication (assumed)", **always(CONTEXT), estimated=True)]


def _deepspeed(config: PolicyConfig, work: Work) -> dict[str, Any] | None:
    """The DeepSpeed settings as they would be for the ranks; None with another learner."""
    if config.learner != "deepspeed":
        return None
    hidden = int(work.policy.get_text_config().hidden_size)
    return filled(read_config(config.deepspeed_config), config, world=work.ranks, hidden_size=hidden, bf16=work.bf16)


def _models(config: PolicyConfig, work: Work, weights: Weights) -> list[Part]:
    """Policy, reference and encoder."""
    settings, frozen = _deepspeed(config, work), weights.total - weights.trained
    half = work.bf16 and config.lora_rank > 0
    number = HALF if settings is not None and settings.get("bf16", {}).get("enabled") else FLOAT
    loaded = FLOAT * weights.total  # float32 comes first, whatever it becomes
    own = number * weights.trained + (min(number, HALF) if half else number) * frozen
    zero: dict[str, Any] = settings["zero_optimization"] if settings is not None else {"stage": 0}
    kind = f"policy, {number} bytes a weight" + (f" ({HALF} where frozen)" if half and number != HALF else "")
    if zero["stage"] == 3:
        share = own / work.ranks
        away = zero.get("offload_param", {}).get("device", "none") != "none"
        live = min(own, number * int(zero.get("stage3_max_live_parameters", LIVE)))
        parts = [
            Part(f"{kind}, its share (ZeRO 3)", **always(0.0 if away else share), cpu=share if away else 0.0),
            # Gathered whole on each rank to sample; while learning at most so many at a time.
            Part("policy, gathered", begin=max(loaded - share, 0), sample=own, learn=live, estimated=True),
        ]
    else:
        parts = [Part(kind, loaded, own, own, own, own)]
    if config.asynchronous:
        parts.append(Part(f"policy that acts, {FLOAT} bytes", **always(FLOAT * weights.total)))
    copies = HALF * weights.cast if work.bf16 else 0
    of_policy = copies if number == FLOAT else 0
    alone = config.lora_rank == 0 or work.from_adapter
    of_reference = HALF * (weights.cast if config.lora_rank == 0 else 0) if alone and work.bf16 else of_policy
    if of_policy or of_reference:
        name = "autocast's copies of weights in use, 2 bytes"
        parts.append(Part(name, sample=of_policy, score=of_reference, learn=of_policy, estimated=True))
    if not alone:
        parts.append(Part("reference and encoder: the policy, adapter off"))
    else:
        base = FLOAT * (weights.total if config.lora_rank == 0 else frozen)
        away = config.offload_reference
        rest = 0.0 if away else base
        name = f"reference and encoder, {FLOAT} bytes a weight" + (" (offloaded)" if away else "")
        parts.append(Part(name, base, rest, base, rest, rest, cpu=base if away else 0.0))
    if work.encoder is not None:
        size = FLOAT * Weights.of(traced.on_meta(work.encoder), False).total
        parts.append(Part(f"policy.encoder, {FLOAT} bytes a weight", **always(size)))
    return parts


def _training(config: PolicyConfig, work: Work, weights: Weights) -> list[Part]:
    """Gradients and the optimizer's state."""
    settings, trained = _deepspeed(config, work), weights.trained
    if settings is None:
        return [
            Part(f"gradients, {FLOAT} bytes a trained weight", learn=FLOAT * trained),
            Part(f"AdamW's moments, 2 x {FLOAT} bytes", **from_first_step(2 * FLOAT * trained)),
        ]
    zero = settings["zero_optimization"]
    number = HALF if settings.get("bf16", {}).get("enabled") else FLOAT
    away = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    state = 3.0 * FLOAT * trained / work.ranks
    share = work.ranks if zero["stage"] >= 2 else 1
    # In the step a rank's share is made float32 where it is not.
    gradients = number * trained / share + FLOAT * trained / work.ranks * (number == HALF)
    bucket = int(zero.get("reduce_bucket_size", 500_000_000)) * number * (2 if zero.get("overlap_comm") else 1)
    name = f"weights and AdamW's moments, 3 x {FLOAT} bytes, its share"
    return [
        Part(
            name + (" (offloaded)" if away else ""),
            **from_first_step(0.0 if away else state),
            cpu=state if away else 0.0,
        ),
        Part(f"gradients, {number} bytes, and {FLOAT} in the step", learn=gradients, estimated=True),
        Part("DeepSpeed's buckets", learn=min(bucket, 2 * number * trained), estimated=True),
    ]


def _sampling(config: PolicyConfig, work: Work) -> list[Part]:
    """vLLM's share, or the cache and the logits of the torch sampler."""
    if config.sampler == "vllm":
        share = config.sampler_memory * work.gpu_bytes if work.gpu_bytes is not None else 0.0
        known = "of the GPU" if work.gpu_bytes is not None else "of the GPU, not counted: its memory is not known"
        name = f"vLLM: weights and cache, {config.sampler_memory:g} {known}"
        # It sleeps while the policy learns, and then alone.
        return [Part(name, sample=share, score=share, label=share, estimated=True)]
    # The largest of a round and an evaluation, each cut into groups as the sampler does.
    vocabulary = int(work.policy.get_text_config().vocab_size)
    sizes = []
    for prompts, n in ((work.prompts, work.candidates), (work.evaluated, 1)):
        most = torch_sampler.prompts_at_a_time(vocabulary, n, work.prompt_tokens, work.new_tokens)
        group = min(-(-prompts // work.ranks), most)
        sizes.append((cache_bytes(work.policy, group, n, work.prompt_tokens, work.new_tokens, work.bf16), group, n))
    cache, group, n = max(sizes)
    widest = max(group * n for _, group, n in sizes)
    # Logits, their float32 copies and softmax, and the float64 sums of `choose`.
    logits = 24.0 * widest * vocabulary
    run = traced.prefill(work.policy, max(group for _, group, _ in sizes), work.prompt_tokens, bf16=work.bf16)
    return [
        Part(f"keys and values, {HALF if work.bf16 else FLOAT} bytes ({group} prompts, {n} each)", sample=cache),
        Part("work of sampling: prompts, logits", sample=max(logits, run), estimated=True),
    ]


def cache_bytes(config: PretrainedConfig, prompts: int, n: int, prompt_tokens: int, new_tokens: int, bf16: bool) -> int:
    """Bytes of the torch sampler's keys and values: each prompt's once, and room for n responses to each."""
    return kv_bytes(config, bf16) * prompts * (prompt_tokens + n * new_tokens)


def _scoring(work: Work) -> list[Part]:
    """What the reference and the encoder need to score a round's candidates, at most."""
    text = work.policy.get_text_config()
    prompts = min(-(-work.prompts // work.ranks), max(scoring.PROMPT_TOKENS // work.prompt_tokens, 1))
    keys = kv_bytes(work.policy, work.bf16) * prompts * work.prompt_tokens
    # Before the first round it samples what the features are standardised on.
    first = -(-FEATURE_PROMPTS // work.ranks)
    drawn = cache_bytes(work.policy, first, FEATURE_SAMPLES, work.prompt_tokens, work.new_tokens, work.bf16)
    run = traced.prefill(work.policy, prompts, work.prompt_tokens, bf16=work.bf16)
    tokens = min(scoring.TOKENS, max(scoring.LOGITS // text.vocab_size, 1), work.new_tokens * prompts * work.candidates)
    logits = 10.0 * tokens * text.vocab_size  # as they come, in float32, and their softmax
    scores = 3.0 * FLOAT * tokens * text.num_attention_heads * (work.prompt_tokens + work.new_tokens)
    return [
        Part(f"keys and values of prompts, {HALF if work.bf16 else FLOAT} bytes", score=max(keys, drawn)),
        Part("work of scoring: prompts, logits, attention", score=max(run, logits + scores), estimated=True),
    ]


def _learning(config: PolicyConfig, work: Work, weights: Weights) -> list[Part]:
    """Activations and logits of the largest microbatch."""
    settings = _deepspeed(config, work)
    rows = min(config.microbatch, -(-min(config.batch, work.prompts) // work.ranks))
    one_call = settings is not None and settings["zero_optimization"]["stage"] == 3
    kept = traced.learning(
        work.policy,
        config,
        rows=rows,
        responses=work.ranked,
        prompt_tokens=work.prompt_tokens,
        new_tokens=work.new_tokens,
        one_call=one_call,
        bf16=work.bf16,
    )
    vocabulary = int(work.policy.get_text_config().vocab_size)
    chunk = min(max(output_layer.CHUNK, vocabulary), rows * work.ranked * work.new_tokens * vocabulary)
    sizes = (work.ranked, work.prompt_tokens, work.new_tokens)
    layout = traced.layout_of(work.policy, *sizes, one_call or config.gradient_checkpointing)
    name = f"activations of {rows} x {work.ranked} responses" + (", checkpointed" * config.gradient_checkpointing)
    name += ", prompts copied" * (layout == "copied")
    # Logits, their softmax and its bfloat16 copy; the gradient of the output layer is made beside the one there is.
    logits = (3.0 * FLOAT + HALF) * chunk + (FLOAT * vocabulary * work.policy.get_text_config().hidden_size)
    logits = logits if config.lora_rank == 0 else (3.0 * FLOAT + HALF) * chunk
    return [Part(name, learn=kept, estimated=True), Part("logits, some at a time", learn=logits, estimated=True)]


def _oracle(work: Work) -> list[Part]:
    """The oracle's model and its pass."""
    if work.reward is None:
        return []
    number = HALF if work.bf16 and work.reward_on != "cpu" else FLOAT
    model = traced.on_meta(work.reward)
    head = model.get_output_embeddings()
    tied = any(head.weight is weight for weight in [model.get_input_embeddings().weight])
    total = number * (Weights.of(model, False).total - (0 if tied else head.weight.numel()))
    name = f"the oracle's model, {number} bytes a weight"
    if work.reward_on != "cuda":
        return [Part(f"{name} (on {work.reward_on or 'another GPU'})", cpu=total if work.reward_on == "cpu" else 0.0)]
    tokens = work.reward_tokens
    length = min(work.prompt_tokens + work.new_tokens, tokens)
    run = traced.prefill(work.reward, max(tokens // length, 1), length, bf16=True)
    run += kv_bytes(work.reward, True) * tokens
    return [Part(name, **always(total)), Part(f"its pass of {tokens} tokens", label=float(run), estimated=True)]
