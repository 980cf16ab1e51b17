"""The workers of a server: started as processes of their own, started again when one dies."""

import logging
import os
import subprocess
import sys
import threading

from allocator.service.settings import SETTINGS_VARIABLE, ServiceSettings

log = logging.getLogger("bitplan.supervisor")
_LOOK_EVERY_S = 0.5
_STOP_S = 5.0
# Between two starts of a worker that dies at once.
_SLOWEST_S = 30.0


class Supervisor:
    """Keeps workers running.

    Args:
        settings: The service's settings.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self._processes: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Starts the workers."""
        self._processes = [self._start_one() for _ in range(self.settings.workers)]
        self._thread.start()

    def stop(self) -> None:
        """Stops the workers: they give back what they have not finished."""
        self._over.set()
        self._thread.join()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def alive(self) -> int:
        """Workers that run."""
        return sum(process.poll() is None for process in self._processes)

    def _watch(self) -> None:
        wait_s = _LOOK_EVERY_S
        while not self._over.wait(wait_s):
            died = [i for i, process in enumerate(self._processes) if process.poll() is not None]
            for i in died:
                log.warning("worker died", extra={"code": self._processes[i].returncode})
                self._processes[i] = self._start_one()
            wait_s = min(2 * wait_s, _SLOWEST_S) if died else _LOOK_EVERY_S

    def _start_one(self) -> subprocess.Popen[bytes]:
        # In the environment, not among the arguments, which every user of the machine can read.
        environment = {**os.environ, SETTINGS_VARIABLE: self.settings.to_json()}
        command = [sys.executable, "-m", "allocator.service.worker_process"]
        # Its end of the pipe closes when the server dies, however it dies.
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
