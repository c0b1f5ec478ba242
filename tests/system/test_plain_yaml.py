"""YAML for recipes: what it reads, and what it refuses in which line."""

from __future__ import annotations

import math

import pytest
import yaml

from ldm.system import plain_yaml


def test_plain_values_are_what_the_standard_loader_makes_of_them() -> None:
    text = "a: 1\nb: [1.5, .5, -2, true, null, ~, 'x', \"y\\n\"]\nc: {d: [], e: {}}\nf: |\n  two\n  lines\n"
    assert plain_yaml.load(text) == yaml.safe_load(text)


def test_numbers_may_be_written_as_on_the_command_line_and_dates_stay_text() -> None:
    found = plain_yaml.load("[1e-3, 3e5, 1.5e3, 1_000, 2020-01-31, 1e400, 1e, e5]")
    assert found == [0.001, 3e5, 1500, 1000, "2020-01-31", math.inf, "1e", "e5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: &x 2", "anchors and aliases (& and *) are not supported in line 2; quote a text that begins so"),
        ("a: 1\nb: *x", "anchors and aliases (& and *) are not supported in line 2; quote a text that begins so"),
        ("a:\n  - !!set {b}", "tags (tag:yaml.org,2002:set) are not supported in line 2; quote a text that begins"),
        ("a: {b: 1,\n b: 2}", "key 'b' is given twice in line 2"),
        ("a:\n- b: 1\n  b: 2", "key 'b' is given twice in line 3"),
        ("a:\n  <<: {b: 1}", "merging (<<) is not supported in line 2; write the keys out"),
        ("\n? [a]\n: b", "a key is not a word in line 2"),
        ("a: 1\n---\nb: 2", "but found another document in line 2"),
        ("a:\n " + "[" * 20 + "]" * 20, "more than 16 levels in line 2"),
        ("a: 1\nb: " + "9" * 41, "a number has more than 40 digits in line 2"),
        ("a: [1,\n", "expected the node content, but found '<stream end>' in line 2"),
        ("a: 1\nb: @x", "found character '@' that cannot start any token in line 2"),
        ("a: \x00", "holds the character U+0000, which YAML does not allow"),
    ],
)
def test_what_is_not_plain_is_refused_by_line(text: str, message: str) -> None:
    with pytest.raises(plain_yaml.PlainYAMLError) as refused:
        plain_yaml.load(text)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_as_deep_and_as_long_as_allowed() -> None:
    assert plain_yaml.load("[" * 16 + "]" * 16)
    assert plain_yaml.load("9" * 40) == int("9" * 40)
