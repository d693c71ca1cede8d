"""Makes docs/tutorial.ipynb and executes it: the Python surface on the demo family.

    python recipes/demo/family.py   # once: the demo's base model
    python docs/notebook.py

It runs in a scratch folder that holds the demo's recipe, its adapters and its base model; nothing it shows depends
on the machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "recipes" / "demo"
RECIPE = "smollm2_arithmetic.yaml"
CELLS = (
    """# From Python

The functions behind the commands, on the demo family: an aligned SmolLM2-135M that was taught sums and lost its
refusals. What they promise stands in their docstrings; see `docs/tutorial.md` for the same from the command line.""",
    f"""import safemerge_recipes as sm

recipe = sm.load_recipe("{RECIPE}")
plan = sm.plan(recipe)
plan""",
    """A plan is what a run will do, before it does it. The gate measured ρ, the share of each update that lies in the
subspace that alignment changed, and merges where ρ < τ. Every tensor of the output has its line, with a reason:""",
    """for tensor in plan.plan.gated[:5]:
    print(f"{tensor.action:<5}  {tensor.name}: {tensor.reason}")""",
    """What was measured is remembered, so another τ costs no reading. Values are given by their dotted key.""",
    f"""for tau in (0.05, 0.1, 0.2):
    again = sm.plan(sm.load_recipe("{RECIPE}", {{"gate.tau": tau}}))
    print(tau, again.plan.summary())""",
    """`run` carries the plan out. What goes on is told to a listener, in events; here they are only counted.""",
    """from collections import Counter

told = Counter()
result = sm.run(plan, "merged", evaluate=False, on_event=lambda event: told.update([type(event).__name__]))
print(told["TensorDone"], "tensors,", told["FileSealed"], "file")
sorted(path.name for path in result.output.iterdir() if path.name.startswith("safemerge_"))""",
    """The folder says what was done to every tensor. `verify` checks that; with a sample it also computes some of them
again from the sources and compares the bytes.""",
    """checked = sm.verify("merged", sample=10)
print(checked["recomputed"], "tensors computed again")""",
    """What does not fit raises a `SafemergeError` whose kind says which phase it was, with one message for people.""",
    f"""try:
    sm.load_recipe("{RECIPE}", {{"gate.tua": 0.1}})
except sm.RecipeError as error:
    print(error)""",
)
"""Words and code by turns."""


def notebook() -> Any:
    """The notebook, not yet executed."""
    import nbformat

    made = [
        nbformat.v4.new_code_cell(text) if place % 2 else nbformat.v4.new_markdown_cell(text)
        for place, text in enumerate(CELLS)
    ]
    for place, cell in enumerate(made):
        cell["id"] = f"cell-{place}"  # not drawn at random
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel})


@contextlib.contextmanager
def demo(base: Path) -> Iterator[str]:
    """A folder with the demo family, made with that base model, in which the notebook's cells run."""
    with tempfile.TemporaryDirectory() as place:
        for name in ("alignment", "task-arithmetic", "safety"):
            shutil.copytree(DEMO / name, Path(place) / name)
        shutil.copy(DEMO / RECIPE, place)
        (Path(place) / "base").symlink_to(base.resolve(), target_is_directory=True)
        yield place


def execute(base: Path) -> Any:
    """The notebook with its results, made with that base model."""
    from nbclient import NotebookClient

    with demo(base) as place:
        found = notebook()
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}  # of tqdm, where ipywidgets is missing
        client = NotebookClient(found, timeout=120, resources={"metadata": {"path": place}}, record_timing=False)
        client.execute(env=quiet)
    found.metadata.pop("language_info", None)  # the version of Python that happened to be here
    return found


def main() -> None:
    """Writes docs/tutorial.ipynb."""
    import nbformat

    nbformat.write(execute(DEMO / "base"), HERE / "tutorial.ipynb")


if __name__ == "__main__":
    main()
