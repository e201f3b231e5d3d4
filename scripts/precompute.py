"""`seqkd precompute` for a job whose working directory is this repository."""

import sys

from seqkd.cli.main import main

sys.exit(main(["precompute", *sys.argv[1:]]))
