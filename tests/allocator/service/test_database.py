"""Both databases: the same tables, brought up to date by steps; what is wrong with them is one exception."""

import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event, insert, inspect, select, text
from sqlalchemy.exc import IntegrityError

from allocator.service.database import Database, Unavailable, check_url, now_s
from allocator.service.paging import read_page
from allocator.service.records import Records, add_profile
from allocator.service.schema import metadata, models, profiles
from tests.allocator.service.test_job_queue import run_together
from tests.postgres_cluster import PostgresCluster


def test_the_steps_make_the_tables_of_the_schema(database: Database) -> None:
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        indices = {index["name"] for table in metadata.tables for index in inspect(connection).get_indexes(table)}
    assert indices == {str(index.name) for table in metadata.tables.values() for index in table.indexes}


def test_several_processes_bring_it_up_to_date_at_once(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    run_together(lambda opened: opened.migrate(), list(databases))
    with databases[0].reading() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == ["0001"]
    for opened in databases:
        opened.close()


def test_a_failed_transaction_changes_nothing(database: Database) -> None:
    values = {"id": "a", "name": "a", "path": "a", "facts": "{}", "created_at": 1.0}
    with pytest.raises(IntegrityError), database.writing() as connection:
        connection.execute(insert(models).values(values))
        connection.execute(insert(models).values(values))
    with database.reading() as connection:
        assert connection.execute(select(models)).all() == []


def test_its_clock_is_in_seconds(database: Database) -> None:
    before = time.time()
    with database.reading() as connection:
        found = connection.execute(select(now_s())).scalar_one()
    assert before <= found <= time.time()


def test_pages_hold_every_row_once_whatever_their_length(database: Database) -> None:
    with database.writing() as connection:
        for i in range(11):
            # Several at the same moment, so that the id decides.
            row = {"id": f"{i:02d}", "name": str(i), "path": "p", "facts": "{}", "created_at": float(i // 4)}
            connection.execute(insert(models).values(row))
    expected = sorted((f"{i:02d}" for i in range(11)), key=lambda key: (int(key) // 4, key), reverse=True)
    for limit in (1, 2, 3, 10, 11, 12):
        found: list[str] = []
        cursor = None
        while True:
            with database.reading() as connection:
                page = read_page(connection, select(models), models, limit=limit, cursor=cursor)
            found += [row.id for row in page.rows]
            cursor = page.next_cursor
            if cursor is None:
                break
        assert found == expected


@pytest.mark.parametrize("cursor", ["", "x", "e30", "WzEsMl0", "W251bGwsIngiXQ", "ä"])
def test_a_cursor_that_no_page_gave_is_refused(database: Database, cursor: str) -> None:
    refusal = pytest.raises(ValueError, match="a cursor must be the next_cursor of a page")
    with database.reading() as connection, refusal:
        read_page(connection, select(models), models, limit=1, cursor=cursor)


def test_what_is_added_twice_stays_as_it_was(database: Database) -> None:
    records = Records(database)
    first = records.add_model("m", name="first", path="p", facts={"bytes": 1})
    assert records.add_model("m", name="second", path="q", facts={"bytes": 2}) == first
    for _ in range(2):
        with database.writing() as connection:
            add_profile(connection, "p", "m")
    assert [row.id for row in records.related(profiles, "m")] == ["p"]


def test_writers_wait_for_each_other(database: Database) -> None:
    records = Records(database)
    run_together(lambda i: records.add_model(f"m{i}", name="n", path="p", facts={}), list(range(16)))
    with database.reading() as connection:
        assert len(connection.execute(select(models)).all()) == 16


def test_other_databases_are_refused() -> None:
    with pytest.raises(ValueError, match="a database must be SQLite or PostgreSQL: got 'mysql'"):
        check_url("mysql://somewhere/else")


def test_a_full_disk_is_unavailable_and_recovers(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'small.sqlite3'}")
    database.migrate()
    records = Records(database)
    with database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    limit_pages(database, pages)
    with pytest.raises(Unavailable, match="the database must be reachable and able to write: .*full"):
        records.add_model("m", name="n", path="p" * 100_000, facts={})
    limit_pages(database, 10 * pages + 100)
    assert records.add_model("m", name="n", path="p" * 100_000, facts={}).id == "m"


def limit_pages(database: Database, pages: int) -> None:
    """Lets a database's file have at most so many pages; the limit is one of each connection."""
    database.engine.dispose()
    event.listen(database.engine, "connect", lambda connection, _: connection.execute(f"PRAGMA max_page_count={pages}"))


def test_a_server_that_is_gone_is_unavailable_and_recovers(postgres: PostgresCluster) -> None:
    database = Database(postgres.make_database())
    database.migrate()
    records = Records(database)
    records.add_model("m", name="n", path="p", facts={})
    postgres.stop()
    try:
        for _ in range(2):
            with pytest.raises(Unavailable, match="the database must be reachable and able to write"):
                records.find(models, "m")
            with pytest.raises(Unavailable, match="the database must be reachable and able to write"):
                records.add_model("other", name="n", path="p", facts={})
    finally:
        postgres.start()
    row = records.find(models, "m")
    assert row is not None and row.name == "n"
    database.close()
