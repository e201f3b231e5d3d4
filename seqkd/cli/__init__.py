"""The subcommands of ``seqkd``. They import nothing heavy, so that ``--help`` is immediate."""
