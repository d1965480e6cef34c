"""The commands below ``hostport node``: what an image of this plugin does on the node that runs it."""

from __future__ import annotations

from pathlib import Path

import click

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
