"""The recipe: what a user declares, as frozen and strictly checked values; its parts are the modules beside this.

Holds the shape of a recipe and the checks that need nothing but the whole of it. The docstring under each field is its
documentation; the JSON schema and `docs/recipe.md` are made from them. Knows nothing of YAML and files (`loading`), of
checkpoints, or of how a metric or a merge is computed.

Δf = W_finetuned − W_aligned, Δs = W_safety − W_aligned, V = W_aligned − W_base.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, SerializeAsAny, ValidationError, model_validator

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.builtins import ROLES, Role
from safemerge_recipes.recipe.composed_schema import add_to_schema
from safemerge_recipes.recipe.evaluation import Evaluate, Judge
from safemerge_recipes.recipe.fields import Problems, Strict, Text, check_text, parse_size
from safemerge_recipes.recipe.gate import SELECTORS, Gate, GateChange, Random, change_gate
from safemerge_recipes.recipe.merge import Merge, forms, method_parameters
from safemerge_recipes.recipe.merge_change import MergeChange, any_change, change_merge
from safemerge_recipes.recipe.output import Output
from safemerge_recipes.recipe.rules import Policy, Rule
from safemerge_recipes.recipe.source import Source, Sources

__all__ = [
    "SELECTORS", "Evaluate", "Gate", "GateChange", "Judge", "Merge", "MergeChange", "Output",
    "Policy", "Random", "Recipe", "Role", "Rule", "Source", "Sources", "json_schema", "method_parameters",
    "parse_size",
]  # fmt: skip


class Recipe(Strict):
    """A SafeMERGE recipe: which models, which tensors, how they merge, and what is written."""

    SCHEMA_ID: ClassVar[str] = (
        "https://raw.githubusercontent.com/safemerge/safemerge-recipes/main/docs/safemerge-recipe.schema.json"
    )

    name: (
        Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\n\t]*$"), AfterValidator(check_text)] | None
    ) = None
    """Name of the result, for the report and the model card."""
    description: Text | None = None
    """A few words about it."""
    sources: Sources
    """The models that are read."""
    gate: Gate
    """Which tensors are merged."""
    merge: SerializeAsAny[Merge] = Field(default_factory=lambda: Merge.model_validate({}))
    """What a selected tensor becomes; `linear` with `alpha: 0.8` unless said."""
    rules: Annotated[tuple[Rule, ...], Field(strict=False, max_length=1000)] = ()
    """Exceptions; the first that matches a tensor wins."""
    vocabulary: Literal["finetuned", "aligned", "strict"] | None = None
    """Whose rows the embeddings and head get where vocabularies differ in size; `strict` refuses that.
    null: the fine-tuned side's, as its tokenizer is copied."""
    output: Output = Field(default_factory=Output)
    """What is written, and where; may be left to the command line."""
    evaluate: Evaluate | None = None
    """How the result is scored; null: not at all."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = Problems([])
        for index, rule in enumerate(self.rules):
            try:
                change_gate(self.gate, rule.gate)
            except ValidationError as errors:
                problems.add_all(("rules", index, "gate"), errors)
            try:
                change_merge(self.merge, rule.merge)
            except ValidationError as errors:
                problems.add_all(("rules", index, "merge"), errors)
        problems.check("Recipe")

        given = self.sources.roles()
        asked: set[tuple[str, str]] = set()
        *ruled, default = self.policies()
        for policy in (default, *ruled):
            place = "" if policy.rule is None else f" (rules.{policy.rule})"
            never = policy.gate.selector[0] == "never"
            needs: list[tuple[Role, str]]
            if policy.keep is not None:
                needs = [(policy.keep, f"keep: {policy.keep}")]
            else:
                roles = [role for role in policy.merge.needs() if role in ROLES and not never]
                needs = [(role, f"method {policy.merge.method}") for role in roles]
                if policy.gate.needs_metric:
                    needs.append(("base", f"metric {policy.gate.metric}"))
            for role, reason in needs:
                if role not in given and (role, reason) not in asked:
                    asked.add((role, reason))
                    problems.add(("sources", role), f"missing; expected it because {reason} needs it{place}")
            if self.output.format == "adapter" and policy.keep is None and not never and self.output.rank is None:
                method = policy.merge.method
                known = builtins.METHODS.get(method)
                if not (known and known.low_rank) and ("rank", method) not in asked:
                    asked.add(("rank", method))
                    message = f"missing; expected a rank because method {method} has no small exact rank{place}"
                    problems.add(("output", "rank"), message)
        self._check_weights(problems)
        for index, compared in enumerate(self.evaluate.compare if self.evaluate else ()):
            if compared not in given:
                message = f'found "{compared}"; expected one of the sources given: {", ".join(given)}'
                problems.add(("evaluate", "compare", index), message, compared)
        problems.check("Recipe")
        return self

    def _check_weights(self, problems: Problems) -> None:
        """Every weight needs its source, and every other source a merge that weighs it."""
        weighed: set[str] = set()
        unknown: set[str] = set()
        for policy in self.policies():
            weights = getattr(policy.merge, "weights", None) if policy.keep is None else None
            place = ("merge",) if policy.rule is None else ("rules", policy.rule, "merge")
            for role in weights or ():
                if role not in ("finetuned", "safety", *self.sources.others) and role not in unknown:
                    unknown.add(role)
                    expected = ", ".join(("finetuned", "safety", *self.sources.others))
                    problems.add((*place, "weights", role), f"no source goes by it; expected one of {expected}")
            weighed |= set(weights or ())
        for name in self.sources.others if not unknown else ():
            if name not in weighed:
                known = [key for key, method in builtins.METHODS.items() if "weights" in method.keys.key_names()]
                problems.add(
                    ("sources", "others", name),
                    f"nothing weighs it; expected it in merge.weights, which {', '.join(known)} and mergekit:* take; "
                    f"{self.merge.method} has {', '.join(self.merge.parameters()) or 'no keys'}",
                )

    def policies(self) -> tuple[Policy, ...]:
        """What holds for each rule's tensors, in order, and last for all others. The first match wins."""
        return (
            *(
                Policy(
                    patterns=rule.tensors,
                    keep=rule.keep,
                    gate=change_gate(self.gate, rule.gate),
                    merge=change_merge(self.merge, rule.merge),
                    rule=index,
                )
                for index, rule in enumerate(self.rules)
            ),
            Policy(("*",), None, self.gate, self.merge, None),
        )


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe file."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    source = definitions["Source"]
    text = {"type": "string", "description": "A local folder, a hub id, or id@revision."}
    definitions["Source"] = {"anyOf": [text, source], "description": source["description"]}
    definitions |= _merge_schemas(definitions["Merge"]["description"])
    change = any_change().model_json_schema(by_alias=True, ref_template="#/$defs/{model}")
    definitions |= change.pop("$defs", {}) | {"MergeChange": change}
    change["allOf"] = [_if_method(name, form) for name, form in forms().items() if name]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": Recipe.SCHEMA_ID,
        "title": "SafeMERGE recipe",
    }
    return add_to_schema(head | {key: value for key, value in schema.items() if key not in head})


def _merge_schemas(description: str) -> dict[str, Any]:
    """`Merge` as a union told apart by `method`, and each of its forms."""
    found: dict[str, Any] = {}
    union = []
    for method, form in forms().items():
        one = form.model_json_schema(by_alias=True, ref_template="#/$defs/{model}")
        found |= one.pop("$defs", {})
        one["description"] = f"{builtins.METHODS[method].formula}." if method else one["description"]
        if not method:
            one["properties"]["method"]["not"] = {"enum": list(builtins.METHODS)}
        one["properties"]["method"]["description"] = "The merge method."
        found[form.__name__] = one
        union.append({"$ref": f"#/$defs/{form.__name__}"})
    return found | {"Merge": {"oneOf": union, "description": description}}


def _if_method(method: str, form: type[Merge]) -> dict[str, Any]:
    """What a rule may change of the merge where it names this method."""
    named = {"properties": {"method": {"const": method}}, "required": ["method"]}
    return {"if": named, "then": {"propertyNames": {"enum": form.key_names()}}}
