"""A network configuration with this plugin in it, derived from the primary plugin's. No I/O.

The primary's text is not written anew: a few places of it are replaced. So numbers, escapes, keys that occur twice and
the order of keys stay as they are, byte for byte.

What libcni would not load is refused here too. Source: containernetworking/cni 1.3, libcni/conf.go; Go's encoding/json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cni_hostport.config import NetworkConfig
from cni_hostport.dynamic_ports.keys import ANNOTATIONS
from cni_hostport.errors import CNIError
from cni_hostport.libcni.conflist import PLUGIN
from cni_hostport.operate.node import json_text
from cni_hostport.operate.node.json_text import folded
from cni_hostport.skel import NAME, NOT_A_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.operate.node.json_text import Value

PORTMAP = "portmap"
# the annotations also where the options allow no dynamic host ports: a pod that asks for one fails, and says why
CAPABILITIES = {"portMappings": True, ANNOTATIONS: True}
MULTUS = frozenset({"multus", "multus-shim"})
# ours is known by this key of the list, which libcni ignores and hands to no plugin; it names the primary's file
MARK = "hostportDerivedFrom"
SWITCHES = ("disableCheck", "disableGC", "loadOnlyInlinedPlugins")
# of portmap's keys, those that mean the same to this plugin
SHARED = ("snat", "masqAll", "conditionsV4", "conditionsV6")
CONDITIONS = ("conditionsV4", "conditionsV6")
NOT_OPTIONS = {"runtimeConfig", "prevResult"}
OPTIONS = sorted(str(field.alias or name) for name, field in NetworkConfig.model_fields.items())
# keys of the object that are not the operator's to choose
RESERVED = {"type", "capabilities", "name", "cniVersion"} | NOT_OPTIONS


@dataclass(frozen=True)
class Configuration:
    """What is in a file of a directory of network configurations, as far as a runtime would load it."""

    file: str
    text: str
    document: dict[str, Any]
    is_list: bool

    @classmethod
    def parse(cls, file: str, data: bytes) -> Configuration:
        """Take the content of a file; its name tells whether it is a list.

        Raises ``ValueError`` with the rest of a sentence that begins with the file's name.
        """
        text, document = json_text.parse(data)
        made = cls(file, text, document, file.endswith(".conflist"))
        for fault in made._faults():
            raise ValueError(fault)
        return made

    def _faults(self) -> Iterator[str]:
        """Yield why libcni would not load it, or would not use it."""
        if self.name is None or self.name == "":
            yield "has no name"
        elif not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            yield f"has the name {self.name!r}, which {NOT_A_NAME}"
        version = self.document.get("cniVersion", "")
        if not isinstance(version, str) and (self.is_list or version is not None):
            yield f"has the cniVersion {version!r}, which is not a string"
        if not self.is_list:
            if not folded(self.document, "type"):
                yield "has no type" + (": a list belongs into a .conflist" if "plugins" in self.document else "")
            yield from _plugin_faults(self.document)
            return
        for key in SWITCHES:
            if str(self.document.get(key, "false")).lower() not in {"true", "false"}:
                yield f"has {key} {self.document[key]!r}, which is neither true nor false"
        plugins = self.document.get("plugins")
        if not isinstance(plugins, list) or not plugins:
            yield "has no plugins"
            return
        for plugin in plugins:
            yield from _plugin_faults(plugin)

    @property
    def name(self) -> Any:
        """The name of the network."""
        return self.document.get("name") if self.is_list else folded(self.document, "name")

    @cached_property
    def types(self) -> list[str]:
        """The types of its plugins, in their order."""
        plugins = self.document["plugins"] if self.is_list else [self.document]
        return [folded(plugin, "type") for plugin in plugins]

    @property
    def has_hostport(self) -> bool:
        """Tell whether this plugin is in it."""
        return PLUGIN in self.types

    @property
    def is_multus(self) -> bool:
        """Tell whether it is multus', which hands pods to a configuration of another file or in itself."""
        return not MULTUS.isdisjoint(self.types)

    @property
    def delegates_to_hostport(self) -> bool:
        """Tell whether multus hands pods to a configuration within this file that has this plugin in it."""
        delegates = self.document.get("delegates")
        documents = [item for item in delegates if isinstance(item, dict)] if isinstance(delegates, list) else []
        plugins = [
            plugin
            for document in documents
            for plugin in (document["plugins"] if isinstance(document.get("plugins"), list) else [document])
        ]
        return any(isinstance(plugin, dict) and folded(plugin, "type") == PLUGIN for plugin in plugins)

    @property
    def cluster_network(self) -> str:
        """The name of the file that multus hands pods to, empty if it names none."""
        return str(self.document.get("clusterNetwork", "")).rpartition("/")[2]

    @property
    def source(self) -> str | None:
        """The name of the file that it is derived from, if this plugin's ``derive`` made it."""
        source = self.document.get(MARK)
        return source if isinstance(source, str) and self.is_list and self.has_hostport else None


