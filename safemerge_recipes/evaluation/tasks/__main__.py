"""`python -m safemerge_recipes.evaluation.tasks` prints the task folder, for lm-eval's `--include_path`."""

from safemerge_recipes.evaluation.tasks import FOLDER

if __name__ == "__main__":
    print(FOLDER)
