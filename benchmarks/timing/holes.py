"""The program over checkpoints that are nothing but headers and holes, which it refuses otherwise.

python -m benchmarks.timing.holes run recipe.yaml --dry-run
"""

import sys

from benchmarks.timing.stored import allow_holes
from safemerge_recipes.cli.app import main

allow_holes()
sys.exit(main())
