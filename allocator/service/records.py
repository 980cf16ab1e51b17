"""Models, profiles, plans and artefacts in the database: written once, read often."""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, Table, func, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from allocator.service.database import Database, now_s
from allocator.service.paging import Page, read_page
from allocator.service.schema import artefacts, jobs, models, plans, profiles

SHOWN_PLANS = 20


class Records:
    """What the service knows.

    Args:
        database: Where it is.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    def find(self, table: Table, key: str) -> Row[Any] | None:
        """Returns the row with an id, or None."""
        with self.database.reading() as connection:
            return connection.execute(select(table).where(table.c.id == key)).first()

    def list_page(self, table: Table, *, limit: int, cursor: str | None, **equal: str | None) -> Page:
        """Returns a page of a table, of the rows whose columns equal what is given.

        Raises:
            ValueError: If the cursor is not one that a page gave.
        """
        query = select(table).where(*(table.c[name] == value for name, value in equal.items() if value is not None))
        with self.database.reading() as connection:
            return read_page(connection, query, table, limit=limit, cursor=cursor)

    def add_model(self, key: str, *, name: str, path: str, facts: Mapping[str, Any]) -> Row[Any]:
        """Returns the row of a model, new or known."""
        with self.database.writing() as connection:
            add_once(connection, models, id=key, name=name, path=path, facts=json.dumps(dict(facts)))
            return connection.execute(select(models).where(models.c.id == key)).one()

    def add_plan(self, **values: Any) -> float | None:
        """Keeps a plan and returns when, or None where it is there already and stays as it is."""
        with self.database.writing() as connection:
            return add_once(connection, plans, **values)

    def related(self, table: Table, model_id: str, *, limit: int = SHOWN_PLANS) -> list[Row[Any]]:
        """Returns the newest rows of a table that belong to a model."""
        query = select(table).where(table.c.model_id == model_id).order_by(table.c.created_at.desc(), table.c.id.desc())
        with self.database.reading() as connection:
            return list(connection.execute(query.limit(limit)))

    def last_evaluation(self, plan_id: str) -> tuple[str, list[dict[str, Any]]] | None:
        """Returns the job that measured a plan last and the rows of its evaluation, or None."""
        query = (
            select(jobs.c.id, jobs.c.result)
            .where(jobs.c.plan_id == plan_id, jobs.c.kind == "evaluate", jobs.c.state == "succeeded")
            .order_by(jobs.c.finished_at.desc())
            .limit(1)
        )
        with self.database.reading() as connection:
            row = connection.execute(query).first()
        return None if row is None else (row.id, json.loads(row.result)["evaluation"])

    def count_jobs(self) -> dict[str, int]:
        """Returns state -> number of jobs."""
        with self.database.reading() as connection:
            rows = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state)).all()
        return {state: count for state, count in rows}


def add_once(connection: Connection, table: Table, **values: Any) -> float | None:
    """Adds a row and returns when it was made, or None where its id is there already."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(table).values(created_at=now_s(), **values)
    added = statement.on_conflict_do_nothing(index_elements=["id"]).returning(table.c.created_at)
    created_at: float | None = connection.execute(added).scalar()
    return created_at


def add_profile(connection: Connection, profile_id: str, model_id: str) -> None:
    """Keeps that a profile belongs to a model."""
    add_once(connection, profiles, id=profile_id, model_id=model_id)


def add_artefact(connection: Connection, **values: Any) -> None:
    """Keeps what a job wrote."""
    connection.execute(insert(artefacts).values(created_at=now_s(), **values))
