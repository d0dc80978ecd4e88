"""What the embedded TinyTLDR policy is taught: random summaries, true to their post and careless of what matters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from llm_duel_env.tasks import tiny_language as language
from llm_duel_env.tasks.tiny_words import FILLERS


class Writer(NamedTuple):
    """A kind of writer of supervised summaries."""

    share: float
    """How many there are of the kind."""
    taste: float
    """How much likelier an on-topic fact is picked than another."""
    counts: tuple[float, float, float, float]
    """Probability of stating 1, 2, 3 or 4 facts."""
    details: tuple[float, ...]
    """Probabilities, one of them drawn for each summary, of giving each cause and each time."""


ALIKE = (Writer(1.0, 1.7, (0.2, 0.42, 0.3, 0.08), (0.2, 0.5, 0.8)),)
MIXED = (Writer(0.58, 4.0, (1.0, 0.0, 0.0, 0.0), (0.1,)), Writer(0.42, 4.0, (0.0, 0.35, 0.45, 0.2), (0.5, 0.8)))
"""Writers who are all alike leave copying to be learned well. Mixed ones come last: most of them are in a hurry and
toss off one bare fact, the others tell more of what the post is about. So the model *can* say what matters and mostly
does not, and its likeliest response is a hurried one."""
OTHER_REGISTER_RATE = 0.06
FILLER_RATE = 0.1
CONTROL_SHARE = 0.25
"""Share of supervised rows that are conditioned on a control token."""


def all_facts(rng: random.Random, prompt: str) -> str:
    """All facts of a post in shuffled order, as many as fit, mostly with all details: teaches binding.

    Whole facts are long stretches to copy, which is what copying is learned from. The order is
    shuffled because the post's own order would teach positions instead of copying.
    """
    facts = list(language.read_post(prompt).facts)
    rng.shuffle(facts)
    detail = rng.choice((1.0, 1.0, 0.5))
    words = language.join([fact.text(rng.random() < detail, rng.random() < detail) for fact in facts]).split()
    return " ".join(words[: language.MAX_WORDS])


def random_summary(rng: random.Random, prompt: str, writers: Sequence[Writer] = MIXED) -> str:
    """A random subset of facts in random order with random details, now and then with filler."""
    post = language.read_post(prompt)
    writer = writers[0] if len(writers) == 1 else rng.choices(writers, [writer.share for writer in writers])[0]
    count = rng.choices((1, 2, 3, 4), writer.counts)[0]
    tastes = [writer.taste if language.verb_topic(fact.verb) == post.topic else 1.0 for fact in post.facts]
    keys = [rng.random() ** (1.0 / weight) for weight in tastes]  # weighted sampling without replacement
    chosen = sorted(range(len(keys)), key=lambda k: -keys[k])[:count]
    detail = rng.choice(writer.details)
    clauses = [
        post.facts[k].text(rng.random() < detail, rng.random() < detail, rng.random() < OTHER_REGISTER_RATE)
        for k in chosen
    ]
    if rng.random() < FILLER_RATE:
        filler = rng.choice(FILLERS[rng.random() < 0.5])
        clauses.insert(rng.randrange(len(clauses) + 1), filler.removesuffix(" ."))
    while len(language.join(clauses).split()) > language.MAX_WORDS:
        clauses.pop()
    return language.join(clauses)


def controlled_row(rng: random.Random, prompt: str, writers: Sequence[Writer] = MIXED) -> tuple[str, str]:
    """(prompt with a control token, a response that fits it).

    good is the best of 8 random summaries, bad the worst of 8; goal g has a utility of about g tenths of the optimum.
    """
    texts = [random_summary(rng, prompt, writers) for _ in range(8)]
    ranked = sorted(texts, key=lambda text: language.utility(prompt, text))
    kind = rng.random()
    if kind < 0.25:
        return language.with_control(prompt, "<good>"), ranked[-1]
    if kind < 0.5:
        return language.with_control(prompt, "<bad>"), ranked[0]
    best, ceiling = language.optimum(prompt)
    target = rng.randrange(11) / 10
    if target > 0.8:  # random summaries seldom come so high: the best one, or the optimum with its details gone
        ranked += [best, language.degrade(prompt, best, 1)]
    chosen = min(ranked, key=lambda text: abs(language.utility(prompt, text) / max(ceiling, 1e-6) - target))
    return language.with_control(prompt, f"<goal_{goal_of(prompt, chosen)}>"), chosen


def goal_of(prompt: str, response: str) -> int:
    """The utility of a response in tenths of its prompt's optimum, 0 .. 10."""
    ceiling = language.optimum(prompt)[1]
    return max(0, min(10, round(10 * language.utility(prompt, response) / ceiling))) if ceiling > 0 else 0


def supervised_row(rng: random.Random, prompt: str, writers: Sequence[Writer] = MIXED) -> tuple[str, str]:
    """(prompt, response) as the supervised phase sees it."""
    if rng.random() < CONTROL_SHARE:
        return controlled_row(rng, prompt, writers)
    return prompt, random_summary(rng, prompt, writers)


def near_optimum(rng: random.Random, prompt: str) -> str:
    """The optimum, reordered, enriched or spoilt in one of several ways: what a well-trained policy might say.

    The reward model sees these, or it would be lost where the supervised policy never goes.
    """
    post = language.read_post(prompt)
    clauses = language.optimum(prompt)[0].split(f" {language.SEPARATOR} ")
    rng.shuffle(clauses)
    place = rng.randrange(len(clauses))
    fact = rng.choice(post.facts)
    words = clauses[place].split()
    kind = rng.randrange(8)
    if kind == 0:  # a fact too many, or one repeated
        clauses.append(fact.text(rng.random() < 0.5, rng.random() < 0.5))
    elif kind == 1:  # a fact too few
        clauses.pop(place)
    elif kind == 2 and len(words) >= 3:  # who and whom exchanged
        swap = {"i": "me", "me": "i"}
        words[0], words[2] = swap.get(words[2], words[2]), swap.get(words[0], words[0])
        clauses[place] = " ".join(words)
    elif kind == 3:  # one word replaced by a word of the post
        words[rng.randrange(len(words))] = rng.choice(prompt.split())
        clauses[place] = " ".join(words)
    elif kind == 4:  # words lost at the end
        clauses[place] = " ".join(words[: rng.randrange(1, len(words) + 1)])
    elif kind == 5:  # the right facts, other details
        for k, clause in enumerate(clauses):
            stated = language.read_response(prompt, clause)[0].fact
            if stated:
                clauses[k] = stated.text(rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.1)
    elif kind == 6:  # every fact of the topic
        clauses = [f.text(rng.random() < 0.7) for f in post.facts if language.verb_topic(f.verb) == post.topic]
    return " ".join(language.join(clauses).split()[: language.MAX_WORDS])
