"""`seqkd report` for a job whose working directory is this repository."""

import sys

from seqkd.cli.main import main

sys.exit(main(["report", *sys.argv[1:]]))
