"""`python -m safemerge_recipes.evaluation.tasks` prints the task folder, for lm-eval's `--include_path`."""

import sys

from safemerge_recipes.evaluation.tasks import FOLDER

if __name__ == "__main__":
    sys.stdout.write(f"{FOLDER}\n")
