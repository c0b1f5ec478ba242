"""The part of YAML that a recipe needs: text => plain values, without the parts that surprise.

A recipe from a stranger may hold what YAML allows and nobody means: a key given twice (the last one wins, in silence),
aliases that unfold into gigabytes ("billion laughs"), lists nested until the stack ends, tags that name Python objects.
All of them show in the stream of events, before any value is built, and are refused there with their line.
"""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

MODE = "plain_yaml"  # the name that jsonargparse knows it by
MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 16
MAX_DIGITS = 40  # Python takes quadratic time to read a number, and refuses more than 4300 digits


class PlainYAMLError(yaml.YAMLError):
    """Text that is no plain YAML; the message says what and where, in one line."""


def load(text: str, **_: Any) -> Any:
    """A YAML text => dicts, lists, strings and numbers.

    Raises:
        PlainYAMLError: for text that is no YAML, and for aliases, tags, keys given twice, several documents, more than
            16 levels, numbers of more than 40 digits, or more than a million characters.
    """
    if len(text) > MAX_CHARACTERS:
        raise PlainYAMLError(f"has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}")
    try:
        _check(text)
        return _LOAD(text)
    except (TypeError, ValueError) as error:  # a key that is no text, a number that is none
        raise PlainYAMLError(f"is not understood ({str(error)[:80]})") from None
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PlainYAMLError(f"{error.problem or error.context}{place}") from None
    except yaml.reader.ReaderError as error:
        code = ord(error.character) if isinstance(error.character, str) else int(error.character)
        raise PlainYAMLError(f"holds the character U+{code:04X}, which YAML doesn't allow") from None


def _check(text: str) -> None:
    """Refuse what isn't plain, event by event."""
    levels: list[set[str] | None] = []  # of each open collection the keys it has so far, None for a list
    is_key: list[bool] = []  # whether what comes next in it is a key
    documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f" in line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise PlainYAMLError(f"anchors and aliases (& and *) are not taken{line}; quote a text that begins so")
        if getattr(event, "tag", None):
            raise PlainYAMLError(f"tags ({event.tag[:40]}) are not taken{line}; quote a text that begins with !")
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            raise PlainYAMLError(f"a second document begins{line}; expected one")
        if isinstance(event, yaml.CollectionEndEvent):
            levels.pop(), is_key.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        if levels and levels[-1] is not None:
            if is_key[-1]:
                if not isinstance(event, yaml.ScalarEvent):
                    raise PlainYAMLError(f"a key is not a word{line}")
                if event.value in levels[-1]:
                    raise PlainYAMLError(f"key {event.value[:60]!r} is given twice{line}")
                levels[-1].add(event.value)
            is_key[-1] = not is_key[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            levels.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
            is_key.append(True)
            if len(levels) > MAX_DEPTH:
                raise PlainYAMLError(f"more than {MAX_DEPTH} levels{line}")
        elif len(getattr(event, "value", "")) > MAX_DIGITS and not event.value.strip("+-0123456789_."):
            raise PlainYAMLError(f"a number has more than {MAX_DIGITS} digits{line}")


_LOAD = get_loader("yaml")
set_loader(MODE, load, exceptions=(yaml.YAMLError,))
