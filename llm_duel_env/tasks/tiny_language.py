"""TinyTLDR's language: a miniature of TL;DR summarisation whose quality is a program with a computable optimum.

A post is one person's story. Its opening names a topic, then 4 to 6 facts ("tom robbed anna over rent monday .") stand
among filler, in a casual or a formal register, and "tl;dr:" ends the text. A response is a list of clauses separated by
",": `agent verb patient [over cause] [time]`. A good one names the facts that matter, correctly bound, and stops.

What matters (constants below, in Bradley-Terry logits): the gravity of the verb, whether the verb belongs to the
post's topic, whether the poster is involved, the cause of an on-topic fact, the time of a grave one. Every word costs;
invented or misbound facts, wrong details, repetition, filler and unknown words cost more. Utility is additive over
facts and details, so the optimum under the token limit is an exact small knapsack.

Everything works from text alone and is total: any string is a prompt, any string is a response. Nothing here is random:
post number i is a pure function of (split, i).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from llm_duel_env.tasks.tiny_words import (
    CAUSES,
    CONNECTORS,
    CONTROL_TOKENS,
    END_OF_PROMPT,
    FILLERS,
    MARKERS,
    NAMES,
    OPENINGS,
    SEPARATOR,
    TIMES,
    TOPICS,
    VERB_WORDS,
    VERBS,
    vocabulary,
)

TRAIN_PROMPTS = 20_000
"""Training posts, numbered 0 .. TRAIN_PROMPTS - 1."""
MAX_WORDS = 27
"""Words of a response that are read, separators included; with EOS a response is 28 new tokens."""

# Utility, in units of Bradley-Terry logits once multiplied by SCALE (chosen so that the summaries that one prompt draws
# from the supervised policy have a standard deviation of about 1).
SCALE = 0.7
WORTH_ON_TOPIC = {1: 0.5, 2: 1.6, 3: 2.8}
WORTH_OFF_TOPIC = {1: 0.0, 2: 0.1, 3: 0.4}
WORTH_POSTER = 0.3
WORTH_CAUSE_ON_TOPIC, WORTH_CAUSE_OFF_TOPIC = 0.7, 0.1
WORTH_TIME_GRAVE, WORTH_TIME_OTHER = 0.4, 0.1
WORD_COST = 0.2
INVENTED = 1.6
WRONG_DETAIL = 0.7
REPEATED = 0.7
OTHER_REGISTER = 0.2
FILLER_WORD = 0.2
UNKNOWN_WORD = 0.4

# The poster is "i" who does and "me" to whom it is done; both are person 0.
_AGENTS = {"i": 0, **{name: k + 1 for k, name in enumerate(NAMES)}}
_PATIENTS = {"me": 0, **{name: k + 1 for k, name in enumerate(NAMES)}}
_CAUSES, _TIMES, _TOPICS = frozenset(CAUSES), frozenset(TIMES), frozenset(TOPICS)
_CONNECTORS = frozenset(CONNECTORS[0] + CONNECTORS[1])


def verb_topic(verb: str) -> str:
    """The topic that a verb belongs to. KeyError for a word that is no verb."""
    return VERBS[verb][1]


_VOCABULARY = frozenset(vocabulary())


class Fact(NamedTuple):
    """One fact of a post and what saying it is worth (before SCALE, before the cost of words)."""

    agent: str
    verb: str
    patient: str
    cause: str | None = None
    time: str | None = None
    worth: float = 0.0
    cause_worth: float = 0.0
    time_worth: float = 0.0

    @property
    def key(self) -> tuple[int, int, int]:
        """(agent, concept, patient): who did what to whom, whatever the wording."""
        return _AGENTS[self.agent], VERBS[self.verb][0], _PATIENTS[self.patient]

    def text(self, cause: bool = False, time: bool = False, other_register: bool = False) -> str:
        """The clause that states this fact; details are left out where the post has none."""
        concept, _, _, register = VERBS[self.verb]
        register ^= other_register
        words = [self.agent, VERB_WORDS[concept][register], self.patient]
        if cause and self.cause:
            words += [MARKERS[register], self.cause]
        if time and self.time:
            words.append(self.time)
        return " ".join(words)


class Post(NamedTuple):
    """What a prompt's text says: its topic (None where it names none) and its facts in the order of the text."""

    topic: str | None
    facts: tuple[Fact, ...]
    by_key: dict[tuple[int, int, int], Fact]


