"""The architecture: who may import whom, imports inside functions included."""

from __future__ import annotations

import ast
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

import pytest
from go_tools import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "cni_hostport"

# a layer a line, the highest first: a module imports of its own layer and of lower ones
LAYERS = (
    ("__main__",),
    ("operate.cli",),
    ("operate.*",),
    ("resident.*",),
    ("plugin",),
    (
        "addition",
        "availability",
        "check",
        "dynamic_ports.allocation",
        "dynamic_ports.picker",
        "deletion",
        "port_wait",
        "garbage_collection",
        "migration.*",
    ),
    ("portmap",),
    ("ownership", "precedence", "failures", "upgrade"),
    ("libcni.*",),
    ("kernel.*", "lookup", "foreign_rules", "nf_answers", "nf_tables", "netlink", "afterwards", "dynamic_ports.*"),
    ("ruleset.*", "attachment", "blake2_fallback", "names", "dynamic_ports.order"),
    ("config", "runtime_keys", "dynamic_ports.ranges", "dynamic_ports.request"),
    ("skel",),
    ("log", "errors", "text", "dynamic_ports.keys"),
    ("handover", "native"),
    ("",),  # the package itself
)
# the launcher runs a call itself where nobody else does
ALLOWED = {("handover", "__main__")}

FILES = {
    ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
ROOMS = {name for name, path in FILES.items() if path.stem == "__init__"}


def layers(module: str) -> list[int]:
    """Return where a module stands: a name of its own comes before a pattern."""
    named = [number for number, names in enumerate(LAYERS) if module in names]
    return named or [n for n, names in enumerate(LAYERS) if any(fnmatchcase(module, name) for name in names)]


def imports(node: ast.AST) -> Iterator[str]:
    """Yield the package's modules that are imported below a node, except for types only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (
                alias.name.partition(".")[2] for alias in child.names if f"{alias.name}.".startswith("cni_hostport.")
            )
        elif isinstance(child, ast.ImportFrom) and f"{child.module}.".startswith(f"{PACKAGE}."):
            base = str(child.module).partition(".")[2]
            for alias in child.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield name if name in FILES else base
        elif isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            yield from (name for branch in child.orelse for name in imports(branch))
        else:
            yield from imports(child)


IMPORTS = {module: set(imports(ast.parse(path.read_bytes()))) for module, path in FILES.items()}


@pytest.mark.parametrize("module", [name for name in FILES if name not in ROOMS - {""}])
def test_every_module_stands_in_one_layer(module: str) -> None:
    assert len(layers(module)) == 1


def test_an_import_leads_to_the_same_layer_or_a_lower_one() -> None:
    wrong = [
        f"{importer} imports {imported}"
        for importer in FILES.keys() - ROOMS
        for imported in IMPORTS[importer] - (ROOMS - {""})
        if layers(imported) < layers(importer) and (importer, imported) not in ALLOWED
    ]
    assert sorted(wrong) == []


def test_there_is_no_circle_of_modules() -> None:
    graph = {name: {other for other in found if (name, other) not in ALLOWED} for name, found in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_nothing(room: str) -> None:
    tree = ast.parse(FILES[room].read_bytes())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
