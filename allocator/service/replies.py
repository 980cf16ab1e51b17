"""What is answered, for the description alone: the documents themselves are made in ``*_documents.py``."""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class Reply(BaseModel):
    """A document with these members, and perhaps others."""

    model_config = ConfigDict(extra="allow")


class Items(Reply, Generic[T]):
    """One page of a list."""

    items: list[T]
    next_cursor: str | None


class Named(Reply):
    """Something that was made, by its id."""

    id: str
    created_at: str


class ProgressReply(Reply):
    """How far a job is."""

    stage: str
    done: int
    total: int
    unit: str


class JobReply(Named):
    """A job."""

    kind: Literal["measure", "evaluate", "apply", "export", "report"]
    state: State
    model_id: str
    plan_id: str | None
    plan_ids: list[str] | None
    options: dict[str, Any]
    attempts: int
    progress: ProgressReply
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    started_at: str | None
    finished_at: str | None


class PlanSummary(Named):
    """A plan in a list."""

    summary: str


class ModelReply(Named):
    """A model; what is null is not known before it is measured."""

    name: str
    reference: str
    architecture: str | None
    parameters: int | None
    units: int | None
    layers: int | None
    experts_per_layer: int | None
    bytes: int
    latest_job: JobReply | None
    profiles: list[Named]
    plans: list[PlanSummary]


class RoleReply(Reply):
    """The units of one role."""

    role: str
    bytes: int
    bits_per_weight: float | None


class BaselineReply(Reply):
    """A uniform format."""

    name: str
    bytes: int
    predicted_loss: float
    latency_us: float | None


class PlanReply(Reply):
    """A plan; losses in nats per token, the shadow price in nats per byte."""

    id: str
    profile_id: str
    model_id: str
    budget: dict[str, float]
    engine: str | None
    metric: str
    predicted_loss: float | None
    standard_error: float | None
    measured_kl: float | None
    interval: list[float] | None
    bytes: int
    bits_per_weight: float
    latency_us: float | None
    termination: str
    lower_bound: float | None
    gap: float | None
    shadow_price: float
    solve_ms: float
    choice: dict[str, str]
    bytes_by_role: list[RoleReply]
    baselines: list[BaselineReply]
    engine_price: dict[str, Any] | None


class PricedFormat(Reply):
    """One format of a unit: what it costs, loses, and both at the plan's shadow price."""

    format: str
    bytes: float | None
    loss: float | None
    standard_error: float | None
    price: float | None
    chosen: bool
    on_hull: bool
    allowed: bool
    reason: str | None


class UnitReply(Reply):
    """Why a unit got its format."""

    unit: str
    chosen: str
    shadow_price: float
    curve: list[PricedFormat]


class ProfileReply(Named):
    """A sensitivity profile."""

    model_id: str
    metric_names: list[str]
    default_metric: str
    resources: list[str]
    formats: list[str]
    units: list[dict[str, Any]]
    fixed_bytes: int
    uniform: list[dict[str, Any]]
    experts: dict[str, Any] | None


class PointReply(Reply):
    """One point of a frontier; ``use`` is of the resource that it is along."""

    use: float
    bytes: float
    bits_per_weight: float
    predicted_loss: float
    gap: float


class FrontierReply(Reply):
    """The least loss at every size."""

    profile_id: str
    resource: str
    metric: str
    points: list[PointReply]


class FileReply(Reply):
    """A file of a report or an export."""

    name: str
    bytes: int
    media_type: str
    url: str


class ArtefactReply(Named):
    """A report or an export."""

    job_id: str
    model_id: str
    files: list[FileReply]


class EngineReply(Reply):
    """An engine's rules."""

    name: str
    title: str
    formats: list[str]
    rules: list[str]
    exporter: bool
    note: str
