"""The command line: options in, tables or JSON out.

Exit status 0; 1 for something wrong on the node, or that could not be done; 2 for wrong usage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cni_hostport import __version__
from cni_hostport.errors import CNIError, NFTError
from cni_hostport.operate.cache import DEFAULT_DIR

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
PATH = click.Path(path_type=Path)
CACHES = click.option(
    "--cache-dir", "caches", type=PATH, multiple=True, default=[DEFAULT_DIR], show_default=True,
    help="Where runtimes keep what they asked for (libcni's cache); can be given several times.",
)  # fmt: skip


class _Commands(click.Group):
    """Commands whose errors are sentences."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (CNIError, NFTError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hostport")
def main() -> None:
    """Show, explain, check and repair the host ports of this node.

    A container runtime runs this same executable without a command, as a CNI plugin.
    """


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, default=str))
