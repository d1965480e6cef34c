"""``sudo .venv/bin/python tests/bench``: what hostport costs, beside the reference plugin and bare Python."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the folder of the tests, so that this package has a name

from bench.run import main  # noqa: E402 - as the line above says

if __name__ == "__main__":
    sys.exit(main())
