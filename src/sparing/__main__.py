"""`python -m sparing` is `sparing`."""

from sparing.cli import main

main()
