"""`python -m tok2img`."""

from .cli import main

main()
