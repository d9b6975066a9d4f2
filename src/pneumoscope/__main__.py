"""``python -m pneumoscope`` is the command ``pneumoscope``."""

from pneumoscope.cli import main

main()
