"""The words of TinyTLDR's language: control tokens, topics, verbs, people, causes, times and sentence templates."""

from __future__ import annotations

CONTROL_TOKENS = ("<good>", "<bad>", *(f"<goal_{g}>" for g in range(11)))
"""May stand at the very start of a prompt; utility ignores them there."""
END_OF_PROMPT = "tl;dr:"
SEPARATOR = ","

# Six verbs per topic as casual/formal pairs, in falling gravity: two of gravity 3, two of 2, two of 1.
_VERB_PAIRS = {
    "money": "robbed/defrauded scammed/swindled stiffed/underpaid sued/prosecuted paid/reimbursed tipped/compensated",
    "love": "dumped/abandoned ghosted/deserted kissed/embraced dated/courted texted/contacted liked/admired",
    "work": "sacked/dismissed axed/suspended snubbed/overlooked bossed/supervised hired/recruited helped/assisted",
    "family": "ditched/disowned hit/struck scolded/reprimanded fooled/deceived hosted/accommodated hugged/comforted",
    "school": "booted/expelled flunked/failed bullied/harassed copied/plagiarised coached/instructed quizzed/examined",
    "health": "stabbed/wounded poisoned/intoxicated bumped/injured drugged/sedated checked/inspected fed/nourished",
}
TOPICS = tuple(_VERB_PAIRS)
GRAVITIES = (3, 3, 2, 2, 1, 1)
_PEOPLE = (
    "tom anna bob eve carl dora emil fay greg hana ivan june kurt lena mike nora omar pia rosa sam tina ugo vera walt "
    "mum dad boss teacher landlord nurse roommate cousin"
)
NAMES = tuple(_PEOPLE.split())
_REASONS = (
    "rent debt jealousy gossip homework noise pets food drinks gambling lies secrets parking chores politics religion "
    "deadlines grades insurance boredom"
)
CAUSES = tuple(_REASONS.split())
_DAYS = "monday tuesday wednesday thursday friday saturday sunday yesterday today tonight easter christmas"
TIMES = tuple(_DAYS.split())
MARKERS = ("over", "regarding")  # what introduces a cause: casual, formal
CONNECTORS = (("then", "so", "plus"), ("subsequently", "meanwhile", "furthermore"))
OPENINGS = (
    ("ok this is a {} mess :", "my {} drama in short :", "so i got {} trouble :"),
    ("i seek advice on a {} matter :", "this post concerns {} :", "allow me to describe a {} problem :"),
)
FILLERS = (
    ("so yeah it is a mess .", "not gonna lie i feel awful .", "anyway nobody knows what to do .",
     "sorry for the long post .", "kinda weird lol .", "help me out here folks ."),
    ("i would appreciate some advice .", "the situation remains rather difficult .", "please excuse the long story .",
     "i do not know what to do .", "it is quite unfortunate indeed .", "thank you for reading this ."),
)  # fmt: skip

# Lookup tables: a verb's word -> (concept, topic, gravity, register). Both wordings share a concept.
VERBS: dict[str, tuple[int, str, int, int]] = {}
VERB_WORDS: list[tuple[str, str]] = []
for _topic, _pairs in _VERB_PAIRS.items():
    for _gravity, _pair in zip(GRAVITIES, _pairs.split(), strict=True):
        _casual, _formal = _pair.split("/")
        for _register, _word in enumerate((_casual, _formal)):
            VERBS[_word] = (len(VERB_WORDS), _topic, _gravity, _register)
        VERB_WORDS.append((_casual, _formal))


def vocabulary() -> list[str]:
    """Every ordinary word of the language in a fixed order, without control and special tokens."""
    words = [END_OF_PROMPT, SEPARATOR, "i", "me", *NAMES, *CAUSES, *TIMES, *MARKERS, *TOPICS]
    words += [word for pair in VERB_WORDS for word in pair]
    for register in (0, 1):
        words += CONNECTORS[register]
        for sentence in OPENINGS[register] + FILLERS[register]:
            words += sentence.replace("{}", "").split()
    return list(dict.fromkeys(words))