def _read_clause(words: Sequence[str]) -> tuple[Fact | None, list[str]]:
    """The first fact that a clause states, and the words that are no part of it."""
    for start in range(len(words) - 2):
        if words[start + 1] in VERBS and words[start] in _AGENTS and words[start + 2] in _PATIENTS:
            break
    else:
        return None, list(words)
    cause = time = None
    extra: list[str] = []
    rest = [*words[:start], *words[start + 3 :]]
    position = 0
    while position < len(rest):
        word = rest[position]
        follower = rest[position + 1] if position + 1 < len(rest) else ""
        if word in MARKERS and follower in _CAUSES and cause is None:
            cause = follower
            position += 1
        elif word in _TIMES and time is None:
            time = word
        else:
            extra.append(word)
        position += 1
    return Fact(words[start], words[start + 1], words[start + 2], cause, time), extra


def strip_control(prompt: str) -> str:
    """The prompt without the control tokens at its start."""
    while True:
        head, _, tail = prompt.lstrip().partition(" ")
        if head not in CONTROL_TOKENS:
            return prompt
        prompt = tail


def with_control(prompt: str, token: str) -> str:
    """The prompt conditioned on one control token, which replaces any that it carries. ValueError for other tokens."""
    if token not in CONTROL_TOKENS:
        raise ValueError(f"expected a control token, one of {CONTROL_TOKENS}, got {token!r}")
    return f"{token} {strip_control(prompt)}"


@lru_cache(maxsize=65_536)
def read_post(prompt: str) -> Post:
    """Parses a prompt. A sentence that is not wholly one fact (connectors aside) is filler; a later twin is dropped."""
    words = strip_control(prompt).split()
    topic = next((word for word in words if word in _TOPICS), None)
    sentences: list[list[str]] = [[]]
    for word in words:
        if word in (".", ":", END_OF_PROMPT):
            sentences.append([])
        elif word not in _CONNECTORS:
            sentences[-1].append(word)
    by_key: dict[tuple[int, int, int], Fact] = {}
    for sentence in sentences:
        fact, extra = _read_clause(sentence)
        if fact is None or extra or fact.key in by_key:
            continue
        _, verb_topic, gravity, _ = VERBS[fact.verb]
        on_topic = verb_topic == topic
        worth = (WORTH_ON_TOPIC if on_topic else WORTH_OFF_TOPIC)[gravity]
        worth += WORTH_POSTER if 0 in (fact.key[0], fact.key[2]) else 0.0
        cause_worth = WORTH_CAUSE_ON_TOPIC if on_topic else WORTH_CAUSE_OFF_TOPIC
        time_worth = WORTH_TIME_GRAVE if gravity == 3 else WORTH_TIME_OTHER
        by_key[fact.key] = Fact(
            fact.agent, fact.verb, fact.patient, fact.cause, fact.time, worth,
            cause_worth if fact.cause else 0.0, time_worth if fact.time else 0.0,
        )  # fmt: skip
    return Post(topic, tuple(by_key.values()), by_key)


class Clause(NamedTuple):
    """One clause of a response read against its post."""

    words: tuple[str, ...]
    stated: Fact | None
    """What the clause says, true or not; None where it states nothing."""
    fact: Fact | None
    """The post's fact that it states; None where the post holds no such fact."""
    extra: tuple[str, ...]
    """Words that belong to no fact."""


def read_response(prompt: str, response: str) -> list[Clause]:
    """The clauses of a response (its first MAX_WORDS words), each matched with the post's facts. No clause for ''."""
    post = read_post(prompt)
    words = response.split()[:MAX_WORDS]
    clauses: list[Clause] = []
    start = 0
    for end in range(len(words) + 1):
        if words and (end == len(words) or words[end] == SEPARATOR):
            stated, extra = _read_clause(words[start:end])
            fact = post.by_key.get(stated.key) if stated else None
            clauses.append(Clause(tuple(words[start:end]), stated, fact, tuple(extra)))
            start = end + 1
    return clauses


def utility(prompt: str, response: str) -> float:
    """How good a response is, in Bradley-Terry logits. The empty response is worth 0; never above `optimum`.

    Words past MAX_WORDS are not read but cost. Details of an invented fact earn nothing and cost their words.
    """
    words = response.split()
    score = -WORD_COST * (len(words) - words.count(SEPARATOR))
    seen = set()
    for clause in read_response(prompt, response):
        stated, fact = clause.stated, clause.fact
        if not clause.words:  # an empty clause is filler, or separators would be free
            score -= FILLER_WORD
        for word in clause.extra:
            score -= FILLER_WORD if word in _VOCABULARY else UNKNOWN_WORD
        if stated is None:
            continue
        if fact is None:
            score -= INVENTED
            continue
        if fact.key in seen:
            score -= REPEATED
            continue
        seen.add(fact.key)
        score += fact.worth
        if stated.verb != fact.verb:
            score -= OTHER_REGISTER
        if stated.cause:
            score += fact.cause_worth if stated.cause == fact.cause else -WRONG_DETAIL
        if stated.time:
            score += fact.time_worth if stated.time == fact.time else -WRONG_DETAIL
    return SCALE * score + 0.0  # never -0.0


