"""The command line: options in, tables or JSON out.

Exit status 0; 1 for something wrong on the node, or that could not be done; 2 for wrong usage.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cni_hostport import __version__
from cni_hostport.handover import SOCKET
from cni_hostport.kernel.nft import Nft
from cni_hostport.libcni import directory
from cni_hostport.operate import arguments, terminal
from cni_hostport.operate.arguments import CACHES, PATH, Commands
from cni_hostport.operate.node.commands import node
from cni_hostport.operate.statements import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from ipaddress import IPv4Address, IPv6Address
    from typing import NoReturn

    from cni_hostport.operate.statements import Statement

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
GARBAGE_THRESHOLD = 100_000  # objects made since the last look
CONF_DIR = Path("/etc/cni/net.d")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hostport")
def main() -> None:
    """Show, explain, check and repair the host ports of this node.

    A container runtime runs this same executable without a command, as a CNI plugin.
    """
    # nearly all that is read of a large ruleset is kept: to look for garbage there too often takes a sixth of the time
    gc.set_threshold(GARBAGE_THRESHOLD)


def _report(statements: Iterable[Statement], *, as_json: bool) -> None:
    """Print statements as they come, and exit with status 1 if one of them is a problem."""
    printed = []
    for statement in statements:
        printed.append(statement)
        if not as_json:
            terminal.print_statement(statement)
    if as_json:
        _print_json([statement.json() for statement in printed])
    if any(statement.status is Status.PROBLEM for statement in printed):
        sys.exit(1)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, default=str))


@main.command("list")
@click.option("--port", metavar="PORT[/PROTOCOL]", type=arguments.port, help="Only this host port.")
@click.option("--pod", default="", metavar="[NAMESPACE/]NAME", help="Only the host ports of this pod.")
@click.option("--network", default="", metavar="NAME", help="Only the host ports of this network.")
@JSON
def list_command(port: tuple[int, str] | None, pod: str, network: str, *, as_json: bool) -> None:
    """List the host ports of this node.

    All of it is read from the ruleset. DYNAMIC is what the pod asked for where the host port was picked for it.
    CONNECTIONS are the new ones since the mapping was installed. A HOLDER is gone when its network namespace no longer
    exists: the next container that wants the port gets it.
    """
    from cni_hostport.operate import mappings
    from cni_hostport.operate.list import print_table, select

    selected = select(mappings.read(Nft()), port, pod, network)
    if as_json:
        _print_json([mapping.json() for mapping in selected])
    else:
        print_table(selected)


@main.command("port")
@click.argument("pod", metavar="POD")
@click.argument("port", metavar="[PORT[/PROTOCOL]]", type=arguments.port_and_protocol, required=False)
@JSON
def port_command(pod: str, port: tuple[int, str] | None, *, as_json: bool) -> None:
    """Show the host ports that lead to a pod.

    POD is [NAMESPACE/]NAME, or the ID of its container or the beginning of that. PORT is one in the pod, of tcp where
    no PROTOCOL is given; without it, each port in the pod is shown with the host ports that lead there.
    """
    from cni_hostport.operate import mappings
    from cni_hostport.operate import port as pod_port

    found = pod_port.find(mappings.read(Nft()), pod, port)
    if as_json:
        _print_json(pod_port.json(found))
        return
    for line in pod_port.lines(found, with_ports=port is None):
        terminal.print_line(line)


@main.command()
@click.argument("port", metavar="PORT[/PROTOCOL]", type=arguments.port_and_protocol)
@click.option(
    "--from", "source", metavar="ADDRESS", type=arguments.address, help="Of the client; 127.0.0.1 for the node itself."
)
@click.option("--to", metavar="ADDRESS", type=arguments.address, help="Of this node, that the client connects to.")
@CACHES
@JSON
def explain(
    port: tuple[int, str],
    source: IPv4Address | IPv6Address | None,
    to: IPv4Address | IPv6Address | None,
    caches: tuple[Path, ...],
    *,
    as_json: bool,
) -> None:
    """Explain why a connection to a host port reaches a pod or not.

    One packet is made up, as a client's would be, and traced through all hooks of this node; it is dropped before it
    leaves for the pod. Then another, as the pod's answer would be. The mapping counts the first as a connection.
    """
    from cni_hostport.operate.explain import steps

    if source and to and source.version != to.version:
        msg = "--from and --to are of different IP versions"
        raise click.UsageError(msg)
    statements = chain.from_iterable(steps.explain(Nft(), port, source, to, caches))
    _report(statements, as_json=as_json)


@main.command()
@click.option(
    "--conf-dir",
    "conf_dirs",
    type=PATH,
    multiple=True,
    default=[CONF_DIR],
    show_default=True,
    envvar="HOSTPORT_CONF_DIR",
    help="Where runtimes look for network configurations; can be given several times.",
)
@CACHES
@click.option(
    "--remove-portmap-leftovers", is_flag=True, help="First remove portmap's rules of containers that no longer exist."
)
@JSON
def doctor(
    conf_dirs: tuple[Path, ...], caches: tuple[Path, ...], *, remove_portmap_leftovers: bool, as_json: bool
) -> None:
    """Check what host ports need on this node.

    Says of each finding what it means and what to do. A note is worth knowing; a problem keeps host ports from working
    or leaves this node open, and makes the exit status 1.
    """
    from cni_hostport.operate.doctor import checks, leftovers

    removal = leftovers.remove_and_tell(caches) if remove_portmap_leftovers else ()
    _report(chain(removal, checks.examine(conf_dirs, caches)), as_json=as_json)


@main.command("restore")
@CACHES
@click.option("--dry-run", is_flag=True, help="Show the nft commands, and change nothing.")
@click.option(
    "--watch",
    type=click.FloatRange(min=0),
    default=2,
    metavar="SECONDS",
    show_default=True,
    help="Take back for so long what turns out to have been in the middle of its deletion.",
)
@JSON
def restore_command(caches: tuple[Path, ...], *, dry_run: bool, watch: float, as_json: bool) -> None:
    """Bring back host ports that were taken away.

    A firewall reload, 'nft flush ruleset' or a mistake does that. What containers asked for is in the cache that
    runtimes keep of it. Those of many containers are restored by one transaction, while others come and go; those that
    are there stay as they are.
    """
    from cni_hostport.operate import restore
    from cni_hostport.operate.outcome import OutcomeStatus, print_outcomes

    for path in caches:
        if not directory.exists(path):
            terminal.log(f"There is no cache of a runtime in {path}.")
    paths = restore.candidates(caches)
    restored = restore.restore(paths, terminal.log, dry_run=dry_run, watch_seconds=watch)
    outcomes = list(dict(terminal.progress(restored, len(paths), "Restoring")).values())
    if as_json:
        _print_json([asdict(outcome) for outcome in outcomes])
    else:
        print_outcomes(outcomes)
    if any(outcome.status is OutcomeStatus.FAILED for outcome in outcomes):
        sys.exit(1)


@main.command("metrics")
@click.option(
    "--textfile",
    type=arguments.text_file,
    metavar="FILE",
    help="Write to a file, at once, for node exporter's textfile collector, which reads those named *.prom.",
)
@click.option(
    "--listen", type=arguments.listen_address, metavar="[HOST:]PORT",
    help="Answer scrapes until interrupted; without HOST on 127.0.0.1.",
)  # fmt: skip
def metrics_command(textfile: Path | None, listen: tuple[str, int] | None) -> None:
    """Print figures for Prometheus.

    These are the numbers of mappings, of their holders, alive and gone, and of the connections to each mapping.
    """
    from cni_hostport.operate import metrics

    if textfile and listen:
        msg = "--textfile and --listen do not go together"
        raise click.UsageError(msg)
    if listen:
        metrics.serve(*listen, terminal.log)
    elif textfile:
        metrics.write(textfile)
    else:
        click.echo(metrics.text(), nl=False)


@main.command()
@click.argument("socket", default=SOCKET)
@click.pass_obj
def serve(serve_at: Callable[[str], NoReturn], socket: str) -> None:
    """Answer the calls of container runtimes.

    They are faster then. This is what hostport.service runs. SOCKET is where the executable looks for it.
    """
    serve_at(socket)


main.add_command(node)
