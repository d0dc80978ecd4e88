"""An ordinary DeepSpeed configuration, with what belongs to the policy filled in and contradictions refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

from llm_duel_env.agents.policies.base import PolicyConfig

AUTO = "auto"


def read_config(path: str | None) -> dict[str, Any]:
    """The JSON object in a file; ZeRO 2 where there is none.

    Raises:
        ValueError: no such file, or no JSON object in it.
    """
    if path is None:
        return {"zero_optimization": {"stage": 2}}
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"policy.deepspeed_config: expected a DeepSpeed JSON file, got {path!r} ({error})") from error
    if not isinstance(document, dict):
        raise ValueError(f"policy.deepspeed_config: expected a JSON object in {path!r}, got {type(document).__name__}")
    return document


def filled(
    document: dict[str, Any], config: PolicyConfig, *, world: int, hidden_size: int, bf16: bool = False
) -> dict[str, Any]:
    """A DeepSpeed configuration for `world` ranks with no ``"auto"`` left in it.

    Batch sizes, clipping, learning rate, betas and weight decay are the policy's: they are filled in where they are
    missing or ``"auto"``, and must agree where they are not. Bucket sizes that are ``"auto"`` follow the hidden size,
    as in transformers. The rows of a batch are weighted by the policy's loop and not by DeepSpeed's, so the number of
    accumulation steps given here is nominal: the last batch of a pass has fewer.

    Args:
        document: what the user wrote.
        config: the policy's settings.
        world: ranks.
        hidden_size: of the model.
        bf16: what ``"auto"`` means for bf16.

    Raises:
        ValueError: a value contradicts the policy's settings, or a part is not supported: fp16, a scheduler, a stage
            other than 1, 2, 3, an optimizer other than AdamW.
    """
    result = copy.deepcopy(document)
    share = math.ceil(config.batch / world)
    micro = min(config.microbatch, share)
    _own(result, "train_batch_size", config.batch, "policy.batch")
    _own(result, "train_micro_batch_size_per_gpu", micro, "policy.microbatch (a rank's share of policy.batch at most)")
    _own(result, "gradient_accumulation_steps", math.ceil(share / micro), "policy.batch / ranks / policy.microbatch")
    # DeepSpeed wants the product of the other two, which this need not be.
    del result["train_batch_size"]
    clip = 0.0 if math.isinf(config.grad_clip) else config.grad_clip  # DeepSpeed's 0 clips nothing
    _own(result, "gradient_clipping", clip, "policy.grad_clip")
    if "scheduler" in result:
        raise ValueError("deepspeed_config: scheduler: the policy has a schedule of its own; leave the section out")
    if _enabled(result, "fp16", False):
        raise ValueError("deepspeed_config: fp16: expected bf16 or float32, got fp16 enabled")
    _enabled(result, "bf16", bf16)
    zero = result.setdefault("zero_optimization", {})
    zero.setdefault("stage", 2)
    if zero["stage"] not in (1, 2, 3):
        raise ValueError(f"deepspeed_config: zero_optimization.stage: expected 1, 2 or 3, got {zero['stage']!r}")
    for name, size in (
        ("reduce_bucket_size", hidden_size**2),
        ("stage3_prefetch_bucket_size", int(0.9 * hidden_size**2)),
        ("stage3_param_persistence_threshold", 10 * hidden_size),
    ):
        if zero.get(name) == AUTO:
            zero[name] = size
    _optimizer(result, config)
    result.setdefault("steps_per_print", 1 << 30)  # the runner logs
    _no_auto(result, "")
    return result


def _optimizer(result: dict[str, Any], config: PolicyConfig) -> None:
    """Completes the optimizer's section; without one a torch AdamW is handed to DeepSpeed, which builds nothing."""
    if "optimizer" in result:
        section = result["optimizer"]
        if section.get("type") != "AdamW":
            raise ValueError(f"deepspeed_config: optimizer.type: expected AdamW, got {section.get('type')!r}")
        params = section.setdefault("params", {})
        _own(params, "lr", config.learning_rate, "policy.learning_rate", "optimizer.params.")
        _own(params, "betas", list(config.betas), "policy.betas", "optimizer.params.")
        _own(params, "weight_decay", config.weight_decay, "policy.weight_decay", "optimizer.params.")
        if params.get("eps") == AUTO:
            del params["eps"]
    else:
        result["zero_allow_untested_optimizer"] = True
        result["zero_force_ds_cpu_optimizer"] = False


def _own(section: dict[str, Any], name: str, value: Any, setting: str, where: str = "") -> None:
    got = section.get(name, AUTO)
    if got != AUTO and got != value:
        raise ValueError(
            f"deepspeed_config: {where}{name}: expected {value!r} ({setting}) or 'auto', got {got!r}; "
            "set it in the policy and leave it out here"
        )
    section[name] = value


def _enabled(result: dict[str, Any], name: str, auto: bool) -> bool:
    """Whether a precision is on; resolves ``"auto"``."""
    section = result.get(name, {})
    if section.get("enabled") == AUTO:
        section["enabled"] = auto
    return bool(section.get("enabled", False))


def _no_auto(value: Any, where: str) -> None:
    if value == AUTO:
        raise ValueError(f"deepspeed_config: {where}: 'auto' has no meaning here; give a value or leave it out")
    if isinstance(value, dict):
        for name, part in value.items():
            _no_auto(part, f"{where}.{name}" if where else name)
