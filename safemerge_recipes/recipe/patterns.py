"""Patterns for tensor names: globs with braces, and `/regular expressions/`.

A pattern is matched against the whole name. In a glob `*` is any run of characters (dots too), `?` any one
character, `[abc]`, `[a-z]` and `[!abc]` one of a set, `{a,b}` one of the alternatives, `{0..3}` one of the
integers, and `\\` takes the next character as it is. Between slashes stands a Python regular expression that
must match the whole name: `/.*q_proj.*/`, not `/q_proj/`. Full matches fail closed: a pattern that is too
narrow matches nothing, and a rule that matches nothing is an error.

A recipe may come from a stranger, so matching must not hang. Globs never backtrack over an earlier `*`. A
regular expression is bounded in length and in its number of quantifiers, a quantified group may hold
neither a quantifier nor an alternation, and before each name the number of ways in which it could be tried is
bounded. This file knows nothing of recipes or checkpoints.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from safemerge_recipes.errors import RecipeError

MAX_LENGTH = 1_000
"""Longest pattern, in characters."""
MAX_ALTERNATIVES = 4_096
"""Most alternatives one glob's braces may expand to."""
MAX_PIECES = 200_000
"""Most characters all alternatives of one glob may hold together."""
MAX_WILD_PIECES = 20_000
"""The same for alternatives with wildcards, which cost far more than plain names."""
MAX_QUANTIFIERS = 4
"""Most quantifiers in one regular expression: each can multiply the work by the length of the name."""

MAX_WAYS = 10**9
"""Most ways in which a regular expression may be tried on one name: about three seconds."""
MAX_SECONDS = 30.0
"""Longest time one regular expression may spend on all names together."""

_ANY_RUN = None
"""The piece that stands for `*`; every other piece is the regular expression of one character."""
_Piece = str | None
_Glob = tuple[_Piece, ...]


