"""Times of the database as people and browsers read them."""

from datetime import UTC, datetime


def iso_time(seconds: float) -> str:
    """Returns seconds since 1970 as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
