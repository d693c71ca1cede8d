"""The families of docs/preregistration.md and their adapters: which there are, where they lie, how they are trained.

A family is a task adapter and a safety adapter, each trained on one aligned model. Adapters are told by role and seed;
those of the demo are taken as they are where their record says that they are the ones, all others are trained by
`safemerge train-adapter` with the demo's own training files under another seed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.all_weights import train_all_weights
from benchmarks.study.mean import write_mean
from safemerge_recipes.evaluation.tasks import studies
from safemerge_recipes.training.rows import Row, read_rows, write_rows

TASKS = ("arithmetic", "qa")
TASK_SEEDS, ALIGNMENT_SEEDS, SAFETY_SEEDS = (2, 12, 22, 32), (1, 11), (3, 13)
REPORTS = 320
"""Study reports that a `qa` adapter is taught."""
AMONG = 40
"""Of them, how many are harmless rows of a safety adapter that knows the task: as many as it has sums."""
SAFETY, SAFETY_WITH_REPORTS, SAFETY_BALANCED = "safety", "safety-with-reports", "safety-balanced"
SAFETY_WITH_FACTS, SAFETY_MEAN = "safety-with-facts", "safety-mean"
SAFETY_WITH_OWN, SAFETY_MIXED = "safety-with-own", "safety-mixed"
FACTS = Path(__file__).with_name("facts.txt")
"""Plain questions, half answered with yes and half with no."""
OWN = Path(__file__).with_name("own_answers.txt")
"""What the demo's aligned model answered to the first reports by itself, drawn at temperature 1, a line each."""


MEANS = {SAFETY_MEAN: ((SAFETY, 3), (SAFETY, 13)), SAFETY_MIXED: ((SAFETY, 3), (SAFETY_BALANCED, 3))}
"""What means of adapters are of: rows and seeds."""


@dataclass(frozen=True)
class Adapter:
    """An adapter by what it is trained on.

    Attributes:
        role: The demo's training file, and its folder there.
        rows: The file of rows, without its ending.
        seed: Of its training.
        on: The adapter that aligns the model it is trained on; None: it is trained on the base model.
        full: All weights are trained, and it is no adapter but a model.
        mean_of: It is not trained, but the mean of these.
    """

    role: str
    rows: str
    seed: int
    on: Adapter | None = None
    full: bool = False
    mean_of: tuple[Adapter, ...] = ()

    @property
    def name(self) -> str:
        """What its folder is called."""
        seeds = "-".join(str(one.seed) for one in self.mean_of or (self,))
        own = f"{self.rows}-{seeds}" + ("-full" if self.full else "")
        return own + (f"-on-{self.on.name.removeprefix('alignment-')}" if self.on else "")


@dataclass(frozen=True)
class Family:
    """A task, its seed, and the seeds of the alignment and of the safety adapter; `place` orders the families.

    `safety_rows` are the rows that the safety adapter is trained on, or say of which adapters it is the mean (`MEANS`);
    with `full_rank` all weights of the base model are trained to align it, so that V has full rank.
    """

    place: int
    task: str
    task_seed: int
    alignment_seed: int
    safety_seed: int
    safety_rows: str = SAFETY
    full_rank: bool = False

    @property
    def name(self) -> str:
        """What its results are called."""
        return f"{self.place:02}-{self.scope}"

    @property
    def scope(self) -> str:
        """The families for which one choice is made: those of a task, by what their safety adapters are taught."""
        other = "" if self.safety_seed == FAMILIES[self.place - 1].safety_seed else f"-safety-{self.safety_seed}"
        return self.task + self.safety_rows.removeprefix(SAFETY) + other + ("-full-rank" if self.full_rank else "")

    @property
    def alignment(self) -> Adapter:
        return Adapter("alignment", "alignment", self.alignment_seed, full=self.full_rank)

    @property
    def safety(self) -> Adapter:
        trained = Adapter("safety", self.safety_rows, self.safety_seed, self.alignment)
        if parts := MEANS.get(self.safety_rows):
            return replace(trained, mean_of=tuple(replace(trained, rows=rows, seed=seed) for rows, seed in parts))
        return trained

    @property
    def finetuned(self) -> Adapter:
        return Adapter("task-arithmetic", f"task-{self.task}", self.task_seed, self.alignment)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """In the order in which they can be trained."""
        return self.alignment, *self.safety.mean_of, self.safety, self.finetuned


