"""Times of the database as people and browsers read them."""

from datetime import UTC, datetime


def iso_time(seconds: float | None) -> str | None:
    """Returns seconds since 1970 as ISO 8601 in UTC, or None."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
