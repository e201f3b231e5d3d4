"""`seqkd train` for a job whose working directory is this repository."""

import sys

from seqkd.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
