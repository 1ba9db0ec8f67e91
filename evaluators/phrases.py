"""Noun phrases and parts of speech of a prompt: by spaCy's en_core_web_sm where it is installed, else by word lists.

T2I-CompBench asks about spaCy's noun chunks. The word lists know its own grammar (`a red apple and a green kiwi`, `the
brown dog was lying on the green mat`): a chunk runs from one word of a closed class to the next, and a verb of the
lists ends it. Scores by one and by the other are not to be compared: `parser()` says which is at work.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MODEL = "en_core_web_sm"
_DETERMINERS = _words("a an the this that these those its their his her my our your some any each every both")
_NUMBERS = _words("one two three four five six seven eight nine ten many several few")
_PREPOSITIONS = _words(
    "of on in at by with from to into onto over under above below near behind beside between against around past "
    "through across along inside outside beneath underneath during among toward towards down up off like for next "
    "while about after before as than without within upon alongside amid"
)
_OTHERS = _words(
    "and or but nor so is are was were be been being has have had does do did can will would it they he she which who "
    "whom whose where when there not very"
)
_VERBS = _words(
    "sat sits sit lay lies lie stood stands stand flew flies fly fell falls hung hangs hang drove drives sped swam "
    "swims slept sleeps shone shines rose rises grew grows ran runs wrote writes tells told holds hold held rest "
    "rests mix serve serves display provide provides cut cuts keep keeps met meets plays play sings sing wears wear "
    "eats eat reads read looks look walks walk rides ride features hidden"
)
_ADJECTIVES = _words(
    "red orange yellow green blue purple pink brown black white gray grey gold golden silver beige tan dark light "
    "bright big small large tall short long round square rectangular oval circular triangular oblong cubic spherical "
    "cylindrical conical pyramidal pentagonal hexagonal diamond teardrop plastic wooden metallic metal leather rubber "
    "fluffy ceramic stone soft hard smooth rough sharp shiny sleek fuzzy striped crisp sweet juicy cold hot warm cool "
    "new old young dull clean thick thin wet dry"
)


@dataclass(frozen=True)
class Phrases:
    """`words` with their part of speech each (spaCy's universal tags), and the text's noun chunks, in order."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    chunks: tuple[str, ...]

    @property
    def nouns(self) -> list[str]:
        return [word for word, tag in zip(self.words, self.tags, strict=True) if tag == "NOUN"]


@cache
def phrases_of(text: str) -> Phrases:
    """The phrases of `text` by the parser at hand; of an empty text none."""
    nlp = _spacy()
    if nlp is None:
        return built_in(text)
    document = nlp(text)
    words, tags = zip(*((token.text, token.pos_) for token in document), strict=True) if len(document) else ((), ())
    return Phrases(tuple(words), tuple(tags), tuple(chunk.text for chunk in document.noun_chunks))


def parser() -> str:
    """`en_core_web_sm 3.8.0`, or `built-in`: part of what a score means."""
    nlp = _spacy()
    return "built-in" if nlp is None else f"{_MODEL} {nlp.meta['version']}"


@cache
def _spacy() -> Any:
    if find_spec("spacy") is None or find_spec(_MODEL) is None:
        return None
    import spacy  # pyright: ignore[reportMissingImports]

    return spacy.load(_MODEL)


def built_in(text: str) -> Phrases:
    """By word lists alone. Of a name of many words all are nouns; the last is what spaCy's rules would look for."""
    words = tuple(_split(text))
    lower = [word.lower() for word in words]
    tags: list[str] = []
    for i, word in enumerate(lower):
        before, after = (tags[-1] if tags else ""), (lower[i + 1] if i + 1 < len(lower) else "")
        tags.append(_tag(word, before, after))
    chunks, start = [], None
    for i, tag in enumerate([*tags, ""]):
        inside = tag in ("DET", "NUM", "ADJ", "NOUN")
        if start is not None and (not inside or (tag == "DET" and i > start)):
            if "NOUN" in tags[start:i]:
                chunks.append(" ".join(words[start:i]))
            start = None
        if inside and start is None:
            start = i
    return Phrases(words, tuple(tags), tuple(chunks))


def _split(text: str) -> list[str]:
    for mark in ',.;:!?()"':
        text = text.replace(mark, f" {mark} ")
    return text.split()


def _tag(word: str, before: str, after: str) -> str:
    """`before` is the tag of the word in front, `after` the word behind."""
    if not word[0].isalnum():
        return "PUNCT"
    if word in _DETERMINERS:
        return "DET"
    if word in _NUMBERS or word.isdigit():
        return "NUM"
    if word in _PREPOSITIONS:
        return "ADP"
    if word in _OTHERS:
        return "AUX"
    closed = after in _DETERMINERS | _PREPOSITIONS or after in ("", ".", ",")
    if before in ("NOUN", "AUX") and closed and (word in _VERBS or word.endswith(("ed", "ing"))):
        return "VERB"
    names = bool(after) and after[0].isalpha() and after not in _DETERMINERS | _PREPOSITIONS | _OTHERS
    if names and (word in _ADJECTIVES or word.endswith(("-shaped", "-colored"))):
        return "ADJ"  # `a glass and a bowl` has a noun in it, `a glass bowl` has not
    return "NOUN"
