"""Clients of a service: the verbs of ``allocator``, done elsewhere.

    with allocator.Client("http://127.0.0.1:8420") as client:
        profile = client.measure("smollm2-135m")
        plan = client.plan(profile, allocator.Budget(bits_per_weight=3.5))
        client.export(plan, "llama.cpp", Path("gguf"))

A request that gets no answer, or one that says to come back later, is sent again after a pause that doubles each time,
times a random factor so that many clients do not come back at once. Every POST carries an Idempotency-Key, so that one
that is sent twice counts once.
"""

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

from allocator import client_verbs as verbs
from allocator.budget import Budget
from allocator.client_requests import Call, Fetch, Steps, Wait
from allocator.client_steps import ClientSteps
from allocator.client_verbs import RemotePlan, RemoteProfile
from allocator.plans import Evaluation

if TYPE_CHECKING:
    from allocator.measuring import MeasureRequest


class Client(ClientSteps):
    """A client that waits.

    Args:
        url: Where the service answers.
        key: API key, where it asks for one.
        repeats: Times that a request is sent again before it is given up.
        show_progress: Whether jobs show their progress on stderr.
    """

    def __init__(self, url: str, key: str | None = None, *, repeats: int = 6, show_progress: bool = False) -> None:
        super().__init__(url, key, repeats=repeats, show_progress=show_progress)
        self._http = httpx2.Client(**self.options)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def measure(self, model: str, *, request: "MeasureRequest | None" = None) -> RemoteProfile:
        """Returns the sensitivity profile of a model, measured by the service or found there.

        Args:
            model: Path of the model below a directory of the server's.
            request: What to measure, on which of the server's texts; None for the defaults.

        Raises:
            ServiceError: If the service refuses, or its job fails.
        """
        with self.shown() as progress:
            return self._run(self.measure_steps(model, request, progress))  # type: ignore[no-any-return]

    def plan(
        self, model: str | RemoteProfile, budget: Budget, *, metric: str | None = None, engine: str | None = None
    ) -> RemotePlan:
        """Returns the best plan for a budget, predicted and not verified.

        Args:
            model: A model's path on the server, whose latest profile is taken, or a profile.
            budget: The budget.
            metric: Metric to plan with; None for the best one held.
            engine: Engine whose rules the plan keeps.

        Raises:
            InfeasibleBudget: If nothing keeps the budget.
            ServiceError: If the service refuses.
        """
        return self._run(self.plan_steps(model, budget, metric, engine))  # type: ignore[no-any-return]

    def frontier(self, model: str | RemoteProfile, *, points: int = 33, **axes: Any) -> list[dict[str, float]]:
        """Returns the least loss at ``points`` budgets.

        Args:
            model: A model's path on the server, whose latest profile is taken, or a profile.
            points: Budgets to solve.
            axes: ``metric``, ``resource``, ``engine``, ``context`` and ``batch``, as of ``allocator.frontier``.
        """
        return self._run(self.frontier_steps(model, {"points": points, **axes}))  # type: ignore[no-any-return]

    def evaluate(self, plan: RemotePlan, *, text: str | None = None) -> list[Evaluation]:
        """Returns the measured quality of the reference, the plan, and every uniform format of no more bytes.

        Args:
            plan: The plan.
            text: A text on the server; None for the profile's own.
        """
        with self.shown() as progress:
            return self._run(verbs.evaluate(plan.id, text, progress))  # type: ignore[no-any-return]

    def apply(self, plan: RemotePlan, out: Path) -> Path:
        """Has a model packed by a plan, and writes it to a directory, which is replaced as a whole."""
        with self.shown() as progress:
            return self._run(verbs.apply(plan.id, out, progress))  # type: ignore[no-any-return]

    def export(self, plan: RemotePlan, engine: str, out: Path) -> str:
        """Writes a plan as the files that an engine loads, and returns the command that runs them."""
        with self.shown() as progress:
            return self._run(verbs.export(plan.id, engine, out, progress))  # type: ignore[no-any-return]

    def report(self, plan: RemotePlan, out: Path, **options: Any) -> Path:
        """Writes the report of a plan to a directory, and returns its page's path.

        Args:
            plan: The plan.
            out: The directory.
            options: ``text`` (on the server), ``parquet`` and ``pdf``, as of ``allocator.report``.
        """
        with self.shown() as progress:
            return self._run(verbs.report(plan.id, out, options, progress))  # type: ignore[no-any-return]

    def compare(self, first: RemotePlan, second: RemotePlan, out: Path, *, text: str | None = None) -> Path:
        """Writes the comparison of two plans of one model to a directory, and returns its page's path."""
        with self.shown() as progress:
            steps = verbs.compare((first.id, second.id), out, text, progress)
            return self._run(steps)  # type: ignore[no-any-return]

    def plan_file(self, plan: RemotePlan) -> dict[str, Any]:
        """Returns a plan as the record that ``allocator.load_plan`` reads from a file."""
        return self._run(verbs.plan_file(plan.id))  # type: ignore[no-any-return]

    def _run(self, steps: Steps) -> Any:
        tries = self.persist(steps)
        advance = partial(tries.send, None)
        while True:
            try:
                step = advance()
            except StopIteration as end:
                return end.value
            try:
                advance = partial(tries.send, self._do(step))
            except Exception as error:
                advance = partial(tries.throw, error)

    def _do(self, step: Call | Fetch | Wait) -> Any:
        if isinstance(step, Wait):
            return time.sleep(step.seconds)
        return self._fetch(step) if isinstance(step, Fetch) else self._call(step)

    def _call(self, step: Call) -> tuple[int, Any]:
        answer = self._http.request(step.method, step.path, json=step.body, headers=self.headers(step))
        return answer.status_code, answer.json() if answer.status_code < 300 else answer.content

    def _fetch(self, step: Fetch) -> tuple[int, Any]:
        with self._http.stream("GET", step.path) as answer:
            if answer.status_code >= 300:
                return answer.status_code, answer.read()
            with step.out.open("wb") as stream:
                for part in answer.iter_bytes():
                    stream.write(part)
        return answer.status_code, None


