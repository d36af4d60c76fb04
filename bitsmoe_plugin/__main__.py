"""``python -m bitsmoe_plugin``."""

import sys

from bitsmoe_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
