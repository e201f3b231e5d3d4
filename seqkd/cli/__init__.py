"""The subcommands of ``seqkd``. They import no large library, so that ``--help`` is fast."""
