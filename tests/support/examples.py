"""The number of examples of property tests whose examples are slow."""

from hypothesis import settings


def at_most(count: int) -> settings:
    """`count` examples, or the profile's number where that is smaller."""
    return settings(max_examples=min(count, settings().max_examples))
