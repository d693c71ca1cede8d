"""Numbers and outside text as people read them, and the marks of a drawing."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_recipes import text
from safemerge_recipes.report import svg


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (lambda: text.size(999), "999 B"),
        (lambda: text.size(999_499), "999 kB"),
        (lambda: text.size(1_234_000), "1.23 MB"),
        (lambda: text.size(None), "–"),
        (lambda: text.duration(99.4), "99.4 s"),
        (lambda: text.duration(100), "2 min"),
        (lambda: text.duration(6000), "1 h 40 min"),
        (lambda: text.things(1, "tensor"), "1 tensor"),
        (lambda: text.things(45_000, "tensor"), "45\N{NO-BREAK SPACE}000 tensors"),
        (lambda: text.figure(0.12345), "0.123"),
        (lambda: text.figure(12_345.6), "12\N{NO-BREAK SPACE}346"),
        (lambda: text.fixed(None), "–"),
    ],
)
def test_numbers_as_people_read_them(call, shown):
    assert call() == shown


@given(st.text(max_size=500), st.integers(10, 60))
def test_outside_text_shows_nothing_hidden_and_stays_short(value, limit):
    shown = text.clean(value, limit)
    assert shown.isprintable() or all(char.isprintable() or char.isspace() for char in shown)
    assert "\n" not in shown
    assert "\u202e" not in shown
    if value.isprintable():
        assert len(shown) <= limit


def test_what_is_no_number_is_none():
    assert [text.number(value) for value in (True, "1", float("nan"), 10**400, None)] == [None] * 5
    assert text.median([3.0, 1.0, 2.0]) == 2.0
    assert text.median([4.0, 1.0]) == 2.5
    assert text.median([]) is None


@given(st.text(), st.text(max_size=30))
def test_drawings_are_well_formed_whatever_is_written_on_them(words, title):
    marks = (svg.words(1, 2, words), svg.dot(3, 4, merged=True, title=title), svg.rule(0, 0, 1, 1, "axis"))
    found = ET.fromstring(svg.drawing(10, 20, title, *marks))
    assert [child.tag for child in found] == ["text", "circle", "line"]
    assert found.get("viewBox") == "0 0 10 20"


@given(st.floats(1e-9, 1e9))
def test_an_axis_ends_just_above_what_it_shows(value):
    top = svg.ceiling(value)
    assert value * (1 - 1e-9) <= top <= 2 * value
    assert len(svg.ticks(top)) == 5


def test_steps_are_joined_where_they_meet():
    assert svg.steps([(0, 1, 5), (1, 2, 6), (3, 4, 6)], "s").count("M") == 2
