"""`python -m tok2img`."""

from .cli.app import main

main()
