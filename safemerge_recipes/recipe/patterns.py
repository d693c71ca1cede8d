"""Patterns for tensor names: globs with braces, and `/regular expressions/`.

A pattern is matched against the whole name. In a glob `*` is any run of characters (dots too), `?` any one
character, `[abc]`, `[a-z]` and `[!abc]` one of a set, `{a,b}` one of the alternatives, `{0..3}` one of the
integers, and `\\` takes the next character as it is. Between slashes stands a regular expression that must match
the whole name: `/.*q_proj.*/`, not `/q_proj/`. Full matches fail closed: a pattern that is too narrow matches
nothing, and a rule that matches nothing is an error.

A recipe may come from a stranger, so matching must not hang. Globs never backtrack over an earlier `*`. Regular
expressions are RE2's: the time is linear in the name's length, the memory bounded; what would need backtracking
(look-around, back-references) is not in its syntax. This file knows nothing of recipes or checkpoints.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

MAX_LENGTH = 1_000
"""Longest pattern, in characters."""
MAX_ALTERNATIVES = 4_096
"""Most alternatives one glob's braces may expand to."""
MAX_DEPTH = 20
"""Most braces inside one another."""
MAX_PIECES = 200_000
"""Most characters all alternatives of one glob may hold together."""
MAX_WILD_PIECES = 20_000
"""The same for alternatives with wildcards, which cost far more than plain names."""
MAX_MEMORY = 1 << 18
"""Bytes that one compiled regular expression may take: matching a name of usual length takes a millisecond at most."""

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
    globs, _ = _parse(pattern, 0)
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


def _parse(pattern: str, at: int, nested: int = 0) -> tuple[list[_Glob], int]:
    """The alternatives of a pattern from a position on, to its end or, when nested so deep, to a closing brace.

    Returns the alternatives and the position after them.
    """
    if nested > MAX_DEPTH:
        raise _error(pattern, at - 1, f"more than {MAX_DEPTH} braces inside one another")
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
            options, at = _parse_brace(pattern, at, nested)
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


def _parse_brace(pattern: str, at: int, nested: int) -> tuple[list[_Glob], int]:
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
    return _parse(pattern, at + 1, nested + 1)


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
        with warnings.catch_warnings():  # what a later Python may read otherwise, such as `[a--b]`
            warnings.simplefilter("error", FutureWarning)
            re.compile(expression)
    except FutureWarning:
        raise _error(pattern, at, "not a clear set of characters; write \\- for a hyphen") from None
    except re.error as error:
        raise _error(pattern, at, f"not a set of characters: {error.msg}") from None
    return expression, end + 1


# Regular expressions


def _compile_regex(pattern: str) -> Callable[[str], bool]:
    if len(pattern) < 3 or not pattern.endswith("/"):
        raise _error(pattern, 0, "a regular expression is written between two slashes, like /.*q_proj.*/")
    import re2

    body = pattern[1:-1]
    if found := re.search(r"\{,[0-9]", body):  # ordinary characters to RE2, a repetition to Python
        raise _error(pattern, 1 + found.start(), "not a clear regular expression: write {0,n} for {,n}")
    options = re2.Options()
    options.log_errors, options.never_capture, options.max_mem = False, True, MAX_MEMORY
    try:
        compiled = re2.compile(body, options)
    except (re2.error, UnicodeEncodeError) as error:
        problem = error.args[0].decode("utf-8", "replace") if isinstance(error, re2.error) else "half a character"
        _, _, quoted = problem.partition(": ")
        position = 1 + body.find(quoted) if quoted and quoted in body else 0
        raise _error(
            pattern, position, f"not a regular expression: {problem} (RE2's syntax: no look-around, no back-references)"
        ) from None
    return lambda name: compiled.fullmatch(name) is not None
