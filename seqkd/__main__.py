"""The command ``seqkd``, as ``python -m seqkd``."""

import sys

from seqkd.cli.main import main

sys.exit(main())
