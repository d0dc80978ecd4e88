"""Settings as they are typed, and what is refused of them."""

import pytest

from llm_duel_env.benchmark.settings import merged, nested, settings, typed


def test_what_is_typed_is_read_back():
    values = {
        "policy.learning_rate": 5e-07,
        "number as text": "1e-4",
        "text": "naïve 🙂 {x}: 'a' \"b\"\n",
        "flag": False,
        "nothing": None,
        "list": [1, 2.5, "true"],
        "task_kwargs": {"candidates": 16, "scale": 1e-07, "within": {"a": "null"}},
    }
    assert settings(typed(values)) == values
    assert nested(settings(typed({"task_kwargs": values["task_kwargs"]}))) == {"task_kwargs": values["task_kwargs"]}


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("1e-4", 1e-4),
        ("1.e-4", 1e-4),
        ("ee", "ee"),
        ("[1, a]", [1, "a"]),
        ("yes", True),
        ("010", 8),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_values_are_json_or_yaml(said, read):
    assert settings((f"a={said}",)) == {"a": read}


def test_a_name_that_is_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"a\.b is given twice: 1 and 2"):
        settings(("a.b=1", "c=3", "a.b=2"))


@pytest.mark.parametrize("pairs", [{"a": 3, "a.x": 1}, {"a.x": 1, "a": 3}, {"a.x.y": 1, "a.x": {"y": 2}}])
def test_a_value_and_names_within_it_are_refused(pairs):
    with pytest.raises(ValueError, match="leave one of them out"):
        nested(pairs)


def test_merging_changes_neither():
    old, new = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"x": 9}, "b": {"z": 1}}
    assert merged(old, new) == {"a": {"x": 9, "y": 2}, "b": {"z": 1}}
    assert (old, new) == ({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"x": 9}, "b": {"z": 1}})
