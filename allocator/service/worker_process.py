"""What a server starts as a worker: ``python -m allocator.service.worker_process``."""

import os

from allocator.service.logs import start_logging
from allocator.service.settings import SETTINGS_VARIABLE, settings_from_json
from allocator.service.worker import run_worker

if __name__ == "__main__":
    start_logging()
    run_worker(settings_from_json(os.environ[SETTINGS_VARIABLE]), watch_stdin=True)