def _plugin_faults(plugin: Any) -> Iterator[str]:
    if not isinstance(plugin, dict):
        yield f"has the plugin {plugin!r}, which is not a JSON object"
        return
    kind, capabilities = folded(plugin, "type"), folded(plugin, "capabilities")
    if not isinstance(kind, str) or not kind:
        yield "has a plugin without a type"
    values = list(capabilities.values()) if isinstance(capabilities, dict) else [capabilities]
    if not all(value is None or isinstance(value, bool) for value in values) or isinstance(capabilities, bool):
        yield f"has a plugin {kind} whose capabilities are not true or false"


def parse_options(data: bytes) -> dict[str, Any]:
    """Return the keys that an operator gives this plugin, those that are null left out.

    Raises ``ValueError`` with the rest of a sentence that begins with the file's name.
    """
    text, _ = json_text.parse(data)
    options = {key: value for key, value in json.loads(text).items() if value is not None}
    for key in options:
        if key in RESERVED:
            msg = f"has the key {key!r}, which is not an option"
            raise ValueError(msg)
        if key not in OPTIONS:
            known = ", ".join(option for option in OPTIONS if option not in NOT_OPTIONS)
            msg = f"has the key {key!r}, which this version does not know; it knows {known}"
            raise ValueError(msg)
    try:
        NetworkConfig.parse(options)
    except CNIError as error:
        msg = f"is wrong: {error.msg}"
        raise ValueError(msg) from None
    return options


@dataclass(frozen=True)
class Derived:
    """The content of a file of ours, and lines about what it does not take over."""

    data: bytes
    notes: tuple[str, ...]


def derive(primary: Configuration, options: dict[str, Any]) -> Derived:
    """Return the primary's configuration with this plugin in the place of portmap, or behind all others.

    Raises ``ValueError`` with the rest of a sentence that begins with the file's name, if that cannot be done.
    """
    text = primary.text
    members = dict(json_text.items(text, json_text.after_space(text, 0)))
    plugins = (
        [item for _, item in json_text.items(text, members["plugins"].start)]
        if primary.is_list
        else [json_text.value(text, 0)]
    )
    portmaps = [number for number, plugin in enumerate(plugins) if folded(plugin.value, "type") == PORTMAP]
    ours, notes = _plugin(primary, plugins[portmaps[0]].value if portmaps else {}, options)
    if portmaps[1:]:
        notes.append(f"{primary.file} has portmap {len(portmaps)} times: this plugin stands for all of them")
    if portmaps:
        edits = [(plugins[portmaps[0]].start, plugins[portmaps[0]].end, ours)]
        edits += [(plugins[number - 1].end, plugins[number].end, "") for number in portmaps[1:]]
    else:
        edits = [(plugins[-1].end, plugins[-1].end, f",\n    {ours}")]
    mark = json.dumps(primary.file)
    if not primary.is_list:
        result = _as_list(members, text, mark, _edited(text, edits))
    elif MARK in members:
        result = _edited(text, [*edits, (members[MARK].start, members[MARK].end, mark)])
    else:
        start = json_text.after_space(text, 0) + 1
        space = "" if text[start : start + 1].isspace() else " "
        result = _edited(text, [*edits, (start, start, f"\n  {json.dumps(MARK)}: {mark},{space}")])
    return Derived(result.encode(errors="surrogateescape"), tuple(notes))


def _edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    """Return a text with other text in some places, each from a start to before an end."""
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _as_list(members: dict[str, Value], text: str, mark: str, plugins: str) -> str:
    # libcni 1.3 adds plugins from a directory of the network's name, but only to what is a list
    lines = [f"{json.dumps(MARK)}: {mark}", '"loadOnlyInlinedPlugins": true']
    for key in ("name", "cniVersion"):
        values = [item for name, item in members.items() if name.lower() == key.lower() and item.value is not None]
        lines += [f"{json.dumps(key)}: {text[item.start : item.end]}" for item in values[-1:]]
    return "{\n  " + ",\n  ".join([*lines, f'"plugins": [{plugins.strip()}]']) + "\n}\n"


def _plugin(primary: Configuration, portmap: dict[str, Any], options: dict[str, Any]) -> tuple[str, list[str]]:
    """Return this plugin's object as JSON, and notes about portmap's keys that it does not have."""
    notes = []
    kept: dict[str, Any] = {}
    for key, value in portmap.items():
        if key.lower() in {"type", "capabilities"} or key in options or value is None:
            continue
        if key not in SHARED:
            notes.append(f"{primary.file} gives portmap the key {key!r}, which this plugin does without")
            continue
        try:
            NetworkConfig.parse({key: value})
        except CNIError as error:
            msg = f"gives portmap a value that this plugin cannot use: {error.msg}"
            if key in CONDITIONS:
                # without it, ports would be open to more than the operator wants
                msg += f"; give {key} in the options, [] for none"
            raise ValueError(msg) from None
        kept[key] = value
    document = {"type": PLUGIN, "capabilities": CAPABILITIES, **kept, **options}
    return json.dumps(document), notes
