"""The words that call what a LoRA has learned: a phrase that all its captions share, such as "ink style"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ldm.data.dataset import CaptionedPictures

SMALL_WORDS = {"a", "an", "the", "of", "in", "on", "at", "with", "and"}  # in captions of anything
PUNCTUATION = ",;:.!?()\"'-"
SHARED = 4  # words of a phrase that only most captions have: enough to name it


def find_trigger(captions: Iterable[str]) -> str:
    """The phrase that all captions have in common, "" if it is of small words alone; of several the longest, the last.

    Case and the punctuation around a word don't count.
    """
    texts = list(captions)
    if not texts:
        return ""
    words, others = texts[0].split(), [_plain(text) for text in texts[1:]]
    plain = _plain(texts[0])
    best = (0, 0, 0)  # words that aren't small, words, place
    for start in range(len(words)):
        for end in range(len(words), start, -1):
            if all(_places(other, plain[start:end]) for other in others):
                best = max(best, (sum(word not in SMALL_WORDS for word in plain[start:end]), end - start, start))
                break
    telling, length, start = best
    return " ".join(words[start : start + length]).strip(PUNCTUATION) if telling else ""


def without(caption: str, trigger: str) -> str:
    """A caption without this phrase, where it stands last: "night sky, night style" => "night sky"."""
    words, phrase = caption.split(), _plain(trigger)
    places = _places(_plain(caption), phrase)
    if places:
        del words[places[-1] : places[-1] + len(phrase)]
    return " ".join(words).strip(PUNCTUATION)


def trigger_of(pictures: CaptionedPictures, given: str | None) -> str:
    """`lora.trigger`, or the phrase that is found.

    Raises:
        ValueError: if a caption doesn't have it, or all captions have no phrase in common.
    """
    places: dict[str, str] = {}
    for row in pictures:
        for caption in row.captions:
            places.setdefault(caption, row.where)
    found = given or find_trigger(places)
    if not found:
        found = _phrase_of_most(list(places))
    missing = [caption for caption in places if not _places(_plain(caption), _plain(found))]
    if found and missing:
        number = f"{len(missing)} of {len(places)} captions {'has' if len(missing) == 1 else 'have'}"
        raise ValueError(
            f'lora.trigger: {number} no "{found}", which would call what the LoRA learns; '
            f'the first: {places[missing[0]]}: "{missing[0]}"'
        )
    if not found:
        raise ValueError(
            f"lora.trigger: the captions of {pictures.source} have no words in common that would call what the LoRA "
            'learns; write some into each ("…, ink style"), or set lora.keep=0'
        )
    return found


def plain_captions(pictures: CaptionedPictures, trigger: str) -> list[str]:
    """The captions without the trigger words.

    Raises:
        ValueError: if nothing is left of any.
    """
    left = sorted({without(caption, trigger) for row in pictures for caption in row.captions} - {""})
    if not left:
        raise ValueError(
            f"lora.trigger: nothing is left of the captions of {pictures.source} without their common words, "
            f"\"{trigger}\"; name those that are new, such as lora.trigger='ink style', or set lora.keep=0"
        )
    return left


def _plain(text: str) -> list[str]:
    """The words of a text, without case and the punctuation around them."""
    return [word.strip(PUNCTUATION).casefold() or word for word in text.split()]


def _places(words: Sequence[str], phrase: Sequence[str]) -> list[int]:
    """Where a phrase begins in these words."""
    length = len(phrase)
    return [start for start in range(len(words) - length + 1) if list(words[start : start + length]) == list(phrase)]


def _phrase_of_most(captions: Sequence[str]) -> str:
    """The phrase that most captions have, if it is more than half of them."""
    counts: Counter[tuple[str, ...]] = Counter()
    for words in map(_plain, captions):
        phrases = {tuple(words[i : i + n]) for n in range(1, SHARED + 1) for i in range(len(words) - n + 1)}
        counts.update(phrase for phrase in phrases if not SMALL_WORDS.issuperset(phrase))
    phrase, number = max(counts.items(), key=lambda item: (item[1], len(item[0]), item[0]), default=((), 0))
    return " ".join(phrase) if 2 * number > len(captions) else ""
