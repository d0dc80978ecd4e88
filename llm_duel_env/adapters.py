"""Folders with a peft adapter in place of a model: the base model is loaded and the adapter merged into it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llm_duel_env.extras import require
from llm_duel_env.pretrained import loading

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(name: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a peft adapter and not a model. A hub name is never looked up."""
    folder = Path(name)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_model(folder: str | os.PathLike[str]) -> str:
    """The model that an adapter's folder names as its base.

    Raises:
        ValueError: it names none, or its weights are not in safetensors.
    """
    base = json.loads((Path(folder) / CONFIG).read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder}: expected base_model_name_or_path in {CONFIG}, found none")
    if not (Path(folder) / WEIGHTS).is_file():
        raise ValueError(f"{folder}: expected the adapter's weights in {WEIGHTS}; nothing else is opened")
    return str(base)


def load_merged(folder: str | os.PathLike[str], kind: Any, **options: Any) -> Any:
    """An ordinary model: an adapter's base with the adapter merged into it, in evaluation mode.

    Args:
        folder: of the adapter.
        kind: the transformers class whose `from_pretrained` loads the base, such as ``AutoModelForCausalLM``.
        options: of `from_pretrained`.

    Raises:
        ValueError: there is no such base, it lacks weights that the adapter does not bring, or see `base_model`.
        MissingExtraError: peft is not installed.
    """
    base = base_model(folder)
    peft: Any = require("peft", f"the adapter {os.fspath(folder)}")
    with loading(base, f"the base of {os.fspath(folder)}"):
        model, found = kind.from_pretrained(
            base, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
        )
    settings = peft.PeftConfig.from_pretrained(os.fspath(folder))
    # Layers that were trained whole, such as a reward model's head, come with the adapter.
    brought = tuple(getattr(settings, "modules_to_save", None) or ())
    missing = sorted(name for name in found["missing_keys"] if not set(name.split(".")) & set(brought))
    if missing:
        raise ValueError(f"{os.fspath(folder)}: neither the adapter nor its base {base} has trained weights {missing}")
    return peft.PeftModel.from_pretrained(model, os.fspath(folder)).merge_and_unload().eval()
