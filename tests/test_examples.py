"""The examples run, stay short, and do what they say."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_my_first_agent_learns():
    wins = load("my_first_agent").main()
    assert len(wins) == 3
    assert wins[-1] > 0.6


def test_my_task_is_learnt_by_an_agent_of_the_zoo():
    assert load("my_task").main() > 0.6


def test_my_oracle_prefers_what_is_shorter():
    assert load("my_oracle").main() == [1.0, 0.0]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_short(file):
    assert len(file.read_text().splitlines()) < 80
