"""`seqkd compare` for a job whose working directory is this repository."""

import sys

from seqkd.cli.main import main

sys.exit(main(["compare", *sys.argv[1:]]))