@dataclass(frozen=True, slots=True)
class Matcher:
    """Tells which names any of some patterns match. Made by `compile_patterns`."""

    patterns: tuple[str, ...]
    _tests: tuple[Callable[[str], bool], ...] = field(repr=False, compare=False)

    def __call__(self, name: str) -> bool:
        """Whether any pattern matches the whole name."""
        return any(test(name) for test in self._tests)

    def select(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names that match, in the order given."""
        return tuple(name for name in names if self(name))

    def unmatched(self, names: Iterable[str]) -> tuple[str, ...]:
        """The patterns that match none of the names, in the order of the patterns."""
        pool = tuple(names)
        pairs = zip(self.patterns, self._tests, strict=True)
        return tuple(pattern for pattern, test in pairs if not any(map(test, pool)))


def compile_patterns(patterns: str | Sequence[str]) -> Matcher:
    """A matcher for one pattern or several.

    Raises:
        ValueError: a pattern is not well formed or not bounded; the message names it and the position.
    """
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return Matcher(listed, tuple(_compile(pattern) for pattern in listed))


def _error(pattern: str, position: int, problem: str) -> ValueError:
    shown = pattern if len(pattern) <= 80 else pattern[:77] + "..."
    return ValueError(f'pattern "{shown}", character {position + 1}: {problem}')


def _compile(pattern: str) -> Callable[[str], bool]:
    if not pattern:
        raise _error(pattern, 0, "the pattern is empty")
    if len(pattern) > MAX_LENGTH:
        raise _error(pattern, MAX_LENGTH, f"longer than {MAX_LENGTH} characters")
    if pattern.startswith("/"):
        return _compile_regex(pattern)
    globs, _ = _parse(pattern, 0, nested=False)
    exact = frozenset("".join(map(_literal, glob)) for glob in globs if all(map(_is_literal, glob)))
    wild = [glob for glob in globs if not all(map(_is_literal, glob))]
    if len(wild) > 1 and sum(map(len, wild)) > MAX_WILD_PIECES:
        raise _error(pattern, 0, f"braces around wildcards expand to more than {MAX_WILD_PIECES} characters")
    expressions = [re.compile(_translate(glob), re.DOTALL) for glob in wild]

    def test(name: str) -> bool:
        return name in exact or any(expression.fullmatch(name) for expression in expressions)

    return test


# Globs


def _is_literal(piece: _Piece) -> bool:
    return piece is not None and piece != "." and not piece.startswith("[")


def _literal(piece: _Piece) -> str:
    """The one character a literal piece stands for: `re.escape` puts at most one backslash before it."""
    assert piece is not None
    return piece[-1]


def _translate(glob: _Glob) -> str:
    """The regular expression of a glob without braces.

    Each `*` takes the shortest run after which the next part fits, and never another: a lookahead with a
    back-reference keeps the choice. That is enough for globs (only the last part is tied to the end).
    """
    parts: list[str] = [""]
    for piece in glob:
        if piece is _ANY_RUN:
            parts.append("")
        else:
            parts[-1] += piece
    if len(parts) == 1:
        return parts[0]
    first, *middle, last = parts
    kept = [part for part in middle if part]
    atomic = "".join(f"(?=(?P<g{i}>.*?{part}))(?P=g{i})" for i, part in enumerate(kept))
    return f"{first}{atomic}.*{last}"


def _parse(pattern: str, at: int, nested: bool) -> tuple[list[_Glob], int]:
    """The alternatives of a pattern from a position on, to its end or, when nested, to a closing brace.

    Returns the alternatives and the position after them.
    """
    done: list[_Glob] = []
    current: list[_Glob] = [()]
    start = at
    while at < len(pattern):
        char = pattern[at]
        if nested and char in ",}":
            done += current
            _bound(pattern, start - 1, done)
            at += 1
            if char == "}":
                return done, at
            current = [()]
            continue
        options: list[_Glob]
        if char == "{":
            opened = at
            options, at = _parse_brace(pattern, at)
            if len(current) * len(options) > MAX_ALTERNATIVES:
                raise _error(pattern, opened, f"braces expand to more than {MAX_ALTERNATIVES} alternatives")
        else:
            piece, at = _parse_piece(pattern, at)
            options = [(piece,)]
        current = [(*head, *tail) for head in current for tail in options]
        _bound(pattern, start, current)
    if nested:
        raise _error(pattern, start - 1, 'this "{" is never closed')
    return current, at


def _bound(pattern: str, at: int, globs: list[_Glob]) -> None:
    if len(globs) > MAX_ALTERNATIVES:
        raise _error(pattern, at, f"braces expand to more than {MAX_ALTERNATIVES} alternatives")
    if len(globs) > 1 and len(globs) * len(globs[-1]) > MAX_PIECES:
        raise _error(pattern, at, f"braces expand to more than {MAX_PIECES} characters")


def _parse_brace(pattern: str, at: int) -> tuple[list[_Glob], int]:
    """The alternatives of `{a,b}` or `{0..3}` that opens at a position, and the position after it."""
    if numbers := re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}").match(pattern, at):
        first, last = numbers.groups()
        if any(text != "0" and text.startswith("0") for text in (first, last)):
            raise _error(pattern, at, "a range is written without leading zeros")
        if int(first) > int(last):
            raise _error(pattern, at, f"the range runs backwards; write {{{last}..{first}}}")
        if int(last) - int(first) >= MAX_ALTERNATIVES:
            raise _error(pattern, at, f"braces expand to more than {MAX_ALTERNATIVES} alternatives")
        return [tuple(str(number)) for number in range(int(first), int(last) + 1)], numbers.end()
    return _parse(pattern, at + 1, nested=True)


def _parse_piece(pattern: str, at: int) -> tuple[_Piece, int]:
    char = pattern[at]
    if char == "*":
        return _ANY_RUN, at + 1
    if char == "?":
        return ".", at + 1
    if char == "[":
        return _parse_set(pattern, at)
    if char == "}":
        raise _error(pattern, at, 'this "}" closes nothing; write \\} for the character')
    if char == "\\":
        if at + 1 == len(pattern):
            raise _error(pattern, at, "nothing follows the backslash")
        return re.escape(pattern[at + 1]), at + 2
    return re.escape(char), at + 1


def _parse_set(pattern: str, at: int) -> tuple[str, int]:
    """The regular expression of `[abc]`, `[a-z]` or `[!abc]`, and the position after it."""
    inside = at + 1
    negated = pattern.startswith(("!", "^"), inside)
    inside += negated
    # As in every shell, a bracket that comes first stands for itself.
    end = pattern.find("]", inside + 1)
    if end < 0:
        raise _error(pattern, at, 'this "[" is never closed')
    body = re.sub(r"([\\\]\[^&~|])", r"\\\1", pattern[inside:end])
    expression = f"[{'^' * negated}{body}]"
    try:
        _regex(expression)
    except FutureWarning:
        raise _error(pattern, at, "not a clear set of characters; write \\- for a hyphen") from None
    except re.error as error:
        raise _error(pattern, at, f"not a set of characters: {error.msg}") from None
    return expression, end + 1


# Regular expressions


def _regex(body: str) -> re.Pattern[str]:
    """Compiles; raises FutureWarning for what a later Python may read otherwise, such as `[[`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        return re.compile(body)


def _compile_regex(pattern: str) -> Callable[[str], bool]:
    if len(pattern) < 3 or not pattern.endswith("/"):
        raise _error(pattern, 0, "a regular expression is written between two slashes, like /.*q_proj.*/")
    body = pattern[1:-1]
    try:
        compiled = _regex(body)
    except FutureWarning as warning:
        raise _error(
            pattern, 0, f"not a clear regular expression: {str(warning)[:60]}; write \\[ for a bracket"
        ) from None
    except re.error as error:
        raise _error(pattern, 1 + (error.pos or 0), f"not a regular expression: {error.msg}") from None
    except (OverflowError, RecursionError):
        raise _error(pattern, 0, "not a regular expression: a number or the nesting is too large") from None
    quantifiers, branches = _check_quantifiers(pattern, body)
    spent = 0.0

    def test(name: str) -> bool:
        nonlocal spent
        if math.comb(len(name) + quantifiers, quantifiers) * branches > MAX_WAYS or spent > MAX_SECONDS:
            raise RecipeError(
                f'pattern "{pattern[:80]}": could take for ever to match "{name[:80]}"; '
                "expected fewer quantifiers and alternatives, or a glob"
            )
        begun = time.perf_counter()
        found = compiled.fullmatch(name) is not None
        spent += time.perf_counter() - begun
        return found

    return test


def _check_quantifiers(pattern: str, body: str) -> tuple[int, int]:
    """The number of quantifiers and of steps on all ways through the alternations; refuses what could run for ever.

    Raises:
        ValueError: more than `MAX_QUANTIFIERS` quantifiers, or a quantified group that holds a quantifier or
            an alternation, as in `(x+)+` or `(a|ab)*`, or a back-reference.
    """
    quantifier = re.compile(r"[*+?]|\{[0-9]*,?[0-9]*\}")
    branching = [False]  # for each open group: does it hold a quantifier or an alternation?
    closed: bool | None = None  # the same of the group that closed just before this place
    count, at = 0, 0
    options, branches, choices = [1], 1, 0  # alternatives of each open group; their product, and how many groups
    while at < len(body):
        position, char = at, body[at]
        found = quantifier.match(body, at)
        if char == "\\":
            if body[at + 1] in "123456789":
                raise _error(pattern, 1 + position, "back-references are not supported")
            at += 2
        elif char == "[":
            at += 2 if body[at + 1] == "^" else 1
            at += body[at] == "]"
            while body[at] != "]":
                at += 2 if body[at] == "\\" else 1
            at += 1
        elif char == "(":
            branching.append(False)
            options.append(1)
            at += 1
            if body.startswith(("?P=", "?("), at):
                raise _error(pattern, 1 + position, "back-references are not supported")
            if re.compile(r"\?(#|[a-zA-Z]*x)").match(body, at):
                raise _error(pattern, 1 + position, "comments and verbose mode are not supported")
            if body.startswith("?", at):  # (?: and its like: this "?" is no quantifier
                at += 1
        elif char == ")":
            closed = branching.pop()
            choices += options[-1] > 1
            branches *= options.pop()
            branching[-1] |= closed
            at += 1
            continue
        elif found and found[0] not in ("{}", "{,}"):
            at = found.end()
            if body[at : at + 1] in ("?", "+"):  # lazy and possessive forms
                at += 1
            fixed_once = found[0] == "?" or found[0] in ("{0}", "{1}")
            if closed and not fixed_once:
                problem = "a repeated group may hold no quantifier or alternation; matching could take for ever"
                raise _error(pattern, 1 + position, problem)
            count += 1
            branching[-1] = True
            if count > MAX_QUANTIFIERS:
                raise _error(pattern, 1 + position, f"more than {MAX_QUANTIFIERS} quantifiers (* + ? {{}})")
        else:
            branching[-1] |= char == "|"
            options[-1] += char == "|"
            at += 1
        closed = None
    return count, branches * options.pop() * max(1, choices)
