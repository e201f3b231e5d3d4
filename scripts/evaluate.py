"""`seqkd evaluate` for a job whose working directory is this repository."""

import sys

from seqkd.cli.main import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
