"""Numbers, sizes and outside text as people read them. Pure; knows no plan and no output format."""

from __future__ import annotations

import math
import unicodedata

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that print nothing or reorder what follows: shown as escapes instead."""


def number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def count(value: object) -> int:
    """A whole number of things; 0 for anything else."""
    found = number(value)
    return int(found) if found is not None and found >= 0 else 0


def clean(value: object, limit: int = 400) -> str:
    """Text from outside on one line: hidden characters as escapes, the middle cut beyond the limit."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    if len(text) > limit:
        head = limit * 2 // 3
        text = f"{text[:head]}…{text[len(text) - (limit - head - 1) :]}"
    if text.isprintable():
        return text
    return "".join(_visible(char) for char in text)


def clean_lines(value: object, limit: int = 200_000) -> str:
    """Like `clean`, but keeps line breaks and tabs, and cuts the end."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    cut = f"{text[:limit]}\n…" if len(text) > limit else text
    return "".join(char if char in "\n\t" else _visible(char) for char in cut)


def _visible(char: str) -> str:
    if unicodedata.category(char) not in _HIDDEN:
        return char
    return ascii(char)[1:-1]


def figure(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, without trailing zeros; a dash for none."""
    if value is None:
        return "–"
    if 1000 <= abs(value) < 1e9:
        return grouped(round(value))
    return _minus(f"{value:.{digits}g}")


def fixed(value: float | None, places: int = 3) -> str:
    """A number with so many decimals; a dash for none."""
    return "–" if value is None else _minus(f"{value:.{places}f}")


def percent(rate: float | None, places: int | None = 1) -> str:
    """A rate, where 1 is all, as `93.0 %`, without trailing zeros where `places` is None; a dash for none."""
    if rate is None:
        return "–"
    return f"{figure(100 * rate) if places is None else fixed(100 * rate, places)} %"


def points(difference: float | None) -> str:
    """A difference of two rates in percentage points, signed: `+38.7`, `−1.2`; a dash for none."""
    return "–" if difference is None else _minus(f"{100 * difference:+.1f}")


def signed(value: float | None) -> str:
    """A difference with its sign, to three significant digits; a dash for none."""
    return "–" if value is None else f"{'+' if value > 0 else ''}{figure(value)}"


def _minus(digits: str) -> str:
    """The number with a minus sign for its hyphen, but for that of an exponent."""
    return f"−{digits[1:]}" if digits.startswith("-") else digits


def size(value: object) -> str:
    """Bytes in decimal units."""
    amount = number(value)
    if amount is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(amount) < 999.5 or unit == "TB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    raise AssertionError


def duration(value: object) -> str:
    """Seconds as seconds, minutes or hours."""
    seconds = number(value)
    if seconds is None:
        return "–"
    if seconds < 99.5:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def things(amount: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`, `45 000 tensors`."""
    return f"{grouped(amount)} {noun}{'' if amount == 1 else 's'}"


def grouped(amount: int) -> str:
    """A whole number with thin groups of thousands."""
    return f"{amount:,}".replace(",", "\N{NO-BREAK SPACE}") if abs(amount) >= 10_000 else str(amount)


def median(values: list[float]) -> float | None:
    """The middle value, or the mean of the two middle ones; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
