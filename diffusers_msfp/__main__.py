"""`python -m diffusers_msfp`."""

from .cli.app import main

main()
