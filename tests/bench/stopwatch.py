"""Run a Python executable, and write what its time went into to a file, in seconds: ``stopwatch.py FILE EXECUTABLE``.

An import counts for the package that is imported, without the imports that it leads to; so do calls within calls.
"""

from time import perf_counter

BEGUN = perf_counter()

import _frozen_importlib as importlib  # noqa: E402 - that was the start
import os  # noqa: E402
import sys  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

FIND_AND_LOAD = "_find_and_load"  # what the interpreter calls for each module that it has not loaded
PYDANTIC = "imports: pydantic"
PACKAGES = {
    "cni_hostport": "imports: hostport",
    "pydantic": PYDANTIC,
    "pydantic_core": PYDANTIC,
    "annotated_types": PYDANTIC,
    "typing_extensions": PYDANTIC,
    "typing_inspection": PYDANTIC,
    "nftables": "imports: nftables",
}
LIBRARY = "imports: Python's library"
CLASSES = {  # module and class, of which all methods are timed
    ("cni_hostport.kernel.nft", "Nft"): "libnftables",
    ("cni_hostport.netlink", "Netlink"): "netlink",
}

took = {"start": BEGUN}
within = [0.0]  # what calls within the present one have taken


def timed(item: str, function: "Callable[..., Any]") -> "Callable[..., Any]":
    """Return a function whose time counts for an item."""

    def call(*arguments: object, **keywords: object) -> object:
        begun = perf_counter()
        within.append(0.0)
        try:
            return function(*arguments, **keywords)
        finally:
            whole = perf_counter() - begun
            took[item] = took.get(item, 0.0) + whole - within.pop()
            within[-1] += whole

    return call


def main(file: str, executable: str) -> None:
    """Run the executable with its arguments."""
    load, end, process = getattr(importlib, FIND_AND_LOAD), os._exit, os.getpid()

    def find_and_load(name: str, import_function: object) -> object:
        found = timed(PACKAGES.get(name.partition(".")[0], LIBRARY), load)(name, import_function)
        for (module, class_name), item in CLASSES.items():
            if module == name:
                _time_methods(getattr(found, class_name), item)
        if name == "pydantic.main":
            models = type(found.BaseModel)
            models.__new__ = timed("models: pydantic builds them", models.__new__)
        return found

    def noted_end(status: int) -> None:
        if os.getpid() == process:
            took["end"] = perf_counter()
            took["everything else"] = took["end"] - BEGUN - within[0]
            with open(file, "w") as out:
                out.write("\n".join(f"{seconds} {item}" for item, seconds in took.items()))
        end(status)

    setattr(importlib, FIND_AND_LOAD, find_and_load)
    os._exit = noted_end  # type: ignore[assignment]
    sys.argv = [executable, *sys.argv[3:]]
    with open(executable) as source:
        code = compile(source.read(), executable, "exec")
    exec(code, {"__name__": "__main__"})  # noqa: S102 - as the interpreter does


def _time_methods(found: type, item: str) -> None:
    for name, method in list(vars(found).items()):
        if callable(method) and not isinstance(method, type) and name != "__del__":
            setattr(found, name, timed(item, method))


if __name__ == "__main__":
    main(*sys.argv[1:3])
