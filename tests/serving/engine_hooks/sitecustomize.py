"""Makes an engine process do what a test asks for. Python imports it where a test puts this folder on the path.

A request asks by its `seed`; what goes on while the process loads is asked for by files in `$TEST_ORDERS`.
"""

import fcntl
import os
import signal
import sys
from pathlib import Path

KILL_IN_STEP, KILL_WHEN_ADDED, HOLD_IN_STEP, HOLD_LATER, FAULT_IN_STEP, KILL_TOGETHER, KILL_WITH_IT = range(9001, 9008)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(lock: Path) -> None:
    """Until nobody holds the lock."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def obey(orders: Path) -> None:
    deaths = orders / "deaths while loading"
    if deaths.exists() and (left := int(deaths.read_text())):
        deaths.write_text(str(left - 1))
        die()
    wait_for(orders / "loading")

    from vlm_serve.engine.engine import Engine
    from vlm_serve.engine.model_runner import ModelRunner

    really_run, really_add, seeds = ModelRunner.run, Engine.add, {}

    def run(self, batch):
        seeds.update((new.row, new.sampling.seed) for new in batch.new_rows)
        asked = [seeds[row] for row in batch.rows.tolist()]
        with (orders / "steps").open("a") as file:
            print(*asked, file=file)
        if KILL_IN_STEP in asked or {KILL_TOGETHER, KILL_WITH_IT} <= set(asked):
            die()
        if HOLD_IN_STEP in asked:
            wait_for(orders / "step")
        if HOLD_LATER in asked:
            wait_for(orders / "later step")
        if FAULT_IN_STEP in asked:
            raise RuntimeError("a fault on order")
        return really_run(self, batch)

    def add(self, request):
        if request.sampling.seed == KILL_WHEN_ADDED:
            die()
        really_add(self, request)

    ModelRunner.run, Engine.add = run, add


if "vlm_serve.serving.engine_process" in sys.orig_argv and "TEST_ORDERS" in os.environ:
    obey(Path(os.environ["TEST_ORDERS"]))
