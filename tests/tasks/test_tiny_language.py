"""TinyTLDR's language: posts are pure functions, utility is total, the optimum is one."""

import itertools
import random
import time

import numpy as np
import pytest

from llm_duel_env.assets import tiny_supervision as supervision
from llm_duel_env.tasks import tiny_language as language
from llm_duel_env.tasks.tiny_words import CAUSES, TIMES, VERBS, vocabulary

POST = (
    "so i got money trouble : tom robbed anna over rent monday . kinda weird lol . then i paid tom . "
    "sunday eve hit me over noise . tl;dr:"
)
PINNED = (
    "this post concerns money : i instructed eve regarding deadlines . i harassed bob . meanwhile bob "
    "supervised me regarding debt . subsequently i reimbursed eve regarding jealousy yesterday . the situation "
    "remains rather difficult . i swindled bob regarding debt friday . i do not know what to do . furthermore "
    "nurse prosecuted me . tl;dr:"
)
STRANGE = [
    "",
    " ",
    ",",
    ", , ,",
    "tl;dr:",
    "<good>",
    "<good> <bad>",
    "你好 世界 , é",
    "\x00\ud800",
    "i robbed me . " * 60,
    "🙂",
]


def test_posts_are_pure_functions_of_split_and_number():
    assert [language.train_prompt(k) for k in range(20)] == [language.train_prompt(k) for k in range(20)]
    assert language.train_prompt(3) != language.heldout_prompt(3)
    # Pinned: stored references and published runs are about these very posts.
    assert language.heldout_prompt(0) == PINNED


def test_posts_keep_the_promised_form():
    words = set(vocabulary())
    assert 150 <= len(words) <= 250
    for k in range(300):
        prompt = language.train_prompt(k)
        assert 40 <= len(prompt.split()) <= 70
        assert set(prompt.split()) <= words
        assert prompt.endswith(" tl;dr:")
        assert 4 <= len(language.read_post(prompt).facts) <= 6
        assert language.optimum(prompt)[1] > 0.3


def test_no_post_outside_its_range():
    with pytest.raises(IndexError, match="expected a training prompt"):
        language.train_prompt(language.TRAIN_PROMPTS)
    with pytest.raises(IndexError, match="expected a held-out prompt"):
        language.heldout_prompt(-1)


def test_the_facts_of_a_post_are_read_from_its_text():
    post = language.read_post(POST)
    assert post.topic == "money"
    assert [fact.text(cause=True, time=True) for fact in post.facts] == [
        "tom robbed anna over rent monday",
        "i paid tom",
        "eve hit me over noise sunday",
    ]


def test_words_mean_one_thing_each():
    assert not set(VERBS) & (set(CAUSES) | set(TIMES))
    assert len(VERBS) == 72


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0.0),
        ("tom robbed anna", 2.8 - 0.6),
        ("tom robbed anna over rent", 2.8 + 0.7 - 1.0),
        ("tom robbed anna monday over rent", 2.8 + 0.7 + 0.4 - 1.2),
        ("tom defrauded anna", 2.8 - 0.6 - 0.2),  # the other register
        ("tom robbed anna over debt", 2.8 - 1.0 - 0.7),  # a wrong cause
        ("tom robbed anna sunday", 2.8 - 0.8 - 0.7),  # a wrong time
        ("anna robbed tom", -0.6 - 1.6),  # misbound
        ("tom scammed anna", -0.6 - 1.6),  # invented
        ("tom robbed anna , tom robbed anna", 2.8 - 1.2 - 0.7),  # repeated
        ("tom robbed anna tom robbed anna", 2.8 - 1.2 - 0.6),  # no separator: the twin is filler
        ("tom robbed anna ,", 2.8 - 0.6 - 0.2),  # an empty clause is filler
        ("tom robbed anna lol", 2.8 - 0.8 - 0.2),
        ("tom robbed anna xyzzy", 2.8 - 0.8 - 0.4),
        ("tom robbed anna , i paid tom", 2.8 + 0.5 + 0.3 - 1.2),
        ("tom robbed anna , eve hit me", 2.8 + 0.4 + 0.3 - 1.2),
    ],
)
def test_utility_adds_up(response, expected):
    assert language.utility(POST, response) == pytest.approx(language.SCALE * expected)


def test_utility_is_additive_over_clauses_in_any_order():
    rng = random.Random(0)
    for k in range(100):
        prompt = language.train_prompt(k)
        facts = rng.sample(language.read_post(prompt).facts, 3)
        clauses = [fact.text(rng.random() < 0.5, False) for fact in facts]
        apart = sum(language.utility(prompt, clause) for clause in clauses)
        for order in itertools.permutations(clauses):
            assert language.utility(prompt, language.join(order)) == pytest.approx(apart)


def test_the_optimum_beats_every_subset_of_facts():
    for k in range(60):
        prompt = language.heldout_prompt(k)
        text, value = language.optimum(prompt)
        assert value == language.utility(prompt, text)
        assert len(text.split()) <= language.MAX_WORDS
        forms = []
        for fact in language.read_post(prompt).facts[: 4 if k else 6]:
            forms.append(["", *sorted({fact.text(c, t) for c in (False, True) for t in (False, True)})])
        best = 0.0
        for chosen in itertools.product(*forms):
            response = language.join(chosen)
            if len(response.split()) <= language.MAX_WORDS:
                best = max(best, language.utility(prompt, response))
        assert value >= best - 1e-9
        if len(forms) == len(language.read_post(prompt).facts):
            assert value == pytest.approx(best)


