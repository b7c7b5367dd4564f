"""`python -m aligncurate`, for launchers such as torchrun that start modules."""

from aligncurate.cli.app import main

main()
