"""Optional dependencies: imported when first used, and a missing one is answered by the command that installs it."""

from __future__ import annotations

import importlib
from types import ModuleType

EXTRAS = {
    "vllm": "vllm",
    "deepspeed": "deepspeed",
    "stable_baselines3": "sb3",
    "datasets": "hub",
    "huggingface_hub": "hub",
    "peft": "peft",
    "litserve": "serve",
    "trl": "trl",
    "pyarrow": "parquet",
    "ray": "ray",
}
"""Which extra of the distribution brings which module."""


class MissingExtraError(ImportError):
    """A module of an optional extra is not installed."""


def require(module: str, purpose: str) -> ModuleType:
    """Imports an optional module.

    Args:
        module: its import name, a key of `EXTRAS`.
        purpose: what it is wanted for, said in the error.

    Raises:
        MissingExtraError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # the module is there, and something that it needs itself is not
            raise
        command = f"pip install 'llm-duel-env[{EXTRAS[module]}]'"
        raise MissingExtraError(f"{purpose} needs the package {module}, which is not installed: {command}") from None
