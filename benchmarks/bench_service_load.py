"""The service under load: plans on a cached profile of 224 units, asked for by 50 clients. Writes service_load.md.

The profile has the units of a decoder of 32 layers and 7 projections, seven formats, and losses that a random curvature
gives; it is written into the store as a measurement would be. Each client keeps a connection of its own and asks for
the plan of a random budget. A client that waits for nothing between two requests shows the most that the server can do;
a client that asks a few times a second is a person who drags a budget.
"""

import asyncio
import dataclasses
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from machine import describe_machine

sys.path.insert(0, str(Path(__file__).parent.parent))

from allocator.service.database import Database
from allocator.service.records import Records, add_profile
from allocator.service.settings import SETTINGS_VARIABLE, ServiceSettings
from allocator.store import Store
from runtime.candidates import list_candidates
from runtime.formats import DEFAULT_FORMATS
from runtime.units import Unit, Weight
from sensitivity.profile import NATS, LossTable, SensitivityProfile

CLIENTS, REQUESTS = 50, 20_000
LAYERS = 32
SHAPES = {
    "self_attn.q_proj": (1024, 1024),
    "self_attn.k_proj": (256, 1024),
    "self_attn.v_proj": (256, 1024),
    "self_attn.o_proj": (1024, 1024),
    "mlp.gate_proj": (2816, 1024),
    "mlp.up_proj": (2816, 1024),
    "mlp.down_proj": (1024, 2816),
}
PORT = 8473
TRIED = """\
What was tried against the tail, each beside the state before it, on a machine with other work:

| change | measured | before | after |
|---|---|---|---|
| known plans do not wait behind solves (kept) | p50 while 500 budgets become known | 8.5 ms | 4.9 ms |
| solves at a time: four, two with the row above, one with 1 ms | p99 of new budgets | 295 ms | 89, 44 ms (kept) |
| one solve at a time alone, without the others | the same | 295 ms | 316 ms |
| no collection of what was imported (kept) | p99 of known budgets, twice | 402, 336 ms | 22, 28 ms |
| httptools and uvloop for h11 and asyncio (not kept) | the same | 402, 336 ms | 22, 20 ms |
| the two rows above together | the same | 402, 336 ms | 26 ms |
| less made again for each plan (kept) | processor time of a new plan | 7.8 ms | 6.4 ms |
| store in memory instead of on disk (not kept) | p99 of new budgets | 89 ms | 68 ms |

"1 ms" is the time after which a thread hands the interpreter on, 5 ms before.
"""
PROFILE = "f" * 64
COLUMNS = (
    *("load", "requests", "errors", "p50 ms", "p99 ms", "requests/s", "server: CPU", "ms of it a request"),
    *("clients: CPU", "MiB before", "MiB after"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """One row of the table.

    Args:
        name: What it is.
        requests: How many are sent.
        pause_s: Mean pause of a client between an answer and its next request.
        budgets: Different budgets; None for one never asked before in every request.
    """

    name: str
    requests: int
    pause_s: float
    budgets: int | None


LOADS = (
    Load(name="dragging: 5 requests/s each, 500 budgets, none asked before", requests=2_500, pause_s=0.2, budgets=500),
    Load(name="the same budgets", requests=REQUESTS, pause_s=0.2, budgets=500),
    Load(name="dragging: 1 request/s each, every budget new", requests=1_500, pause_s=1.0, budgets=None),
    Load(name="no pause, 500 budgets", requests=REQUESTS, pause_s=0.0, budgets=500),
    Load(name="no pause, every budget new", requests=1_500, pause_s=0.0, budgets=None),
)


def main() -> None:
    other_work = os.getloadavg()[0]
    directory = Path(tempfile.mkdtemp(prefix="bitplan-load-"))
    settings = ServiceSettings(store_root=directory, port=PORT, workers=0, model_roots=(directory,))
    prepare(settings)
    environment = {**os.environ, SETTINGS_VARIABLE: settings.to_json()}
    command = [sys.executable, "-m", "tests.allocator.service.faults"]
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
        try:
            rows = asyncio.run(run_all(psutil.Process(server.pid)))
        finally:
            server.terminate()
            server.wait()
    shutil.rmtree(directory)
    lines = [
        "# Load on the service",
        "",
        "Made by `python benchmarks/bench_service_load.py`. Server and clients share the cores of one machine: "
        f"{describe_machine(('fastapi', 'uvicorn', 'numpy'))}.",
        f"{CLIENTS} clients, one server process, SQLite; `POST /plans` on a cached profile of {7 * LAYERS} units and "
        f"{len(DEFAULT_FORMATS)} formats. Memory is the server's resident set; errors are answers other than 200; "
        "CPU is the part of one core that a process takes. "
        f"Load average of other work before it began: {other_work:.0f}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *rows,
        "",
        TRIED,
    ]
    text = "\n".join(lines)
    (Path(__file__).parent / "service_load.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def prepare(settings: ServiceSettings) -> None:
    """Puts the profile into the store and makes it known."""
    Store(settings.store_root).save_profile(make_profile())
    database = Database(settings.url)
    database.migrate()
    Records(database).add_model("0" * 32, name="decoder", path="/nowhere", facts={"bytes": 1})
    with database.writing() as connection:
        add_profile(connection, PROFILE, "0" * 32)
    database.close()


def make_profile() -> SensitivityProfile:
    """Returns a profile of 224 units: losses fall by 4 a bit, times a factor of each unit and some noise."""
    random_numbers = np.random.default_rng(0)
    units = []
    for layer in range(LAYERS):
        for role, shape in SHAPES.items():
            name = f"model.layers.{layer}.{role}"
            weight = Weight(parameter=f"{name}.weight", expert_index=None, shape=shape, kind="linear")
            short = role.partition(".")[2]
            units.append(
                Unit(name=name, weights=(weight,), role=short, layer_index=layer, expert_index=None, kind="linear")
            )
    candidates = list_candidates(units, DEFAULT_FORMATS)
    bits = np.array([format_.bits for format_ in candidates.formats])
    factor = np.exp(random_numbers.normal(0.0, 1.2, (len(units), 1)))
    noise = np.exp(random_numbers.normal(0.0, 0.1, (len(units), len(bits))))
    loss = np.where(bits < 16, factor * noise * 4.0 ** (3.0 - bits) * 1e-2, 0.0)
    sketch = random_numbers.normal(0.0, 1.0, (96, *loss.shape)).astype(np.float32) * np.sqrt(loss, dtype=np.float32)
    fixed_bytes = 1 << 20
    tokens = np.zeros((2, 2), dtype=np.int64)
    return SensitivityProfile(
        candidates=candidates,
        losses={"fisher": LossTable(loss=loss, std_error=0.1 * loss, unit_of_measure=NATS)},
        fisher_sketch=sketch,
        logit_gram=None,
        prediction_fits={},
        calibration_tokens=tokens,
        selection_tokens=tokens,
        evaluation_tokens=tokens,
        fixed_bytes=fixed_bytes,
        rest_bytes=fixed_bytes // 2,
        reference_bytes=fixed_bytes + 2 * sum(unit.weight_count for unit in units),
        expert_share=1.0,
        routing=None,
        provenance={"profile": PROFILE, "model": "decoder", "model_fingerprint": "0" * 64, "quantizer": "rtn"},
    )


async def run_all(server: psutil.Process) -> list[str]:
    """Returns the table's rows."""
    for _ in range(600):
        try:
            await request(await asyncio.open_connection("127.0.0.1", PORT), 4.0)
            break
        except OSError:
            await asyncio.sleep(0.1)
    return [await run(load, server) for load in LOADS]


async def run(load: Load, server: psutil.Process) -> str:
    """Returns the row of one load."""
    numbers = random.Random(load.name)
    grid = None if load.budgets is None else np.linspace(2.6, 8.0, load.budgets).tolist()

    def next_budget() -> float:
        return numbers.uniform(2.6, 8.0) if grid is None else numbers.choice(grid)

    before_mib = server.memory_info().rss / 2**20
    clients = psutil.Process()
    cpu_s, own_s, started = sum(server.cpu_times()[:2]), sum(clients.cpu_times()[:2]), time.perf_counter()
    each = load.requests // CLIENTS
    found = await asyncio.gather(*(ask(each, load.pause_s, next_budget, numbers) for _ in range(CLIENTS)))
    elapsed_s = time.perf_counter() - started
    used_s, own_s = sum(server.cpu_times()[:2]) - cpu_s, sum(clients.cpu_times()[:2]) - own_s
    times_ms = sorted(1e3 * seconds for seconds, _ in sum(found, []))
    errors = sum(status != 200 for _, status in sum(found, []))
    after_mib = server.memory_info().rss / 2**20
    cells = [
        load.name,
        len(times_ms),
        errors,
        f"{statistics.median(times_ms):.1f}",
        f"{times_ms[int(0.99 * len(times_ms))]:.1f}",
        f"{len(times_ms) / elapsed_s:.0f}",
        f"{used_s / elapsed_s:.2f}",
        f"{1e3 * used_s / len(times_ms):.2f}",
        f"{own_s / elapsed_s:.2f}",
        f"{before_mib:.0f}",
        f"{after_mib:.0f}",
    ]
    sys.stderr.write(f"{cells}\n")
    return "| " + " | ".join(map(str, cells)) + " |"


async def ask(
    count: int, pause_s: float, next_budget: Callable[[], float], numbers: random.Random
) -> list[tuple[float, int]]:
    """Returns seconds and status of the requests of one client."""
    connection = await asyncio.open_connection("127.0.0.1", PORT)
    await asyncio.sleep(numbers.uniform(0.0, pause_s))
    found = []
    for _ in range(count):
        started = time.perf_counter()
        status = await request(connection, next_budget())
        found.append((time.perf_counter() - started, status))
        if pause_s:
            await asyncio.sleep(numbers.uniform(0.0, 2.0 * pause_s))
    connection[1].close()
    return found


async def request(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], bits_per_weight: float) -> int:
    """Returns the status of the answer to one question; written by hand, as a client's library costs more than it."""
    reader, writer = connection
    body = json.dumps({"profile_id": PROFILE, "budget": {"bits_per_weight": bits_per_weight}})
    head = f"POST /plans HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(f"{head}\r\n\r\n{body}".encode())
    answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(answer.partition("content-length: ")[2].partition("\r\n")[0])
    await reader.readexactly(length)
    return int(answer.split(" ", 2)[1])


if __name__ == "__main__":
    main()
