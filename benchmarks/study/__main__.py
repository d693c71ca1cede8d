"""The pre-registered study behind docs/evidence.md (docs/preregistration.md), in parts that can be cut short.

    python -m benchmarks.study train choose carry score draws report --families 2 --limit 90 --shipped --tokens 32

`train` makes the adapters that are missing, `choose` takes τ, α and λ on the tuning split of each task's first family,
`carry` checks that the safety adapter has something to give, `score` asks every model on the test split, `draws` holds
the gate against random choices, `report` writes the pages; `aim` asks apart from them whether a merge chosen for the
task, or with `aim-own` for the family, brings 90 % of the lost J back (benchmarks/study/aim.py), and `aim-tuning`
and `aim-own-tuning` make that choice without a look at the test split. Without a part all are run. A call that was
stopped, or reached `--minutes`, goes on where it stopped; several may run beside each other on different families
(`--only`).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.study.aim import AimStudy
from benchmarks.study.families import FAMILIES, FULL_RANK, OTHER_SAFETY, Family, Places
from benchmarks.study.models import Choice
from benchmarks.study.outcomes import outcomes_beside
from benchmarks.study.page import write_pages
from benchmarks.study.scoring import Settings, Study
from safemerge_recipes.errors import PlanError, SafemergeError
from safemerge_recipes.storage.cache import cache_folder

HERE = Path(__file__).resolve().parents[2]
DOCS = HERE / "docs"
RESULTS = DOCS / "evidence" / "outcomes"
AIMS = DOCS / "evidence" / "aim"
PARTS = ("train", "choose", "carry", "score", "draws", "aim-tuning", "aim", "aim-own-tuning", "aim-own", "report")


def asked_families(count: int | None, only: list[str]) -> tuple[Family, ...]:
    """The first so many families, or the named ones of them and of those that are asked beside the comparisons.

    Raises:
        PlanError: there is none of a name.
    """
    if not only:
        return FAMILIES[:count]
    named = {family.name: family for family in (*FAMILIES[:count], *OTHER_SAFETY, *FULL_RANK)}
    for name in only:
        if name not in named:
            raise PlanError(f"{name}: no such family; expected one of {', '.join(named)}")
    return tuple(family for family in named.values() if family.name in only)


def given_choice(text: str | None) -> Choice | None:
    """`0.1,0.5,1.5` as τ, α and λ.

    Raises:
        PlanError: it is something else.
    """
    if text is None:
        return None
    try:
        tau, alpha, lambda_ = map(float, text.split(","))
    except ValueError:
        raise PlanError(f"--choice {text}: expected τ,α,λ such as 0.1,0.5,1.5") from None
    return Choice(tau, alpha, lambda_, "given beforehand")


def train(families: tuple[Family, ...], places: Places, deadline: float, console: Console) -> bool:
    """Trains the adapters that are missing."""
    wanted = dict.fromkeys(adapter for family in families for adapter in family.adapters)
    missing = [adapter for adapter in wanted if not places.has(adapter)]
    for place, adapter in enumerate(missing, 1):
        if time.monotonic() > deadline:
            return False
        console.print(f"{adapter.name}: adapter {place} of {len(missing)} to be trained", markup=False)
        places.train(adapter)
    return True


def run(given: argparse.Namespace, results: Path = RESULTS, docs: Path = DOCS, aims: Path = AIMS) -> bool:
    """Carries out parts; returns whether they are complete."""
    console, deadline = Console(stderr=True), time.monotonic() + 60 * given.minutes
    places = Places(given.demo.resolve(), given.work or cache_folder() / "study")
    families = asked_families(given.families, given.only)
    settings = Settings(given.limit, given.tokens, not given.shipped, given.draws, given_choice(given.choice), deadline)
    parts = given.parts or list(PARTS)
    done = train(families, places, deadline, console) if "train" in parts else True
    scored = [part for part in PARTS if part in parts and part not in ("train", "report")]
    for family in families if scored else ():
        missing = [adapter.name for adapter in family.adapters if not places.has(adapter)]
        if missing:
            console.print(f"{family.name}: {', '.join(missing)} not trained yet: PART=train", markup=False)
            done = False
            continue
        study = Study(family, places, settings, results if family in FAMILIES else outcomes_beside(results), console)
        for part in scored:
            console.print(f"{family.name}: {part}", markup=False)
            asked = AimStudy(family, places, settings, aims, console) if part.startswith("aim") else study
            if not getattr(asked, part.replace("-", "_"))():
                done = False
                break
    if "report" in parts:
        write_pages(results, docs, aims)
    return done


def main() -> None:
    """Carry out parts of the study."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--families", type=int, help="only the first so many of 16")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        metavar="FAMILY",
        help="such as 02-qa; or 02-qa-balanced, beside the comparisons",
    )
    parser.add_argument("--limit", type=int, help="only the first so many prompts of each task")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--shipped", action="store_true", help="no prompts of HarmBench and StrongREJECT")
    parser.add_argument("--draws", type=int, default=20, help="random choices of tensors a family")
    parser.add_argument("--choice", help="τ,α,λ instead of the choice on the tuning split")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing new after so many")
    parser.add_argument("--demo", type=Path, default=HERE / "recipes" / "demo", help="base, rows, training, adapters")
    parser.add_argument("--work", type=Path, help="where the study keeps what it makes; default: in the user's cache")
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such part; expected some of {', '.join(PARTS)}")
    try:
        done = run(given)
    except SafemergeError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; what is scored is kept, the same command goes on") from None
    print("complete" if done else "not complete; the same command goes on", file=sys.stderr)


if __name__ == "__main__":
    main()
