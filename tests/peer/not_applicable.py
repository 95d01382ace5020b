"""Tests of transformers that do not apply to our models, each with its reason, and how many are skipped."""

from typing import NamedTuple


class NotApplicable(NamedTuple):
    """
    Args:
        test: Name of the test, or `test[part]` for a `subTest`; with wildcards.
        testers: The classes it concerns; with wildcards.
        message: What the failure says; another failure is not covered.
        reason: Why it does not apply.
    """

    test: str
    testers: tuple[str, ...]
    message: str
    reason: str


NOT_APPLICABLE: list[NotApplicable] = []

SKIPPED: dict[str, int] = {}
