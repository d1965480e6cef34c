"""The process: hands the real environment and standard streams to the protocol's edge."""

import os
import sys

from cni_hostport import skel


class _Stdin:
    """File descriptor 0, opened only when it is read: VERSION does not need it, and it can be closed."""

    def read(self) -> bytes:
        with open(0, "rb", closefd=False) as stream:
            return stream.read()


def main() -> None:
    """Run one CNI command and exit with its status."""
    status = skel.run(os.environ, _Stdin(), sys.stdout, sys.stderr)
    sys.stderr.flush()
    os._exit(status)  # everything is said: taking modules down in order would only cost time


if __name__ == "__main__":
    main()
