"""What the hardware wants set before JAX starts; the programs call it, the library never does.

On a CPU: one host device per core (clients are split over them), one OpenBLAS thread (several devices call LAPACK at once),
an allocator that keeps large freed buffers (a fresh one costs page faults, several times the arithmetic on it), and devices
that wait for each other as long as it takes. What the user has set in the environment stays. The number of malloc's arenas is
left alone: with MALLOC_ARENA_MAX=1 two devices wait for each other at every small matrix product, and a round of a small
model takes twice as long.
"""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import re
import resource
import sys
from collections.abc import Mapping

ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**35),
    "MALLOC_TOP_PAD_": str(2**26),  # what threads' own heaps keep, which no threshold holds for: glibc's HEAP_MAX_SIZE
}


# XLA complains when a CPU device has waited 10 s for the others at a sum, and ends the process after 40 s: where one device has
# a client of a large model more than the other, that is no failure
PATIENCE = tuple(f"--xla_cpu_collective_call_{what}_timeout_seconds" for what in ("warn_stuck", "terminate"))


def missing_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What `prepare_environment` adds to an environment.

    >>> missing_variables({"XLA_FLAGS": f"--xla_a=1 {PATIENCE[0]}=9", "OPENBLAS_NUM_THREADS": "2"})["XLA_FLAGS"].split()[1:]
    ['--xla_cpu_collective_call_warn_stuck_timeout_seconds=9', '--xla_cpu_collective_call_terminate_timeout_seconds=86400']
    >>> missing_variables(missing_variables({}))
    {}
    """
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in environment}
    flags = environment.get("XLA_FLAGS", "")
    more = [f"{flag}=86400" for flag in PATIENCE if flag not in flags]
    return missing | ({"XLA_FLAGS": " ".join([flags, *more]).strip()} if more else {})


def prepare_environment() -> None:
    """Starts this program anew with the variables of `ENVIRONMENT` that are not set; call it before importing JAX."""
    missing = missing_variables(os.environ)
    if missing:
        # the C library reads its variables when the process starts
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


def available_cores() -> int:
    """Cores this process may use.

    >>> available_cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """What all devices of this process together have for arrays: their own memory, or on a CPU that of the machine.

    >>> memory_bytes() > 10**9
    True
    """
    import jax

    own = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in stats for stats in own):
        return sum(stats["bytes_limit"] for stats in own)
    return host_memory_bytes()


def host_memory_bytes() -> int:
    """The machine's memory.

    >>> host_memory_bytes() > 10**9
    True
    """
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes() -> int:
    """The most memory of the machine that this process has held so far.

    >>> peak_memory_bytes() > 10**7
    True
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # of this program alone: getrusage also counts what the process held before it became it
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def start_processes(processes: str | None) -> None:
    """Makes this one of several processes that run a program together: "auto" where SLURM, MPI, Kubernetes or a TPU pod tells
    which, or "HOST:PORT,COUNT,INDEX". Before JAX is used.

    Raises:
        ValueError: something else.

    >>> start_processes(None)
    >>> try: start_processes("node0")
    ... except ValueError as error: print(error)
    processes is 'node0'; allowed: 'auto' or 'HOST:PORT,COUNT,INDEX'
    """
    import jax

    if processes is None:
        return
    if processes == "auto":
        jax.distributed.initialize()
        return
    parts = processes.split(",")
    if len(parts) != 3 or ":" not in parts[0] or not (parts[1].isdecimal() and parts[2].isdecimal()):
        raise ValueError(f"processes is {processes!r}; allowed: 'auto' or 'HOST:PORT,COUNT,INDEX'")
    jax.distributed.initialize(parts[0], num_processes=int(parts[1]), process_id=int(parts[2]))


def agreed(value: int | None) -> int | None:
    """The first process's value, where several choose by what each has.

    >>> agreed(3), agreed(None)
    (3, None)
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    first = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if value is None else value)))
    return None if first < 0 else first


def make_devices(devices: int | None) -> None:
    """On a CPU, as many host devices as asked for, or one per core; it works only before JAX has made an array.

    Raises:
        ValueError: fewer than one.

    >>> make_devices(1)
    """
    import jax

    if devices is not None and devices < 1:
        raise ValueError(f"devices is {devices}; allowed: at least 1")
    wanted = devices or available_cores()
    if jax.config.values["jax_num_cpu_devices"] < wanted:  # -1 where nobody has set it
        with contextlib.suppress(RuntimeError):  # JAX runs already, in a test or a notebook: what is there is used
            jax.config.update("jax_num_cpu_devices", wanted)


def choose_devices(devices: int | None, cohort: int) -> int:
    """How many devices the client axis is split over: `devices` if given, else all there are but no more than clients.

    Raises:
        ValueError: more devices than JAX can give, or fewer than one.

    >>> choose_devices(1, cohort=20)
    1
    """
    import jax

    make_devices(devices)
    there = len(jax.devices())
    if jax.process_count() > 1:
        if cohort % there:
            raise ValueError(f"cohort is {cohort} on {there} devices of several processes; allowed: a multiple")
        return there
    if devices is not None and devices > there:
        raise ValueError(f"devices is {devices}; allowed: 1 to {there} on this {jax.default_backend()}")
    return devices or min(there, cohort)


def unsettled(backend: str, flags: str) -> bool:
    """Whether a program may have other last digits when it is compiled again, and runs again: on a GPU XLA tries out which
    kernels are the fastest whenever it compiles, and numbers that go to one place, as in a sketch, are added in any order.

    >>> [unsettled("gpu", flags) for flags in ("", "--xla_gpu_autotune_level=0", "--xla_gpu_deterministic_ops=true")]
    [True, True, False]
    >>> unsettled("cpu", "")
    False
    """
    return backend == "gpu" and "--xla_gpu_deterministic_ops=true" not in flags.split()


def versions() -> dict[str, str]:
    """Of what decides the last digits of a result.

    >>> sorted(versions())
    ['devices', 'fedkd_jax', 'jax', 'jaxlib', 'python']
    """
    import jax

    packages = {name: importlib.metadata.version(name) for name in ("fedkd_jax", "jax", "jaxlib")}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return packages | {"python": platform.python_version(), "devices": devices}


def describe(layout, cohort: int) -> str:
    """One line: what was chosen and how to change it.

    >>> from fedkd_jax import Layout
    >>> describe(Layout(chunk=1), 20).split(":")[0]
    'cpu'
    """
    import jax

    backend = jax.default_backend()
    if layout.chunk is None:
        each = "one client at a time (several where models are tiny)" if backend == "cpu" else "all clients at once"
    else:
        _, chunk = layout.groups(cohort)
        each = "one client at a time" if chunk == 1 else f"{chunk} clients at a time under vmap"
    what = f"{backend}: {layout.devices} device(s) (--devices), {each} on each (--chunk)"
    return f"{what}; " + ", ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ)
