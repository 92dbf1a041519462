"""`python -m colossus.cli`, where the package is not installed."""

from colossus.cli import main

main()