class AsyncClient(ClientSteps):
    """A client that awaits; its verbs are those of ``Client``.

    Args:
        url: Where the service answers.
        key: API key, where it asks for one.
        repeats: Times that a request is sent again before it is given up.
        show_progress: Whether jobs show their progress on stderr.
    """

    def __init__(self, url: str, key: str | None = None, *, repeats: int = 6, show_progress: bool = False) -> None:
        super().__init__(url, key, repeats=repeats, show_progress=show_progress)
        self._http = httpx2.AsyncClient(**self.options)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def measure(self, model: str, *, request: "MeasureRequest | None" = None) -> RemoteProfile:
        """Returns the sensitivity profile of a model, as ``Client.measure`` does."""
        with self.shown() as progress:
            return await self._run(self.measure_steps(model, request, progress))  # type: ignore[no-any-return]

    async def plan(
        self, model: str | RemoteProfile, budget: Budget, *, metric: str | None = None, engine: str | None = None
    ) -> RemotePlan:
        """Returns the best plan for a budget, as ``Client.plan`` does."""
        return await self._run(self.plan_steps(model, budget, metric, engine))  # type: ignore[no-any-return]

    async def frontier(self, model: str | RemoteProfile, *, points: int = 33, **axes: Any) -> list[dict[str, float]]:
        """Returns the least loss at ``points`` budgets, as ``Client.frontier`` does."""
        return await self._run(self.frontier_steps(model, {"points": points, **axes}))  # type: ignore[no-any-return]

    async def evaluate(self, plan: RemotePlan, *, text: str | None = None) -> list[Evaluation]:
        """Returns the measured quality of a plan, as ``Client.evaluate`` does."""
        with self.shown() as progress:
            return await self._run(verbs.evaluate(plan.id, text, progress))  # type: ignore[no-any-return]

    async def apply(self, plan: RemotePlan, out: Path) -> Path:
        """Has a model packed by a plan, and writes it to a directory, which is replaced as a whole."""
        with self.shown() as progress:
            return await self._run(verbs.apply(plan.id, out, progress))  # type: ignore[no-any-return]

    async def export(self, plan: RemotePlan, engine: str, out: Path) -> str:
        """Writes a plan as the files that an engine loads, and returns the command that runs them."""
        with self.shown() as progress:
            return await self._run(verbs.export(plan.id, engine, out, progress))  # type: ignore[no-any-return]

    async def report(self, plan: RemotePlan, out: Path, **options: Any) -> Path:
        """Writes the report of a plan to a directory, as ``Client.report`` does."""
        with self.shown() as progress:
            return await self._run(verbs.report(plan.id, out, options, progress))  # type: ignore[no-any-return]

    async def compare(self, first: RemotePlan, second: RemotePlan, out: Path, *, text: str | None = None) -> Path:
        """Writes the comparison of two plans, as ``Client.compare`` does."""
        with self.shown() as progress:
            steps = verbs.compare((first.id, second.id), out, text, progress)
            return await self._run(steps)  # type: ignore[no-any-return]

    async def plan_file(self, plan: RemotePlan) -> dict[str, Any]:
        """Returns a plan as the record that ``allocator.load_plan`` reads from a file."""
        return await self._run(verbs.plan_file(plan.id))  # type: ignore[no-any-return]

    async def _run(self, steps: Steps) -> Any:
        tries = self.persist(steps)
        advance = partial(tries.send, None)
        while True:
            try:
                step = advance()
            except StopIteration as end:
                return end.value
            try:
                advance = partial(tries.send, await self._do(step))
            except Exception as error:
                advance = partial(tries.throw, error)

    async def _do(self, step: Call | Fetch | Wait) -> Any:
        if isinstance(step, Wait):
            return await asyncio.sleep(step.seconds)
        return await (self._fetch(step) if isinstance(step, Fetch) else self._call(step))

    async def _call(self, step: Call) -> tuple[int, Any]:
        answer = await self._http.request(step.method, step.path, json=step.body, headers=self.headers(step))
        return answer.status_code, answer.json() if answer.status_code < 300 else answer.content

    async def _fetch(self, step: Fetch) -> tuple[int, Any]:
        async with self._http.stream("GET", step.path) as answer:
            if answer.status_code >= 300:
                return answer.status_code, await answer.aread()
            with step.out.open("wb") as stream:
                async for part in answer.aiter_bytes():
                    stream.write(part)
        return answer.status_code, None
