"""The process: hands the real environment and standard streams to the protocol's edge."""

import os
import sys

from cni_hostport import skel


def main() -> None:
    """Run one CNI command and exit with its status."""
    sys.exit(skel.run(os.environ, sys.stdin.buffer, sys.stdout, sys.stderr))


if __name__ == "__main__":
    main()
