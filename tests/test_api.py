"""The names that code outside relies on, their documentation, and an import without side effects."""

import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import fedkd_jax

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted({"fedkd_jax", *(m.name for m in pkgutil.walk_packages(fedkd_jax.__path__, "fedkd_jax."))})


def public(module):
    """The functions and classes that a module defines under a public name."""
    module = importlib.import_module(module)
    for name, value in vars(module).items():
        if (
            not name.startswith("_")
            and (inspect.isfunction(value) or inspect.isclass(value))
            and value.__module__ == module.__name__
        ):
            yield name, value


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring_with_a_doctest(module):
    """Records' fields are explained where they are declared; functions of two lines in `types` make records."""
    without = [name for name, value in public(module) if ">>>" not in (value.__doc__ or "")]
    assert without == ([] if module != "fedkd_jax.types" else ["record", "static_field"])
    assert importlib.import_module(module).__doc__


def test_every_exported_name_has_a_docstring_with_a_doctest():
    names = [n for n in vars(fedkd_jax) if not n.startswith("_") and not inspect.ismodule(getattr(fedkd_jax, n))]
    assert len(names) > 40
    assert [n for n in names if ">>>" not in (getattr(fedkd_jax, n).__doc__ or "")] == []


FIELDS = {
    "Outputs": "logits hidden attention",
    "Model": "init apply",
    "LossTerms": "teacher_task student_task teacher_distill student_distill hidden teacher_total student_total",
    "LowRank": "u s vt rank",
    "Codec": "encode decode",
    "Algorithm": "init_server init_clients round",
    "RoundInfo": "ids terms uplink_bytes downlink_bytes uplink_floats downlink_floats finite ranks",
}
PARAMETERS = {  # positional, then by keyword only
    "cross_entropy": ("logits labels mask", ""),
    "kl_divergence": ("p_logits q_logits mask", ""),
    "mutual_distillation": (
        "teacher student labels mask projection",
        "adaptive distill hidden attention mutual stop_weight_gradient",
    ),
    "energy_threshold": ("start end rounds", ""),
    "retained_rank": ("singular_values threshold", ""),
    "truncated_svd": ("matrix threshold", "method max_rank"),
    "reconstruct": ("low_rank", ""),
    "svd_codec": ("threshold", "compressible"),
    "identity_codec": ("", ""),
    "payload_floats": ("payload", ""),
    "payload_bytes": ("payload", ""),
    "from_nnx": ("build", ""),
    "simulate": ("algorithm population data key", "rounds cohort"),
    "fedkd": ("teacher student", "teacher_optimizer student_optimizer batch uplink downlink"),
    "fedavg": ("model", "optimizer batch uplink downlink"),
    "local_only": ("model", "optimizer batch"),
    "centralised": ("model", "optimizer batch"),
}
DEFAULTS = {
    "mutual_distillation": dict(
        projection=None,
        adaptive=True,
        distill=True,
        hidden=True,
        attention=True,
        mutual=True,
        stop_weight_gradient=False,
    ),
    "truncated_svd": dict(method="auto", max_rank=None),
}


@pytest.mark.parametrize("name", FIELDS)
def test_records_have_the_fields_that_design_fixes(name):
    cls = getattr(fedkd_jax, name)
    fields = getattr(cls, "_fields", None) or tuple(cls.__dataclass_fields__)
    fixed = tuple(FIELDS[name].split())
    if name == "RoundInfo":
        assert set(fixed) <= set(fields)
    else:
        assert fields[: len(fixed)] == fixed  # others may follow


@pytest.mark.parametrize("name", PARAMETERS)
def test_functions_have_the_parameters_that_design_fixes(name):
    parameters = inspect.signature(getattr(fedkd_jax, name)).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    fixed_positional, fixed_keyword = (words.split() for words in PARAMETERS[name])
    assert positional == fixed_positional
    assert set(fixed_keyword) <= keyword
    for parameter, value in DEFAULTS.get(name, {}).items():
        assert parameters[parameter].default == value


def test_importing_has_no_side_effects():
    """No backend is started (the device count can still be set), no environment variable set, nothing heavy imported."""
    program = """
import os, sys
import flax, jax, optax
before = dict(os.environ)
import fedkd_jax
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
heavy = [m for m in ("tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "dp_accounting") if m in sys.modules]
jax.config.update("jax_num_cpu_devices", 3)
print(len(jax.devices("cpu")), heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "3 []"
