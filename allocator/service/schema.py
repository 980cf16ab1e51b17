"""The tables. What is written here as a whole is made by the migrations step by step; a test compares the two."""

from sqlalchemy import (
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = STATES = ("queued", "running", "succeeded", "failed", "cancelled")
ENDED = (SUCCEEDED, FAILED, CANCELLED)
_ONCE = text("state in ('queued', 'running', 'succeeded')")

metadata = MetaData()

# Times are seconds since 1970, by the clock of the database. Documents are JSON texts.
models = Table(
    "models",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("facts", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Index("models_by_time", "created_at", "id"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    # Equal for requests that ask for the same; only one of them may be waiting, running or done.
    Column("fingerprint", String(64), nullable=False),
    Column("model_id", String(32), ForeignKey("models.id"), nullable=False),
    Column("plan_id", String(32), nullable=True),
    Column("options", Text, nullable=False),
    Column("progress", Text, nullable=False),
    Column("result", Text, nullable=True),
    Column("error", Text, nullable=True),
    # The fencing token: raised by every claim, so that a worker whose job was given away can change nothing.
    Column("fence", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("worker", Text, nullable=True),
    Column("lease_until", Float, nullable=True),
    # Raised by every change that somebody who watches must see.
    Column("version", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float, nullable=True),
    Column("finished_at", Float, nullable=True),
    Index("jobs_once", "fingerprint", unique=True, sqlite_where=_ONCE, postgresql_where=_ONCE),
    Index("jobs_by_time", "created_at", "id"),
    Index("jobs_by_state", "state", "created_at"),
    Index("jobs_by_model", "model_id", "created_at"),
    Index("jobs_by_plan", "plan_id"),
)

# One row for each time that a worker took a job, and how that ended; written together with the job.
attempts = Table(
    "attempts",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.id"), primary_key=True),
    Column("fence", Integer, primary_key=True),
    Column("worker", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float, nullable=True),
    Column("outcome", String(16), nullable=True),
)

profiles = Table(
    "profiles",
    metadata,
    # Its fingerprint, under which the store has it.
    Column("id", String(64), primary_key=True),
    Column("model_id", String(32), ForeignKey("models.id"), nullable=False),
    Column("created_at", Float, nullable=False),
    Index("profiles_by_time", "created_at", "id"),
    Index("profiles_by_model", "model_id", "created_at"),
)

plans = Table(
    "plans",
    metadata,
    # Hash of what was asked; the answer is made again from the profile and the choice.
    Column("id", String(32), primary_key=True),
    Column("profile_id", String(64), ForeignKey("profiles.id"), nullable=False),
    Column("model_id", String(32), ForeignKey("models.id"), nullable=False),
    Column("question", Text, nullable=False),
    # [U] uint16 format indices.
    Column("choice", LargeBinary, nullable=False),
    Column("solution", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Index("plans_by_time", "created_at", "id"),
    Index("plans_by_model", "model_id", "created_at"),
)

# Directories that jobs wrote: exports, packed models, reports.
artefacts = Table(
    "artefacts",
    metadata,
    Column("id", String(48), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("job_id", String(32), ForeignKey("jobs.id"), nullable=False),
    Column("model_id", String(32), ForeignKey("models.id"), nullable=False),
    Column("plan_id", String(32), nullable=True),
    Column("facts", Text, nullable=False),
    Column("created_at", Float, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", Text, nullable=False),
    Column("scope", String(8), nullable=False),
    Column("salt", LargeBinary, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=True),
    Column("revoked_at", Float, nullable=True),
)

# Answers to POST requests that carried an Idempotency-Key.
answers = Table(
    "answers",
    metadata,
    # Hash of the key, who sent it, and where to.
    Column("id", String(64), primary_key=True),
    Column("body_hash", String(64), nullable=False),
    Column("status", Integer, nullable=True),
    Column("body", Text, nullable=True),
    Column("created_at", Float, nullable=False),
)
