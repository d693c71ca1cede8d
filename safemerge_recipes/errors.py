"""The error tree: one class for each phase, each with the exit code users script against.

A message says where, what was found, what was expected and what to try. Only `cli` prints it.
"""

from __future__ import annotations


class SafemergeError(Exception):
    """Base of every error a user may see. `exit_code` is the process's exit status."""

    exit_code = 1


class RecipeError(SafemergeError):
    """The recipe or the command line is wrong (exit code 2)."""

    exit_code = 2


class SourceError(SafemergeError):
    """A source is missing, broken or does not fit the others (exit code 3)."""

    exit_code = 3


class ReadError(SourceError):
    """The disk or network under a source failed while it was read. What is done stays done."""


class PlanError(SafemergeError):
    """The plan cannot be carried out: memory, disk, or an output in the way (exit code 4)."""

    exit_code = 4


class WriteError(SafemergeError):
    """Stopped while writing; the same command resumes (exit code 5)."""

    exit_code = 5


class CheckError(SafemergeError):
    """Verification or evaluation failed (exit code 6)."""

    exit_code = 6