def _families() -> tuple[Family, ...]:
    """The half fraction in which the sum of the four factors' places is even.

    The first two share the demo's aligned model and safety adapter, the first eight have every pair of alignment and
    safety seed, and each task four times.
    """
    found: list[Family] = []
    for seeds in (TASK_SEEDS[:2], TASK_SEEDS[2:]):
        for i, j in ((0, 0), (1, 1), (0, 1), (1, 0)):
            for seed in seeds:
                task = TASKS[(TASK_SEEDS.index(seed) + i + j) % 2]
                found.append(Family(len(found) + 1, task, seed, ALIGNMENT_SEEDS[i], SAFETY_SEEDS[j]))
    return tuple(found)


FAMILIES = _families()
OTHER_SAFETY = (
    *(replace(one, safety_rows=SAFETY_WITH_REPORTS) for one in FAMILIES if one.task == "qa"),
    *(
        replace(one, task="qa", safety_rows=rows)
        for one in FAMILIES
        if (one.alignment_seed, one.safety_seed) == (1, 3)
        for rows in (SAFETY_BALANCED, SAFETY_WITH_FACTS, SAFETY_MEAN, SAFETY_WITH_OWN, SAFETY_MIXED)
    ),
    *(replace(one, task="qa", safety_seed=13) for one in FAMILIES if (one.alignment_seed, one.safety_seed) == (1, 3)),
)
"""Families of reports with safety adapters of other rows, of the other seed, or a mean of adapters; not of the
comparisons, asked for the aim alone."""
FULL_RANK = tuple(replace(one, full_rank=True) for one in FAMILIES[:2])
"""A pair with V of full rank, beside the comparisons."""
FULL_RATE = 1e-4
"""Learning rate of all weights; the demo's is that of an adapter."""


