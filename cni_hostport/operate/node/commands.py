"""The commands below ``hostport node``: what an image of this plugin does on the node that runs it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cni_hostport.operate import arguments, terminal
from cni_hostport.operate.arguments import CACHES, PATH

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

# where kubeadm, RKE2 and kind have it; the names of others are in conf/kubernetes
BIN_DIR = click.option(
    "--bin-dir", type=PATH, default=Path("/opt/cni/bin"), show_default=True, envvar="HOSTPORT_BIN_DIR",
    help="Where runtimes look for CNI plugins.",
)  # fmt: skip
LIB_DIR = click.option(
    "--lib-dir", type=PATH, default=Path("/opt/hostport"), show_default=True, envvar="HOSTPORT_LIB_DIR",
    help="Where installations go, one a version.",
)  # fmt: skip
CONF_DIR = click.option(
    "--conf-dir", type=PATH, default=Path("/etc/cni/net.d"), show_default=True, envvar="HOSTPORT_CONF_DIR",
    help="Where runtimes look for network configurations.",
)  # fmt: skip
ROOT = click.option(
    "--root", type=PATH, default=Path("/"), show_default=True,
    help="Where the node's root directory is mounted; all other directories are below it.",
)  # fmt: skip
OPTIONS = click.option(
    "--options", type=PATH, metavar="FILE",
    help="A JSON object with keys for this plugin's part of the network configuration, such as hostAddresses.",
)  # fmt: skip


@click.group()
def node() -> None:
    """Put this plugin on a node of a cluster, and keep it there."""


@node.command()
@ROOT
@BIN_DIR
@LIB_DIR
def install(root: Path, bin_dir: Path, lib_dir: Path) -> None:
    """Put the bundle from which this runs onto the node.

    It is there whole or not at all, and takes the place of the version before, which stays while its calls run.
    """
    from cni_hostport.operate.node import bundle, installation

    installation.install(bundle.own(), root, Path("/", bin_dir), Path("/", lib_dir), terminal.log)


@node.command()
@ROOT
@BIN_DIR
@LIB_DIR
@CONF_DIR
@CACHES
@click.option("--wait", is_flag=True, help="Remove the network configuration, then wait until no container needs it.")
@click.option("--force", is_flag=True, help="Do not ask whether containers need it: their end then fails.")
def uninstall(
    root: Path, bin_dir: Path, lib_dir: Path, conf_dir: Path, caches: tuple[Path, ...], *, wait: bool, force: bool
) -> None:
    """Take this plugin off the node.

    The network configuration goes first, then the executable and all installations, then the table in nftables. While
    containers need the plugin for their end, nothing is removed, and they are named.
    """
    from cni_hostport.operate.node import uninstallation

    if wait and force:
        msg = "--wait and --force do not go together"
        raise click.UsageError(msg)
    in_root = tuple(Path("/", path) for path in caches)
    uninstallation.uninstall(
        root,
        Path("/", bin_dir),
        Path("/", lib_dir),
        Path("/", conf_dir),
        in_root,
        log=terminal.log,
        force=force,
        wait=wait,
    )


@node.command()
@CONF_DIR
@OPTIONS
@click.option("--remove", is_flag=True, help="Remove this plugin's network configuration, and nobody else's.")
def configure(conf_dir: Path, options: Path | None, *, remove: bool) -> None:
    """Put this plugin into the network configuration that runtimes take, once.

    The primary plugin's file stays as it is: a file of our own sorts before it, with the same network and this plugin
    in the place of portmap, or behind all others.
    """
    from cni_hostport.operate.node import configuration_directory, configuration_keeper

    if remove:
        configuration_directory.remove(conf_dir, terminal.log)
        return
    with configuration_keeper.Keeper(conf_dir, options, terminal.log) as keeper:
        while (state := keeper.update()).is_passing:
            keeper.wait(state.again)
    sys.exit(not state.is_ready)


@node.command()
@BIN_DIR
@LIB_DIR
@CONF_DIR
@OPTIONS
@CACHES
@click.option("--listen", type=arguments.listen_address, metavar="[HOST:]PORT", help="Answer scrapes and probes there.")
@click.option(
    "--in-container", is_flag=True,
    help="Enter the mount namespace of process 1, and go on there as the node's installation. All paths are the node's,"
    " except that of the options.",
)  # fmt: skip
def run(
    *,
    bin_dir: Path,
    lib_dir: Path,
    conf_dir: Path,
    options: Path | None,
    caches: tuple[Path, ...],
    listen: tuple[str, int] | None,
    in_container: bool,
) -> None:
    """Be the agent of this node: what the DaemonSet runs.

    It keeps this plugin's network configuration in step with the primary plugin's, runs the resident process, brings
    host ports back when their table was deleted, and answers scrapes and probes. A call does without it.
    """
    from cni_hostport.operate.node import agent, bundle, mount_namespace

    if in_container:
        given = [argument for argument in sys.argv[1:] if argument != "--in-container"]
        mount_namespace.continue_on_node(lib_dir / bundle.name() / bundle.EXECUTABLE, given, options)
    this = agent.Node(bin_dir, lib_dir, conf_dir, caches, options, listen)
    agent.Agent(this, terminal.log).run()


@node.command()
@click.option(
    "--host-ips", type=arguments.addresses, metavar="ADDRESS[,ADDRESS...]", envvar="HOSTPORT_HOST_IPS", default="",
    help="The node's addresses: pods that ask for none are told the first.",
)  # fmt: skip
@CACHES
def annotate(host_ips: list[IPv4Address | IPv6Address], caches: tuple[Path, ...]) -> None:
    """Write into an annotation of each pod which dynamic host ports it has.

    The annotation is hostport/dynamic-ports-status. This runs in a container of a cluster, in the node's network, with
    an account that may patch pods/status.
    """
    from cni_hostport.operate.node import annotator, api_server

    server = api_server.APIServer.of_this_pod()
    annotator.Annotator(server, host_ips, caches, terminal.log).run()


@node.command()
def pause() -> None:
    """Do nothing until SIGTERM: the container of a pod whose work is done."""
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    signal.sigwait(ends)