def describe(prompt: str, response: str) -> list[float]:
    """What a response holds, without a judgement: 18 counts, of the kinds of things that a reader might care about.

    True facts by gravity (3) on the post's topic and off it (3), those about the poster; right and wrong causes, right
    and wrong times; facts that are not the post's, repeated ones, ones in the other register; clauses without a fact;
    words that belong to no fact; words; clauses.
    """
    counts = dict.fromkeys(range(18), 0.0)
    seen = set()
    clauses = read_response(prompt, response)
    topic = read_post(prompt).topic
    for clause in clauses:
        stated, fact = clause.stated, clause.fact
        counts[15] += len(clause.extra)
        if stated is None:
            counts[14] += 1
        elif fact is None:
            counts[11] += 1
        elif fact.key in seen:
            counts[12] += 1
        else:
            seen.add(fact.key)
            _, verb_topic, gravity, _ = VERBS[fact.verb]
            counts[gravity - 1 + 3 * (verb_topic != topic)] += 1
            counts[6] += 0 in (fact.key[0], fact.key[2])
            counts[13] += stated.verb != fact.verb
            if stated.cause:
                counts[7 + (stated.cause != fact.cause)] += 1
            if stated.time:
                counts[9 + (stated.time != fact.time)] += 1
    counts[16], counts[17] = float(len(response.split())) / 10, float(len(clauses))
    return list(counts.values())


@lru_cache(maxsize=65_536)
def _optimum(prompt: str) -> tuple[str, float]:
    # Knapsack over facts: best[n] is the best (gain, clauses) that takes n words, one separator counted per clause.
    best: dict[int, tuple[float, tuple[tuple[float, str], ...]]] = {0: (0.0, ())}
    for fact in read_post(prompt).facts:
        forms = []
        for cause in (False, True) if fact.cause else (False,):
            for time in (False, True) if fact.time else (False,):
                size = 3 + 2 * cause + time
                gain = fact.worth + cause * fact.cause_worth + time * fact.time_worth - WORD_COST * size
                forms.append((gain, size + 1, fact.text(cause, time)))
        for used, (total, clauses) in sorted(best.items(), reverse=True):
            for gain, size, text in forms:
                grown = total + gain
                if used + size <= MAX_WORDS + 1 and grown > best.get(used + size, (-1e9, ()))[0]:
                    best[used + size] = (grown, (*clauses, (gain, text)))
    _, clauses = max(best.values(), key=lambda entry: entry[0])
    text = f" {SEPARATOR} ".join(text for _, text in sorted(clauses, key=lambda entry: -entry[0]))
    return text, utility(prompt, text)


def optimum(prompt: str) -> tuple[str, float]:
    """The best response to a prompt and its utility (logits): ('', 0.0) where nothing is worth saying."""
    return _optimum(strip_control(prompt))


def join(clauses: Sequence[str]) -> str:
    """A response from clauses; those that are empty are left out."""
    return f" {SEPARATOR} ".join(clause for clause in clauses if clause)


def edit(prompt: str, loser: str, winner: str) -> str:
    """A minimal edit of the loser, guided by the winner: the bridge between the two that BMC asks an editor for.

    Clause by clause, the loser is repaired against the post (false or repeated clauses go, wrong details are
    corrected, stray words are cut), then the winner's facts that it lacks are added. A step is kept
    only where utility rises, as an editor who knows the annotators' taste would do: the result is never worse.
    """
    current = [" ".join(clause.words) for clause in read_response(prompt, loser)]
    text, score = loser, utility(prompt, loser)

    def attempt(proposal: list[str]) -> None:
        nonlocal current, text, score
        proposed = join(proposal)
        value = utility(prompt, proposed)
        if value > score + 1e-9 and len(proposed.split()) <= MAX_WORDS:
            current, text, score = proposal, proposed, value

    for position, clause in reversed(list(enumerate(read_response(prompt, loser)))):
        if clause.stated and clause.fact:
            # The right details in place of the wrong ones, nothing else: what the loser left unsaid stays unsaid.
            repaired = clause.fact.text(bool(clause.stated.cause), bool(clause.stated.time))
            attempt([*current[:position], repaired, *current[position + 1 :]])
        attempt([*current[:position], "", *current[position + 1 :]])
    held = {clause.fact.key for clause in read_response(prompt, text) if clause.fact}
    for clause in read_response(prompt, winner):
        if clause.stated and clause.fact and clause.fact.key not in held:
            attempt([*current, clause.fact.text(bool(clause.stated.cause), bool(clause.stated.time))])
    return text


