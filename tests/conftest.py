"""Settings that must hold before JAX starts a backend: eight CPU devices, one BLAS thread, no silent rank promotion; and no
network, for what is imported, and for tests.

The suite compiles more than it computes, so XLA optimises little here: the same programs, compiled in a quarter of the time.
"""

import importlib.metadata
import os
import pathlib
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # batched LAPACK oversubscribes otherwise, see FACTS
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jax").startswith("0.10."):  # 0.12 aborts, as it does not know these
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"  # the same bits

import jax
import pytest
from hypothesis import HealthCheck, settings

LOCAL = ("localhost", "127.0.0.1", "::1", None, "")


def refuse_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments[0]
        host = address[0] if isinstance(address, tuple) else None if event == "socket.connect" else address
        if host not in LOCAL:
            raise PermissionError(f"{event} with {host!r}; allowed in tests: this machine")


sys.addaudithook(refuse_network)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile(
    "laws",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
settings.load_profile("laws")


@pytest.fixture
def eight_devices():
    """A test that needs eight devices does not run where an accelerator is the default platform."""
    if len(jax.devices()) < 8:
        pytest.skip(f"needs 8 devices, JAX sees {len(jax.devices())}")


@pytest.fixture
def cpu():
    """A test of what is so on a CPU only does not run where an accelerator is the default platform."""
    if jax.default_backend() != "cpu":
        pytest.skip(f"needs a CPU, JAX has {jax.default_backend()}")


@pytest.fixture(autouse=True)
def few_mappings():
    """Every compiled program keeps memory mappings, of which Linux gives a process 65,530: beyond, XLA aborts in a compilation.

    A worker of the whole suite had 62,658.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 50_000:
        jax.clear_caches()
