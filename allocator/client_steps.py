"""What both clients of a service share: the steps of each verb, and how often and when a request is sent again.

A request that gets no answer, or one that says to come back later, is sent again after a pause that doubles each time,
times a random factor so that many clients do not come back at once. Nothing here sends: a step is given to who does.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx2

from allocator import client_verbs as verbs
from allocator.budget import Budget
from allocator.client_requests import Call, Fetch, ServiceError, Steps, Wait
from allocator.client_verbs import RemoteProfile
from allocator.progress import Progress, shown_progress, silent

if TYPE_CHECKING:
    from allocator.measuring import MeasureRequest

_COME_BACK = (409, 425, 429, 502, 503, 504)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_TIMEOUT_S = 60.0


class ClientSteps:
    """The steps of each verb; how they are run is the subclass's.

    Args:
        url: Where the service answers.
        key: API key, where it asks for one.
        repeats: Times that a request is sent again before it is given up.
        show_progress: Whether jobs show their progress on stderr.
    """

    def __init__(self, url: str, key: str | None, *, repeats: int, show_progress: bool) -> None:
        self.url = url
        self.repeats = repeats
        self.show_progress = show_progress
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.options: dict[str, Any] = {"base_url": url, "headers": headers, "timeout": _TIMEOUT_S}
        self._jitter = random.Random()

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """Gives what a verb reports its progress to."""
        if not self.show_progress:
            yield silent
            return
        with shown_progress() as progress:
            yield progress

    def measure_steps(self, model: str, request: "MeasureRequest | None", progress: Progress) -> Steps:
        """Returns the steps of ``measure``."""
        options: Mapping[str, Any] = {} if request is None else verbs.options_of(request)
        return verbs.measure(model, options, progress)

    def plan_steps(self, model: str | RemoteProfile, budget: Budget, metric: str | None, engine: str | None) -> Steps:
        """Returns the steps of ``plan``."""
        held = model if isinstance(model, RemoteProfile) else (yield from verbs.latest_profile(model))
        return (yield from verbs.plan(held.id, budget, metric, engine))

    def frontier_steps(self, model: str | RemoteProfile, axes: Mapping[str, Any]) -> Steps:
        """Returns the steps of ``frontier``."""
        held = model if isinstance(model, RemoteProfile) else (yield from verbs.latest_profile(model))
        return (yield from verbs.frontier(held.id, axes))

    def persist(self, steps: Steps) -> Steps:
        """Gives the steps of a verb as single tries, each of which may be sent again after a wait."""
        outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return end.value
            try:
                outcome = (yield step) if isinstance(step, Wait) else (yield from self._try(step))
            except Exception as error:
                # The verb's own cleaning up is done before the caller hears of it.
                steps.throw(error)
                raise

    def _try(self, step: Call | Fetch) -> Steps:
        for attempt in range(self.repeats + 1):
            last = attempt == self.repeats
            try:
                status, content = yield step
            except httpx2.TransportError as error:
                if last:
                    raise self._unanswered(error) from error
            else:
                if status < 300:
                    return content
                if last or status not in _COME_BACK:
                    verbs.raise_problem(status, content)
            yield Wait(seconds=self._pause_s(attempt))
        return None

    def _pause_s(self, attempt: int) -> float:
        longest = min(_FIRST_PAUSE_S * 2.0**attempt, _LONGEST_PAUSE_S)
        return longest * self._jitter.uniform(0.5, 1.0)

    def headers(self, step: Call) -> dict[str, str]:
        """Returns the headers of a request."""
        return {"Idempotency-Key": step.key} if step.method == "POST" else {}

    def _unanswered(self, error: Exception) -> ServiceError:
        msg = f"the service must answer: got none from '{self.url}' ({error}). Is it running, and this its address?"
        return ServiceError(msg, status=503, problem={})