def degrade(prompt: str, response: str, level: int) -> str:
    """The response with its key content removed or corrupted, the more the higher the level (0 .. 4); deterministic.

    1: its most valuable fact loses its details (filler is added where it has none). 2: all details go, and the most
    valuable fact too (a lone fact swaps who and whom instead). 3: who and whom are swapped in the next (a lone fact
    gets filler). 4: in all that is left, and filler is added. ValueError for another level.
    """
    if level not in range(5):
        raise ValueError(f"expected a level from 0 to 4, got {level!r}")
    if level == 0:
        return response
    clauses = read_response(prompt, response)
    facts = [clause for clause in clauses if clause.stated]
    facts.sort(key=lambda clause: -(clause.fact.worth if clause.fact else -1.0))
    weird, awful = (FILLERS[0][k].removesuffix(" .") for k in (4, 1))
    bare = [clause.stated.text() for clause in facts if clause.stated]
    if level == 1:
        texts = [*bare[:1], *(" ".join(clause.words) for clause in facts[1:])]
        if not facts or facts[0].words == tuple(bare[0].split()):
            texts.append(weird)
    elif len(bare) > 1:
        texts = [_swapped(text) if level == 4 or (level == 3 and k == 0) else text for k, text in enumerate(bare[1:])]
    else:
        texts = [_swapped(text) for text in bare]
        texts += [weird] if level == 3 else []
    if level == 4:
        texts += [weird, awful]
    texts += [" ".join(clause.words) for clause in clauses if not clause.stated]
    return " ".join(join(texts).split()[:MAX_WORDS])


def _swapped(clause: str) -> str:
    """A bare clause with who and whom exchanged."""
    agent, verb, patient = clause.split()
    return " ".join(("i" if patient == "me" else patient, verb, "me" if agent == "i" else agent))


def _pick(rng: random.Random, items: Sequence[Any]) -> Any:
    # Only rng.random() is promised to stay the same across Python versions; choice and shuffle are not.
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Sequence[Any]) -> list[Any]:
    keys = [rng.random() for _ in items]
    return [items[k] for k in sorted(range(len(items)), key=keys.__getitem__)]


def _post(split: str, index: int) -> str:
    """Post number `index` of a split, as prompt text of 40 to 70 words."""
    rng = random.Random(f"TinyTLDR/{split}/{index}")
    register = int(rng.random() * 2)
    topic = _pick(rng, TOPICS)
    count = 4 + int(rng.random() * 3)
    on_topic = 2 + (count > 4 and rng.random() < 0.3)
    own = range(6 * TOPICS.index(topic), 6 * TOPICS.index(topic) + 6)
    grave = _pick(rng, own[:4])  # every post has something to say: one fact of gravity 2 or 3 on its topic
    concepts = [grave, *_shuffled(rng, [c for c in own if c != grave])[: on_topic - 1]]
    concepts += _shuffled(rng, [c for c in range(len(VERB_WORDS)) if c not in own])[: count - on_topic]
    cast = ["i", *_shuffled(rng, NAMES)[: 3 + int(rng.random() * 2)]]
    sentences = []
    for concept in _shuffled(rng, concepts):
        agent, patient = _shuffled(rng, cast)[:2]
        cause = [MARKERS[register], _pick(rng, CAUSES)] if rng.random() < 0.5 else []
        time = [_pick(rng, TIMES)] if rng.random() < 0.5 else []
        words = [agent, VERB_WORDS[concept][register], "me" if patient == "i" else patient, *cause]
        words = [*time, *words] if rng.random() < 0.3 else [*words, *time]
        connector = [_pick(rng, CONNECTORS[register])] if rng.random() < 0.3 else []
        sentences.append([*connector, *words, "."])
    opening = _pick(rng, OPENINGS[register]).format(topic).split()
    length = len(opening) + sum(map(len, sentences)) + 1
    for position, filler in enumerate(_shuffled(rng, FILLERS[register])):
        words = filler.split()
        if length + len(words) <= 70 and (length < 40 or position < 2):
            sentences.insert(int(rng.random() * (len(sentences) + 1)), words)
            length += len(words)
    return " ".join([*opening, *(word for sentence in sentences for word in sentence), END_OF_PROMPT])


def train_prompt(index: int) -> str:
    """Training prompt 0 <= index < TRAIN_PROMPTS. IndexError outside."""
    if not 0 <= index < TRAIN_PROMPTS:
        raise IndexError(f"expected a training prompt from 0 to {TRAIN_PROMPTS - 1}, got {index}")
    return _post("train", index)


def heldout_prompt(index: int) -> str:
    """Held-out prompt index >= 0; the first ones are stored with their references. IndexError below 0."""
    if index < 0:
        raise IndexError(f"expected a held-out prompt from 0 on, got {index}")
    return _post("heldout", index)
