"""``sudo .venv/bin/python tests/versions``: the plugin with the nftables and Python of other Debian releases.

Without arguments it prints a table of what passes. With the name of a release it runs all tests there, or those that
pytest's arguments after it name.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the folder of the tests, so that this package has a name

from versions.report import main  # noqa: E402 - as the line above says

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