def test_nothing_beats_the_optimum():
    rng = random.Random(1)
    for k in range(300):
        prompt = language.train_prompt(k)
        ceiling = language.optimum(prompt)[1] + 1e-9
        assert language.utility(prompt, supervision.random_summary(rng, prompt)) <= ceiling
        assert language.utility(prompt, supervision.near_optimum(rng, prompt)) <= ceiling
        assert language.utility(prompt, prompt) <= ceiling


def test_control_tokens_change_no_utility():
    for token in language.CONTROL_TOKENS:
        controlled = language.with_control(POST, token)
        assert controlled.startswith(token + " ")
        assert language.with_control(controlled, "<good>") == "<good> " + POST
        assert language.optimum(controlled) == language.optimum(POST)
        assert language.utility(controlled, "tom robbed anna") == language.utility(POST, "tom robbed anna")
    with pytest.raises(ValueError, match="expected a control token"):
        language.with_control(POST, "<great>")


@pytest.mark.parametrize("prompt", [*STRANGE, POST])
def test_every_function_is_total(prompt):
    for response in [*STRANGE, "tom robbed anna"]:
        value = language.utility(prompt, response)
        assert np.isfinite(value)
        assert value <= language.optimum(prompt)[1] + 1e-9
        assert language.utility(prompt, language.edit(prompt, response, "tom robbed anna")) >= value
        for level in range(5):
            assert isinstance(language.degrade(prompt, response, level), str)


def test_an_edit_is_never_worse_and_mostly_better():
    rng = random.Random(2)
    gains = []
    for k in range(300):
        prompt = language.train_prompt(k)
        pair = [supervision.random_summary(rng, prompt) for _ in range(2)]
        loser, winner = sorted(pair, key=lambda text: language.utility(prompt, text))
        edited = language.edit(prompt, loser, winner)
        gains.append(language.utility(prompt, edited) - language.utility(prompt, loser))
        assert len(edited.split()) <= language.MAX_WORDS
    assert min(gains) >= 0
    assert np.mean(np.array(gains) > 0) > 0.9


def test_an_edit_repairs_and_borrows_but_touches_nothing_else():
    assert language.edit(POST, "tom robbed anna over debt", "") == "tom robbed anna over rent"
    assert language.edit(POST, "eve robbed anna , i paid tom", "tom robbed anna") == "i paid tom , tom robbed anna"
    assert language.edit(POST, "tom robbed anna", "i paid tom") == "tom robbed anna , i paid tom"
    assert (
        language.edit(POST, "tom robbed anna over rent monday", "tom robbed anna") == "tom robbed anna over rent monday"
    )


@pytest.mark.parametrize("source", ["optimum", "random"])
def test_degrading_is_monotone_on_average(source):
    rng = random.Random(3)
    values = []
    for k in range(400):
        prompt = language.train_prompt(k)
        text = language.optimum(prompt)[0] if source == "optimum" else supervision.random_summary(rng, prompt)
        values.append([language.utility(prompt, language.degrade(prompt, text, level)) for level in range(5)])
    assert (np.diff(np.mean(values, axis=0)) < -0.2).all()
    with pytest.raises(ValueError, match="expected a level"):
        language.degrade(POST, "tom robbed anna", 5)


def test_goals_are_tenths_of_the_optimum():
    prompt = language.train_prompt(0)
    best, _ = language.optimum(prompt)
    assert supervision.goal_of(prompt, best) == 10
    assert supervision.goal_of(prompt, "") == 0
    rng = random.Random(4)
    good = bad = 0.0
    for k in range(300):
        controlled, response = supervision.controlled_row(rng, language.train_prompt(k))
        token = controlled.split()[0]
        assert token in language.CONTROL_TOKENS
        if token.startswith("<goal"):
            assert token == f"<goal_{supervision.goal_of(controlled, response)}>"
        good += language.utility(controlled, response) if token == "<good>" else 0.0
        bad += language.utility(controlled, response) if token == "<bad>" else 0.0
    assert good > bad


def test_utility_is_fast():
    prompt = language.train_prompt(1)
    rng = random.Random(5)
    responses = [supervision.random_summary(rng, prompt) for _ in range(2000)]
    began = time.perf_counter()
    for response in responses:
        language.utility(prompt, response)
    # Measured: 24,000 to 58,000 a second on one core; a busy machine is granted a factor of ten.
    assert 2000 / (time.perf_counter() - began) > 2500


def test_describe_counts_what_is_there_without_judging():
    prompt = language.train_prompt(0)
    best = language.optimum(prompt)[0]
    counts = language.describe(prompt, best)
    assert len(counts) == 18
    assert sum(counts[:6]) == counts[17] == best.count(",") + 1  # every clause a true fact
    assert counts[11] == counts[12] == counts[15] == 0
    twice = language.describe(prompt, f"{best} , {best}")
    assert twice[12] > 0
    assert language.describe(prompt, "") == [0.0] * 18
    assert language.describe(prompt, "žluťoučký kůň")[15] == 2
