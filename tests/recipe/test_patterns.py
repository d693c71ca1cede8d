"""Globs against an independent oracle (fnmatch), their bounds, and patterns that could hang."""

from __future__ import annotations

import fnmatch
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_recipes.recipe.patterns import MAX_ALTERNATIVES, compile_patterns

NAME = "model.layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", NAME, True),
        ("model.layers.{0..3}.*", NAME, True),
        ("model.layers.{0..2}.*", NAME, False),
        ("model.layers.{0..3}.*", "model.layers.30.self_attn.q_proj.weight", False),
        ("model.layers.{9..11}.x", "model.layers.10.x", True),
        ("*.{q,k,v}_proj.*", NAME, True),
        ("*.{k,{v,o}}_proj.*", NAME, False),
        ("*.{k,{q,o}}_proj.*", NAME, True),
        ("a{,b}", "a", True),
        ("a,b", "a,b", True),
        ("*q_proj", NAME, False),
        ("model?layers*", NAME, True),
        ("model.layers.[0-4].*", NAME, True),
        ("model.layers.[!0-4].*", NAME, False),
        ("model.layers.[^5].*", NAME, True),
        ("a[]]b", "a]b", True),
        ("model.layers", "modelxlayers", False),
        (r"a\*b", "a*b", True),
        (r"a\*b", "axb", False),
        (r"a\{b", "a{b", True),
        ("*", "line\nbreak", True),
        ("/.*q_proj.*/", NAME, True),
        ("/q_proj/", NAME, False),
        (r"/model\.layers\.(1|3)\..*/", NAME, True),
        (r"/[(+*]+/", "(+", True),
        (r"/(?:ab)?c/", "abc", True),
    ],
)
def test_a_pattern_matches_the_whole_name(pattern, name, expected):
    assert compile_patterns(pattern)(name) is expected


@settings(max_examples=400, deadline=None)
@given(st.text("ab.*?", min_size=1, max_size=10), st.text("ab.", max_size=12))
def test_globs_without_braces_agree_with_fnmatch(pattern, name):
    assert compile_patterns(pattern)(name) == fnmatch.fnmatchcase(name, pattern)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab*", max_size=3), min_size=1, max_size=4), st.text("ab", max_size=6))
def test_braces_are_the_union_of_their_alternatives(parts, name):
    expected = any(fnmatch.fnmatchcase(name, f"a{part}b") for part in parts)
    assert compile_patterns("a{" + ",".join(parts) + "}b")(name) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", 'pattern "", character 1: the pattern is empty'),
        ("a.{b,c", 'pattern "a.{b,c", character 3: this "{" is never closed'),
        ("a}", 'pattern "a}", character 2: this "}" closes nothing; write \\} for the character'),
        ("a[bc", 'pattern "a[bc", character 2: this "[" is never closed'),
        ("[z-a]", 'pattern "[z-a]", character 1: not a set of characters: bad character range z-a'),
        ("a\\", 'pattern "a\\", character 2: nothing follows the backslash'),
        ("{3..0}", 'pattern "{3..0}", character 1: the range runs backwards; write {0..3}'),
        ("{00..3}", 'pattern "{00..3}", character 1: a range is written without leading zeros'),
        ("/b(a/", 'pattern "/b(a/", character 2: not a regular expression: missing ): b(a'),
        (
            "/ba{2}(?=x)/",
            'pattern "/ba{2}(?=x)/", character 7: not a regular expression: invalid perl operator: (?=',
        ),
        ("/ab{,3}/", 'pattern "/ab{,3}/", character 4: not a clear regular expression: write {0,n} for {,n}'),
        (
            "/a",
            'pattern "/a", character 1: a regular expression is written between two slashes',
        ),
    ],
)
def test_a_bad_pattern_is_named_with_the_position(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compile_patterns(["ok.*", pattern])


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..10000}",
        "{0..999999999}",
        "{0..99}{0..99}{0..99}",
        "{a,b}" * 40,
        "{0..9999}" + "x" * 900,
        "x" * 1001,
    ],
)
def test_expansion_is_bounded_and_quick(pattern):
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"more than|longer than"):
        compile_patterns(pattern)
    assert time.perf_counter() - begun < 2
    assert compile_patterns(f"{{1..{MAX_ALTERNATIVES}}}")(str(MAX_ALTERNATIVES))


@pytest.mark.parametrize(
    "pattern",
    [
        r"/(a)\1/",
        "/(?P<n>a)(?P=n)/",
        "/(?=a)b/",
        "/(?<!a)b/",
        "/(?>a+)b/",
        "/a++b/",
        "/(?x: a # ) \n)/",
        "/(?#()x+/",
        "/(x{100}){100}/",
        "/" + "(.?){900}" * 20 + "/",
        "/\ud800/",
    ],
)
def test_regular_expressions_that_need_backtracking_or_much_memory_are_refused(pattern):
    with pytest.raises(ValueError, match=r"not a regular expression: .* no look-around"):
        compile_patterns(pattern)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*a" * 200 + "b", "a" * 300),
        ("{*a,*b}" * 5 + "*" * 300 + "c", "a" * 300),
        ("/(x+)+y/", "x" * 500),
        ("/(x*)*y/", "x" * 500),
        ("/(a|aa)+b/", "a" * 500),
        ("/(?:a?)*b/", "a" * 500),
        ("/([)]x+)+/", ")x" * 200 + ")"),
        ("/" + ".*" * 400 + "x/", "a" * 500),
        ("/" + "(aa|aa|a)" * 60 + "c/", "a" * 100),
        ("/(?:a|b).*(?:ab|ba|a)(?:ab|ba|a).*(?:ab|a)(?:ab|a)(?:ab|a).*.*x/", "ab" * 100),
        ("/(.?){1000}x/", "a" * 500),
        (r"/(?:[a-z.]*\w?){900}-/", "a" * 500),
    ],
)
def test_matching_never_explodes(pattern, name):
    matcher = compile_patterns(pattern)
    begun = time.perf_counter()
    for _ in range(20):
        assert not matcher(name)
    assert time.perf_counter() - begun < 2


@pytest.mark.parametrize(
    "pattern",
    [
        r"/model\..*layers\.(\d|1\d)\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight.*/",
        r"/.*layers\.[0-9]+\..*(q|k)_proj.*\.weight.*/",
        r"/(.*\.)?layers\.(1[0-9]|[0-9])\.(?P<kind>\w+)\.[kqv]_proj\.(weight|bias)?/",
    ],
)
def test_everyday_regular_expressions_may_have_many_parts(pattern):
    matcher = compile_patterns(pattern)
    name = "model.language_model.layers.11.self_attn.q_proj.weight"
    assert matcher(name)
    assert re.fullmatch(pattern[1:-1], name)
    assert not matcher(name.replace("self_attn.q_proj", "norm"))


PARTS = st.sampled_from(["a", "b", ".", "[ab]", "a*", "(ab)?", "(a|b)+", "b{1,2}", r"\.", "(?:a.|b)"])


@settings(max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=6), st.text("ab.", max_size=8))
def test_regular_expressions_agree_with_pythons(parts, name):
    body = "".join(parts) or "a"
    assert compile_patterns(f"/{body}/")(name) == bool(re.fullmatch(body, name))


def test_unmatched_patterns_and_selected_names_keep_their_order():
    matcher = compile_patterns(["z*", "b", "a*"])
    assert matcher.unmatched(["a1", "b"]) == ("z*",)
    assert matcher.select(["b", "x", "a1"]) == ("b", "a1")
