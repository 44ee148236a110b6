"""The ``lab`` command: one module per sub-command, each imported only when it is called."""