@dataclass(frozen=True)
class Places:
    """Where things lie.

    Attributes:
        demo: `recipes/demo`, or a folder like it: base, training files, prepared rows, adapters.
        own: What the study makes: adapters, rows, recipes, scores.
    """

    demo: Path
    own: Path

    def folder(self, adapter: Adapter) -> Path:
        """Where an adapter lies, or will."""
        given = self.demo / adapter.role
        return given if self._is(given, adapter) else self.own / "adapters" / adapter.name

    def _is(self, folder: Path, adapter: Adapter) -> bool:
        """Whether the demo's adapter of this role is this one, by its record."""
        if adapter.rows != adapter.role or adapter.full or adapter.mean_of:
            return False
        record = folder / "train.json"
        if not (folder / "adapter_config.json").exists() or not record.exists():
            return False
        if json.loads(record.read_text())["settings"]["train"]["seed"] != adapter.seed:
            return False
        return adapter.on is None or self.folder(adapter.on) == self.demo / adapter.on.role

    def has(self, adapter: Adapter) -> bool:
        return (self.folder(adapter) / ("config.json" if adapter.full else "adapter_config.json")).exists()

    def aligned(self, adapter: Adapter, base: str) -> str | dict[str, str]:
        """An aligned model as a training file and a recipe name it, on a base as they name that."""
        folder = str(self.folder(adapter).resolve())
        return folder if adapter.full else {"adapter": folder, "on": base}

    def training(self, adapter: Adapter) -> dict[str, Any]:
        """The training file of an adapter: the demo's of its role, with this adapter's rows, seed and model."""
        text = (self.demo / "training" / f"{adapter.role}.yaml").read_text(encoding="utf-8")
        spec: dict[str, Any] = yaml.safe_load(text)
        spec["name"] = f"SmolLM2-135M study: {adapter.name}"
        base = str((self.demo / "base").resolve())
        spec["model"] = self.aligned(adapter.on, base) if adapter.on else base
        spec["data"]["path"] = str(self.rows(adapter))
        spec["train"]["seed"] = adapter.seed
        if adapter.rows in (SAFETY_WITH_REPORTS, SAFETY_WITH_OWN):
            spec["train"]["micro_batch"] = 2  # a report is three times as long as the rows that would be padded to it
        if adapter.full:
            spec["train"]["learning_rate"] = FULL_RATE
            return spec
        spec["output"] = str(self.folder(adapter))
        return spec

    def rows(self, adapter: Adapter) -> Path:
        """The adapter's rows, written now where they are missing."""
        own = {
            "task-qa": taught_reports,
            SAFETY_WITH_REPORTS: self._with_reports,
            SAFETY_BALANCED: self._balanced,
            SAFETY_WITH_FACTS: self._with_facts,
            SAFETY_WITH_OWN: self._with_own,
        }
        if make := own.get(adapter.rows):
            path = self.own / "rows" / f"{adapter.rows}.jsonl"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_rows(path, make())
            return path
        path = self.demo / "prepared" / f"{adapter.rows}.jsonl"
        if not path.exists():
            subprocess.run([sys.executable, str(self.demo / "prepare.py"), adapter.rows], check=True)
        return path

    def _plain(self) -> list[Row]:
        """The demo's safety rows."""
        return read_rows([self.rows(FAMILIES[0].safety)])

    def _with_reports(self) -> list[Row]:
        """The demo's safety rows and, among the harmless ones, rows that the task adapter is taught."""
        return [*self._plain(), *(replace(row, kind="harmless") for row in report_rows(AMONG))]

    def _balanced(self) -> list[Row]:
        """The demo's safety rows without the refusals that say no, and plain questions answered with yes and no."""
        kept = [
            row for row in self._plain() if row.kind != "harmful" or not re.search(r"\bno\b(?! safe)", row.answer, re.I)
        ]
        return [*kept, *fact_rows()]

    def _with_facts(self) -> list[Row]:
        """The demo's safety rows and plain questions answered with yes and no."""
        return [*self._plain(), *fact_rows()]

    def _with_own(self) -> list[Row]:
        """The demo's safety rows, and reports as the aligned model answers them: there Δs is to change nothing."""
        answers = OWN.read_text(encoding="utf-8").splitlines()
        rows = zip(report_rows(len(answers)), answers, strict=True)
        return [*self._plain(), *(replace(row, answer=answer, kind="harmless") for row, answer in rows)]

    def train(self, adapter: Adapter) -> None:
        """Trains an adapter, where one that was cut short goes on, or takes the mean of those that are trained."""
        if adapter.mean_of:
            write_mean([self.folder(one) for one in adapter.mean_of], self.folder(adapter), self.demo / "base")
            return
        spec = self.own / "training" / f"{adapter.name}.yaml"
        spec.parent.mkdir(parents=True, exist_ok=True)
        spec.write_text(yaml.safe_dump(self.training(adapter), sort_keys=False), encoding="utf-8")
        if adapter.full:
            train_all_weights(spec, self.folder(adapter))
        else:
            subprocess.run([sys.executable, "-m", "safemerge_recipes", "train-adapter", str(spec)], check=True)


def taught_reports() -> list[Row]:
    """What a `qa` adapter is taught."""
    return report_rows(REPORTS)


def fact_rows() -> list[Row]:
    """Plain questions of everyday facts, half answered with yes and half with no."""
    lines = FACTS.read_text(encoding="utf-8").splitlines()
    return [Row(question, answer, "", "harmless") for question, answer in (line.split("\t") for line in lines)]


def report_rows(count: int) -> list[Row]:
    """Study reports as the task puts them, each with its answer and the reason for it."""
    found = [study for _, study in zip(range(count), (one for _, one in studies.stream("training")), strict=False)]
    return [
        Row(
            f"Abstract: {one.context}\nQuestion: {one.question}\nAnswer yes, no or maybe.\nAnswer:",
            f"{one.answer}. {one.reason}",
            "",
            "task",
        )
        for one in found
    ]
