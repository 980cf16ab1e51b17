"""Bodies of requests: what may be sent, with examples. Unknown fields are refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from allocator.budget import LATENCY, MEMORY, Budget, parse_bytes

Positive = Annotated[float, Field(gt=0, le=1e18, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Identifier = Annotated[str, Field(pattern=r"^[0-9a-f-]{1,80}$")]
# More bytes than any model: a budget that limits something else alone.
_UNLIMITED_BYTES = 2.0**60


class Body(BaseModel):
    """A body that takes the fields it names, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class NewModel(Body):
    """A model to be known by the service."""

    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None, description="Directory or GGUF file below a directory that the server was given."
    )
    reference: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None, description="Another word for path."
    )
    name: Name | None = None

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"path": "smollm2-135m", "name": "SmolLM2 135M"}]}
    )


class BudgetBody(Body):
    """What a plan may use: one goal, and further limits."""

    bits_per_weight: Positive | None = Field(default=None, description="Stored bits of the units per weight.")
    bytes: Positive | None = Field(default=None, description="Bytes of the weight file, and of a cache in the plan.")
    memory: Annotated[str, Field(max_length=40)] | None = Field(
        default=None, description="The same as a text, such as 70MiB."
    )
    max_kl: Positive | None = Field(default=None, description="Nats per token; memory is then minimised.")
    latency_us: Positive | None = Field(default=None, description="Microseconds of a step on the server's machine.")

    def goals(self) -> dict[str, float]:
        """Returns the fields of a ``Budget``.

        Raises:
            ValueError: If the size is no size, or bytes are given twice.
        """
        size = self.bytes
        if self.memory is not None:
            if size is not None:
                msg = "a budget must give its memory once: got bytes and memory. Leave one out."
                raise ValueError(msg)
            size = parse_bytes(self.memory)
        found = {MEMORY: size, "bits_per_weight": self.bits_per_weight, "max_kl": self.max_kl}
        return {name: value for name, value in found.items() if value is not None}


class NewPlan(Body):
    """A budget question."""

    profile_id: Identifier
    budget: BudgetBody
    metric: Name | None = None
    context: Annotated[int, Field(ge=1, le=10**8)] | None = Field(
        default=None, description="Tokens that each sequence keeps in the cache, which is then part of the plan."
    )
    batch: Annotated[int, Field(ge=1, le=10**6)] = Field(default=1, description="Sequences decoded together.")
    engine: Name | None = Field(default=None, description="Engine whose rules the plan keeps.")
    verify: Literal[False] = Field(default=False, description="Plans are verified by a job of the kind 'evaluate'.")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"profile_id": "6f0c…", "budget": {"memory": "70MiB"}, "engine": "llama.cpp"}]},
    )

    def make_budget(self) -> Budget:
        """Returns the budget.

        Raises:
            ValueError: If there is not exactly one goal, or a context goes with something that knows none.
        """
        goals, latency_us = self.budget.goals(), self.budget.latency_us
        if not goals and latency_us is not None:
            goals = {MEMORY: _UNLIMITED_BYTES}
        limits = {} if latency_us is None else {LATENCY: latency_us}
        return Budget(**goals, limits=limits, context=self.context, batch=self.batch)


class NewJob(Body):
    """Work for a worker."""

    kind: Literal["measure", "evaluate", "apply", "export", "report"]
    model_id: Identifier | None = Field(default=None, description="The model; known from the plan where there is one.")
    plan_id: Identifier | None = None
    plan_ids: Annotated[list[Identifier], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="Two plans of one model, for a report that compares them."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="measure: the fields of MeasureRequest and MeasureConfig, engine, low_memory, latency; evaluate "
        "and report: text; export: engine; report of one plan: pdf, parquet.",
    )

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"kind": "measure", "model_id": "0a1b…", "options": {"fit_plans": None}}]},
    )
