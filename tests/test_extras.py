import subprocess
import sys
from importlib.metadata import metadata

import pytest

from llm_duel_env.extras import EXTRAS, MissingExtraError, require


@pytest.mark.parametrize(("module", "extra"), sorted(EXTRAS.items()))
def test_a_missing_extra_is_named(monkeypatch, module, extra):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("llm_duel_env.extras.importlib.import_module", absent)
    with pytest.raises(MissingExtraError, match=rf"reading the moon needs .*llm-duel-env\[{extra}\]"):
        require(module, "reading the moon")


def test_a_broken_install_is_not_called_missing(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'its_dependency'", name="its_dependency")

    monkeypatch.setattr("llm_duel_env.extras.importlib.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="its_dependency") as caught:
        require("vllm", "sampling")
    assert not isinstance(caught.value, MissingExtraError)


def test_every_extra_is_declared():
    assert set(EXTRAS.values()) <= set(metadata("llm-duel-env").get_all("Provides-Extra"))


def test_heavy_packages_are_not_imported_by_the_package():
    heavy = sorted(set(EXTRAS) - {"huggingface_hub"})  # transformers itself brings huggingface_hub
    code = f"import sys, llm_duel_env, llm_duel_env.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
