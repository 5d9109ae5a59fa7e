"""Laws of what the project needs: a lower bound for each, a licence that README names, and no network."""

import pathlib
import re
import socket
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = PROJECT["dependencies"] + [x for extra in PROJECT["optional-dependencies"].values() for x in extra]


@pytest.mark.parametrize("needed", NEEDED)
def test_a_dependency_has_a_lower_bound_and_a_licence_in_readme(needed):
    name = re.fullmatch(r"([\w-]+)(\[\w+\])?>=[\d.]+", needed)
    assert name, f"{needed}: `.ci/versions oldest` takes >= for =="
    licences = (ROOT / "README.md").read_text().split("## Licence")[1]
    assert re.search(rf"\b{name[1]}\b", licences), name[1]


def test_nothing_here_can_ask_the_network():
    """Which was so before anything of the package was imported, see `conftest.py`."""
    with pytest.raises(PermissionError, match="allowed in tests: this machine"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(PermissionError, match="pypi"):
        socket.getaddrinfo("pypi.org", 443)
