"""`python -m safemerge_recipes` is the program `safemerge`."""

from safemerge_recipes.cli.app import main

main()
