"""Pages of lists: newest first, from a cursor that says where the last page ended."""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, and_, or_

LARGEST_PAGE = 200


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of a list.

    Args:
        rows: Its rows.
        next_cursor: Where the next page begins; None after the last one.
    """

    rows: Sequence[Row[Any]]
    next_cursor: str | None


def read_page(connection: Connection, query: Select[Any], table: Table, *, limit: int, cursor: str | None) -> Page:
    """Returns a page of a query on a table that has ``created_at`` and ``id``.

    Args:
        connection: Where to read.
        query: What to list, without an order.
        table: The table that it lists.
        limit: Most rows of the page.
        cursor: Where the last page ended; None for the first page.

    Raises:
        ValueError: If the cursor is not one that a page gave.
    """
    created_at, key = table.c.created_at, table.c.id
    if cursor is not None:
        last_time, last_id = _read_cursor(cursor)
        query = query.where(or_(created_at < last_time, and_(created_at == last_time, key < last_id)))
    rows = connection.execute(query.order_by(created_at.desc(), key.desc()).limit(limit + 1)).fetchall()
    if len(rows) <= limit:
        return Page(rows=rows, next_cursor=None)
    last = rows[limit - 1]
    return Page(rows=rows[:limit], next_cursor=_make_cursor(last.created_at, last.id))


def _make_cursor(created_at: float, key: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([created_at, key]).encode()).decode().rstrip("=")


def _read_cursor(text: str) -> tuple[float, str]:
    try:
        padded = text.encode("ascii") + b"=" * (-len(text) % 4)
        created_at, key = json.loads(base64.urlsafe_b64decode(padded))
        if not isinstance(created_at, float) or not isinstance(key, str):
            raise TypeError
    except (ValueError, TypeError, UnicodeError, binascii.Error) as error:
        msg = f"a cursor must be the next_cursor of a page: got '{text[:64]}'. Leave it out for the first page."
        raise ValueError(msg) from error
    return created_at, key
