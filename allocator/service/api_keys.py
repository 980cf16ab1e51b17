"""API keys: made once, shown once, kept as a slow hash; each has a scope, and may end or be replaced.

A key is ``bp_<id>_<secret>``; the id finds the row, the secret has 256 random bits. The row has a salt and
scrypt(secret, salt). A key that was checked once is remembered by its SHA-256 in memory, so that scrypt runs once for
each key and process; whether it was revoked or has ended is read every time.
"""

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, insert, select, update

from allocator.service.database import Database, now_s
from allocator.service.paging import Page, read_page
from allocator.service.recent import Recent
from allocator.service.schema import api_keys

READ, PLAN, ADMIN = SCOPES = ("read", "plan", "admin")
_KEY = re.compile(r"bp_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_REMEMBERED = 1024


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """What is known of a key.

    Args:
        key_id: The part of it that is no secret.
        name: What it is for.
        scope: Name in ``SCOPES``; each includes those before it.
        expires_at: When it ends, seconds since 1970; None for never.
        revoked_at: When it was revoked, or None.
    """

    key_id: str
    name: str
    scope: str
    expires_at: float | None
    revoked_at: float | None

    @property
    def is_valid(self) -> bool:
        """Whether it opens anything now."""
        return self.revoked_at is None and (self.expires_at is None or time.time() < self.expires_at)

    def allows(self, scope: str) -> bool:
        """Returns whether the key's scope includes another."""
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class ApiKeys:
    """The keys of a service.

    Args:
        database: Where they are.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._checked: Recent[str, str] = Recent(_REMEMBERED)

    def add(self, name: str, scope: str, *, expires_at: float | None = None) -> tuple[str, str]:
        """Returns the id of a new key and the key itself, which is kept nowhere.

        Raises:
            ValueError: If the scope is unknown.
        """
        if scope not in SCOPES:
            msg = f"a key's scope must be among {', '.join(SCOPES)}: got '{scope}'. Correct it."
            raise ValueError(msg)
        key_id, secret, salt = secrets.token_hex(8), secrets.token_urlsafe(32), secrets.token_bytes(16)
        with self.database.writing() as connection:
            values = {"name": name, "scope": scope, "salt": salt, "digest": _slow_hash(secret, salt)}
            connection.execute(insert(api_keys).values(id=key_id, created_at=now_s(), expires_at=expires_at, **values))
        return key_id, f"bp_{key_id}_{secret}"

    def rotate(self, key_id: str, *, overlap_s: float = 0.0) -> tuple[str, str]:
        """Returns a new key of the same name and scope; the old one ends after ``overlap_s`` seconds.

        Raises:
            ValueError: If there is no such key, or it is not valid any more.
        """
        old = self.find(key_id)
        if old is None or not old.is_valid:
            msg = f"a key must be valid to be replaced: got '{key_id}', which is not. 'bitplan keys list' shows them."
            raise ValueError(msg)
        made = self.add(old.name, old.scope, expires_at=old.expires_at)
        ends_at = time.time() + overlap_s
        with self.database.writing() as connection:
            values = {"expires_at": min(ends_at, old.expires_at or ends_at)}
            connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(values))
        return made

    def revoke(self, key_id: str) -> None:
        """Ends a key now.

        Raises:
            ValueError: If there is no such key.
        """
        if self.find(key_id) is None:
            msg = f"a key must be known to be revoked: got '{key_id}', which is not. 'bitplan keys list' shows them."
            raise ValueError(msg)
        with self.database.writing() as connection:
            condition = (api_keys.c.id == key_id) & api_keys.c.revoked_at.is_(None)
            connection.execute(update(api_keys).where(condition).values(revoked_at=now_s()))

    def find(self, key_id: str) -> ApiKey | None:
        """Returns what is known of a key, or None."""
        with self.database.reading() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).first()
        return None if row is None else _known(row)

    def list_page(self, *, limit: int, cursor: str | None = None) -> tuple[list[ApiKey], str | None]:
        """Returns keys, newest first, and where the next page begins."""
        with self.database.reading() as connection:
            page: Page = read_page(connection, select(api_keys), api_keys, limit=limit, cursor=cursor)
        return [_known(row) for row in page.rows], page.next_cursor

    def check(self, key: str) -> ApiKey | None:
        """Returns what is known of a key that somebody sent; None where it opens nothing."""
        found = _KEY.fullmatch(key)
        if found is None:
            return None
        key_id, secret = found.groups()
        with self.database.reading() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).first()
        if row is None or not _known(row).is_valid:
            return None
        sent = hashlib.sha256(key.encode()).hexdigest()
        if self._checked.get(key_id) == sent:
            return _known(row)
        if not hmac.compare_digest(_slow_hash(secret, row.salt), row.digest):
            return None
        self._checked.put(key_id, sent)
        return _known(row)


def _slow_hash(secret: str, salt: bytes) -> bytes:
    return hashlib.scrypt(secret.encode(), salt=salt, n=2**14, r=8, p=1)


def _known(row: Row[Any]) -> ApiKey:
    return ApiKey(key_id=row.id, name=row.name, scope=row.scope, expires_at=row.expires_at, revoked_at=row.revoked_at)
