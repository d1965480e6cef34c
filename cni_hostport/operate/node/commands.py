"""The commands below ``hostport node``: what an image of this plugin does on the node that runs it."""

from __future__ import annotations

from pathlib import Path

import click

from cni_hostport.operate.arguments import CACHES

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
@ROOT
@BIN_DIR
@LIB_DIR
def install(root: Path, bin_dir: Path, lib_dir: Path) -> None:
    """Put the bundle from which this runs onto the node.

    It is there whole or not at all, and takes the place of the version before, which stays while its calls run.
    """
    from cni_hostport.operate import terminal
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
    from cni_hostport.operate import terminal
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
