"""What the service counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "path", "status")
        self._requests = Counter("bitplan_requests", "Requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "bitplan_request_seconds",
            "Time to an answer.",
            ("method", "path"),
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._jobs = Gauge("bitplan_jobs", "Jobs by state.", ("state",), registry=self.registry)
        self._workers = Gauge("bitplan_workers", "Worker processes of this server that run.", registry=self.registry)

    def note_request(self, method: str, path: str, status: int, seconds: float) -> None:
        """Counts a request by the pattern of its path, so that the number of series stays small."""
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(method, path).observe(seconds)

    def render(self, jobs_by_state: dict[str, int], workers: int) -> bytes:
        """Returns everything in Prometheus' text format."""
        for state, count in jobs_by_state.items():
            self._jobs.labels(state).set(count)
        self._workers.set(workers)
        return generate_latest(self.registry)
