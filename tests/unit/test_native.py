from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cni_hostport import handover, native

ASKS = """
import sys
from cni_hostport import handover
handover._continue_natives_call()
print(sys.argv)
"""


def definitions(executable: str = "/x/hostport", *socket: str) -> dict[str, str]:
    found = [option.removeprefix("-D").partition("=") for option in native.options(executable, *socket)]
    return {name: value for name, _, value in found}


def test_the_protocol_of_the_native_executable_is_that_of_the_python_one() -> None:
    defined = definitions()
    assert json.loads(defined["IDENTITY"]) == handover.IDENTITY
    assert json.loads(f"[{defined['VARIABLES']}]") == list(handover.VARIABLES)
    assert json.loads(f"[{defined['COMMANDS']}]") == list(handover.COMMANDS)
    assert json.loads(defined["TAKEN"]).encode() == handover.TAKEN
    assert int(defined["UNTIL_TAKEN"]) == 1000 * handover.UNTIL_TAKEN
    assert json.loads(defined["CANNOT_START"]) == handover.CANNOT_START


def test_the_usual_socket_is_that_of_the_python_executable() -> None:
    assert json.loads(definitions()["SOCKET"]) == handover.SOCKET
    assert json.loads(definitions("/x/hostport", "/y/socket")["SOCKET"]) == "/y/socket"


def test_the_identity_of_a_bundle_is_that_of_the_python_below_it() -> None:
    module = "./lib/python/cni_hostport/handover.py"
    found = [option.removeprefix("-D").partition("=") for option in native.bundle_options([], {}, module)]
    defined = {name: value for name, _, value in found}
    assert json.loads(defined["IDENTITY"]) + handover.__file__ == handover.IDENTITY
    assert json.loads(defined["MODULE"]) == module


@pytest.mark.parametrize("path", ["/opt/host port", "/opt/hôte"])
def test_a_path_is_a_literal_of_c(path: str) -> None:
    assert definitions(path)["PYTHON"] == f'"{path}"'


def test_the_python_executable_takes_the_name_of_the_native_one_and_its_arguments() -> None:
    given = [handover.NATIVE, "/opt/cni/bin/hostport", "", "0", "list", "--json"]
    ran = subprocess.run([sys.executable, "-Ic", ASKS, *given], capture_output=True, text=True, check=True)
    assert ran.stdout == "['/opt/cni/bin/hostport', 'list', '--json']\n"
