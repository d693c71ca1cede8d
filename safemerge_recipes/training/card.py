"""The card of a trained adapter: data and licence, counts, settings, scores. Plain data in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TITLES = {"safety": "Safety adapter", "safeinstruct": "SafeInstruct adapter"}


def card(record: Mapping[str, Any]) -> str:
    """The README of an adapter's folder.

    Args:
        record: The content of `train.json`.
    """
    settings, lora = record["settings"], record["settings"]["lora"]
    train = settings["train"]
    title = settings.get("name") or _TITLES[settings["method"]]
    return "\n".join(
        [
            "---",
            f"license: {_identifier(record['data']['licence'])}",
            "library_name: peft",
            f"base_model: {record['base']}",
            "tags: [lora, safemerge]",
            "---",
            "",
            f"# {title}",
            "",
            f"A LoRA on `{record['base']}`, trained by `safemerge train-adapter`. `train.json` holds every setting, "
            "version and loss.",
            "",
            "## Data",
            "",
            *_data(record),
            "",
            "## Training",
            "",
            f"r = {lora['r']}, alpha = {lora['alpha']:g}, dropout {lora['dropout']:g}, on {', '.join(lora['targets'])} "
            f"({record['matrices']} matrices, {record['parameters']:,} parameters); preset `{settings['preset']}`. "
            f"AdamW without decay, rate {train['learning_rate']:g} ({train['schedule']}, {train['warmup_steps']} steps "
            f"of warm-up), {train['epochs']:g} epochs of batch {train['batch']}, seed {train['seed']}, loss on "
            f"{'the answer' if train['loss_on'] == 'answer' else 'every token'}, gradient norm clipped at 1. "
            f"{record['run']['steps']} steps, last loss {record['run']['loss']}, {record['run']['seconds']:.0f} s on "
            f"{record['device']}.",
            *([_UNCONFIRMED] if settings["preset"] == "paper" else []),
            "",
            *_scores(record),
        ]
    )


_UNCONFIRMED = (
    "\nRank, alpha and targets are those of the published adapters; rate, epochs, batch and seed are not confirmed by "
    "a publication."
)


def _identifier(licence: str) -> str:
    return licence.lower() if licence and " " not in licence else "other"


def _data(record: Mapping[str, Any]) -> Sequence[str]:
    data = record["data"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in data["kinds"].items())
    lines = [
        f"{sum(data['kinds'].values())} rows ({kinds}) from {', '.join(data['files'])}; licence: {data['licence']}. "
        f"{data['near_copies_dropped']} near copies were left out. No row is close (Jaccard of content words ≥ 0.6) to "
        "a harmful or harmless prompt that this program scores with."
    ]
    if "harmful" in data["kinds"] and "harmless" in data["kinds"]:
        lines.append("\nHarmless rows are among them; the paper trains on safety rows alone.")
    return [*lines, *(f"\nNote: {warning}" for warning in record["warnings"])]


def _scores(record: Mapping[str, Any]) -> Sequence[str]:
    scores = record.get("scores")
    if not scores:
        return ["## Scores", "", "Not scored. `safemerge compare MODEL MODEL+ADAPTER` does it.", ""]
    rows = ["| model | refuses harmful % | refuses harmless % | J |", "|---|---:|---:|---:|"]
    for name, one in scores["models"].items():
        values = (one["harmful"], one["harmless"], one["separation"])
        rows.append(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")
    first = next(iter(scores["models"].values()))
    return [
        "## Scores",
        "",
        f"Tuning split (n = {first['n']} harmful, {first['m']} harmless), by which the size was chosen; not the split "
        "that is reported. Refusals are found by pattern matching.",
        "",
        *rows,
        "",
        f"Kept: {scores['chosen']} rows."
        + ("" if scores["within"] else " None stayed within the bound of over-refusal."),
        *(f"\n**{warning}**" for warning in scores["warnings"]),
        "",
    ]
