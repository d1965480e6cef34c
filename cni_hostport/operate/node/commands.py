"""The commands below ``hostport node``: what an image of this plugin does on the node that runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cni_hostport.text import escaped

PATH = click.Path(path_type=Path)
# where kubeadm, RKE2 and kind have it; the names of others are in conf/kubernetes
BIN_DIR = click.option(
    "--bin-dir", type=PATH, default=Path("/opt/cni/bin"), show_default=True, help="Where runtimes look for CNI plugins."
)
LIB_DIR = click.option(
    "--lib-dir",
    type=PATH,
    default=Path("/opt/hostport"),
    show_default=True,
    help="Where installations go, one a version.",
)
CONF_DIR = click.option(
    "--conf-dir", type=PATH, default=Path("/etc/cni/net.d"), show_default=True,
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
@CONF_DIR
@OPTIONS
@click.option("--remove", is_flag=True, help="Remove this plugin's network configuration, and nobody else's.")
def configure(conf_dir: Path, options: Path | None, *, remove: bool) -> None:
    """Put this plugin into the network configuration that runtimes take, once.

    The primary plugin's file stays as it is: a file of our own sorts before it, with the same network and this plugin
    in the place of portmap, or behind all others.
    """
    from cni_hostport.operate.node import configuration_directory, configuration_keeper

    def log(line: str) -> None:
        click.echo(escaped(line), err=True)

    if remove:
        try:
            configuration_directory.remove(conf_dir, log)
        except OSError as error:
            log(f"{error.filename or conf_dir}: {error.strerror}")
            sys.exit(1)
        return
    with configuration_keeper.Keeper(conf_dir, options, log) as keeper:
        while (state := keeper.update()).is_passing:
            keeper.wait(state.again)
    sys.exit(not state.is_ready)
