"""YAML for recipes: text => plain values, with what surprises refused by line.

PyYAML's SafeLoader with two hooks. A recipe from somewhere else may hold what YAML allows and nobody means: aliases
that unfold into gigabytes ("billion laughs"), tags that name Python objects, lists nested until the stack ends
(`compose_node` refuses these before any value is built), and a key given twice, of which the last one would win in
silence (`construct_mapping`).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, NoReturn

import yaml
from jsonargparse import set_loader

MODE = "plain_yaml"  # the name that jsonargparse knows it by
MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 16
MAX_DIGITS = 40  # Python takes quadratic time to read a number, and refuses more than 4300 digits

_TIMESTAMP, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "float", "merge"))


class PlainYAMLError(yaml.YAMLError):
    """Text that is not plain YAML; the message says what and where, in one line."""


class PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases, tags, merges, repeated keys and deep nesting."""

    # dates stay text, and 1e-3 is a number without a dot too, as on the command line
    yaml_implicit_resolvers = {  # noqa: RUF012  the base class's own kind of attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            _refuse(event, "anchors and aliases (& and *) are not supported; quote a text that begins so")
        if event.tag:
            _refuse(event, f"tags ({event.tag[:40]}) are not supported; quote a text that begins with !")
        if isinstance(event, yaml.ScalarEvent):
            if len(event.value) > MAX_DIGITS and not event.value.strip("+-0123456789_."):
                _refuse(event, f"a number has more than {MAX_DIGITS} digits")
        elif self._depth == MAX_DEPTH:
            _refuse(event, f"more than {MAX_DEPTH} levels")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, "a key is not a word")
            if key.tag == _MERGE:
                _refuse(key, "merging (<<) is not supported; write the keys out")
            if key.value in keys:
                _refuse(key, f"key {key.value[:60]!r} is given twice")
            keys.add(key.value)
        return super().construct_mapping(node, deep)


PlainLoader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(text: str, **_: Any) -> Any:
    """A YAML text => dicts, lists, strings and numbers.

    Raises:
        PlainYAMLError: for text that is not YAML, and for aliases, tags, merges, repeated keys, several documents, more
            than 16 levels, numbers of more than 40 digits, or more than a million characters.
    """
    if len(text) > MAX_CHARACTERS:
        raise PlainYAMLError(f"has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}")
    try:
        return yaml.load(text, PlainLoader)
    except (TypeError, ValueError) as error:  # a number or a key that Python can't make
        raise PlainYAMLError(f"is not understood ({str(error)[:80]})") from None
    except yaml.MarkedYAMLError as error:
        what = ", ".join(part for part in (error.context, error.problem) if part)
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PlainYAMLError(what + place) from None
    except yaml.reader.ReaderError as error:
        code = ord(error.character) if isinstance(error.character, str) else int(error.character)
        raise PlainYAMLError(f"holds the character U+{code:04X}, which YAML does not allow") from None


def _refuse(what: yaml.Event | yaml.Node, why: str) -> NoReturn:
    line = f" in line {what.start_mark.line + 1}"
    reason, _, advice = why.partition("; ")
    raise PlainYAMLError(reason + line + (f"; {advice}" if advice else ""))


set_loader(MODE, load, exceptions=(yaml.YAMLError,))
