"""``python3 conf/bundle --packages DIR OUTPUT``: build a bundle, which needs nothing but a Linux kernel to run.

It has Python, the packages, libnftables and every library that these need, the dynamic loader included, all of this
machine. ``install.sh --bundle`` calls it, with what it needs installed. The same files give the same bundle, byte for
byte.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parents[2]
sys.path.append(str(SOURCE))

from archive import ARCHITECTURE, pack  # noqa: E402 - as the line above says
from tree import add_own, add_system  # noqa: E402

from cni_hostport import __version__  # noqa: E402


def main() -> None:
    """Write the archive ``hostport-VERSION-linux-ARCH.tar.gz`` into a directory, and print its path."""
    parser = argparse.ArgumentParser(prog="conf/bundle", description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, metavar="DIR", help="where pip has installed them")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the directory to write the archive into")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        bundle = Path(work, f"hostport-{__version__}")
        add_system(options.packages, bundle)
        add_own(SOURCE, bundle)
        archive = options.output / f"{bundle.name}-linux-{ARCHITECTURE}.tar.gz"
        pack(bundle, archive)
    sys.stdout.write(f"{archive}\n")


if __name__ == "__main__":
    main()
