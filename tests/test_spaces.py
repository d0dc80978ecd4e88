import json

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_differing_spaces, batch_space, concatenate, create_empty_array, iterate
from hypothesis import given
from hypothesis import strategies as st

from llm_duel_env.spaces import Utf8Text


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=20))
def test_every_text_without_surrogates_is_in(text):
    assert (text in Utf8Text(10)) == (1 <= len(text) <= 10)
    assert (text in Utf8Text(10, min_length=0)) == (len(text) <= 10)


@pytest.mark.parametrize("x", ["\ud800", "a\udfffb", 3, None, b"bytes", ["a"], np.array("a")])
def test_what_is_no_text_is_out(x):
    assert x not in Utf8Text(10)


def test_samples_are_seeded_mixed_and_writable():
    one, two = Utf8Text(30, seed=3), Utf8Text(30, seed=3)
    samples = [one.sample() for _ in range(50)]
    assert samples == [two.sample() for _ in range(50)]
    assert samples != [Utf8Text(30, seed=4).sample() for _ in range(50)]
    assert all(text in one and text.encode() for text in samples)
    characters = "".join(samples)
    for first, last in (("a", "z"), ("À", "ſ"), ("一", "龥"), ("😀", "🙏")):
        assert any(first <= c <= last for c in characters), (first, last)
    assert {len(Utf8Text(2, min_length=0, seed=s).sample()) for s in range(30)} == {0, 1, 2}


def test_masks_as_in_gymnasium():
    space = Utf8Text(9, seed=0)
    assert len(space.sample(mask=(4, None))) == len(space.sample(probability=(4, None))) == 4
    assert space.sample(mask=(None, None)) in space
    with pytest.raises(ValueError, match="both"):
        space.sample(mask=(1, None), probability=(1, None))
    with pytest.raises(ValueError, match=r"\(length, None\)"):
        space.sample(mask=(1, np.ones(3, np.int8)))
    with pytest.raises(ValueError, match="1 to 9"):
        space.sample(mask=(10, None))
    both = spaces.Dict(text=Utf8Text(9), flag=spaces.Discrete(2))
    assert len(both.sample(mask={"text": (2, None), "flag": np.array([0, 1], np.int8)})["text"]) == 2


@pytest.mark.parametrize("arguments", [{"max_length": 0}, {"max_length": 3, "min_length": 4}, {"max_length": -1}])
def test_impossible_lengths_are_refused(arguments):
    with pytest.raises(ValueError, match="min_length"):
        Utf8Text(**arguments)


@pytest.mark.parametrize("length", [2.0, "2", True, None])
def test_lengths_are_integers(length):
    with pytest.raises(TypeError, match="max_length"):
        Utf8Text(length)


def test_equality_and_repr():
    assert Utf8Text(4) == Utf8Text(4, seed=1) != Utf8Text(5)
    assert Utf8Text(4) != Utf8Text(4, min_length=0)
    assert Utf8Text(4) != spaces.Text(4)
    assert repr(Utf8Text(4, min_length=0)) == "Utf8Text(0, 4)"


def test_vector_utilities():
    space = Utf8Text(6, min_length=2, seed=1)
    batched = batch_space(space, 3)
    items = ("aé", "猫猫", "🙂🙂")
    assert items in batched
    assert len(set(batched.sample())) == 3
    empty = create_empty_array(space, 3)
    assert empty in batched
    assert concatenate(space, items, empty) == items
    assert list(iterate(batched, items)) == list(items)
    differing = batch_differing_spaces([Utf8Text(2), Utf8Text(4)])
    assert ("ab", "abcd") in differing
    assert ("abcd", "ab") not in differing


def test_vector_utilities_inside_a_dict():
    space = spaces.Dict(text=Utf8Text(6), number=spaces.Discrete(4))
    items = [{"text": "é", "number": np.int64(1)}, {"text": "猫", "number": np.int64(3)}]
    joined = concatenate(space, items, create_empty_array(space, 2))
    assert joined in batch_space(space, 2)
    assert [row["text"] for row in iterate(batch_space(space, 2), joined)] == ["é", "猫"]


def test_jsonable_round_trip():
    space = Utf8Text(6)
    texts = ["é", "猫", "🙂"]
    assert space.from_jsonable(json.loads(json.dumps(space.to_jsonable(texts)))) == texts
