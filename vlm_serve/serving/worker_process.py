"""What every worker process does: how it starts, is silenced, and is limited in memory and CPU time for one job."""

import contextlib
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from vlm_serve.serving.channel import Channel


def open_channel() -> Channel:
    """This process's end, from its only argument. Signals to the whole group are for the server, which then closes its
    end of the channel; a core dump would be a copy of a patient's data.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return Channel(socket.socket(fileno=int(sys.argv[1])))


def close_output() -> None:
    """From here on, what C libraries print about a job goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.dup2(null, sys.stderr.fileno())
    os.close(null)


@contextlib.contextmanager
def limited(memory_bytes: int, cpu_seconds: int) -> Iterator[None]:
    """The kernel's limits for one job, over what the process has used until now.

    Past the memory, allocations fail; past the CPU time, the process is killed by SIGXCPU.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    _set_soft(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + cpu_seconds)
    _set_soft(resource.RLIMIT_AS, _address_space() + memory_bytes)
    try:
        yield
    finally:
        _set_soft(resource.RLIMIT_AS, resource.RLIM_INFINITY)
        _set_soft(resource.RLIMIT_CPU, resource.RLIM_INFINITY)


def _set_soft(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    soft = value if hard == resource.RLIM_INFINITY else hard if value == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (soft, hard))


def _address_space() -> int:
    """Bytes of address space in use; 0 where the system does not say (the limit is then the whole process's)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
