"""What a rule changes of the merge: any key of any method, checked once more with the method it ends up with."""

from __future__ import annotations

from functools import cache
from operator import getitem
from typing import Annotated, Any, Union

from pydantic import Field, ModelWrapValidatorHandler, ValidationInfo, create_model, model_validator

from safemerge_recipes.recipe.fields import Strict
from safemerge_recipes.recipe.merge import NULLABLE, Merge, MethodName, form_of, forms, method_parameters
from safemerge_recipes.recipe.merge_forms import displaced
from safemerge_recipes.recipe.merge_keys import COMMON


class MergeChange(Strict):
    """The parts of the merge that a rule changes. Another method forgets keys that it does not use."""

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, handler: ModelWrapValidatorHandler[MergeChange], info: ValidationInfo) -> MergeChange:
        if cls is MergeChange and isinstance(value, dict):
            form = common_change()
            form = form if set(value) <= set(form.key_names()) else any_change()
            return form.model_validate(value, context=info.context)
        return handler(value)


@cache
def common_change() -> type[MergeChange]:
    """`MergeChange` with the keys that are the same to all methods, so that most rules import none of them."""
    fields: dict[str, Any] = {"method": (MethodName, "linear")} | {name: (kind, None) for name, kind in COMMON.items()}
    return create_model("MergeChange", __base__=MergeChange, **fields)


@cache
def any_change() -> type[MergeChange]:
    """`MergeChange` with the keys of all methods; made when a rule needs it, as it imports them."""
    found = list(forms().values())
    names = dict.fromkeys(name for form in found for name in form.model_fields if name != "method")
    about = "The merge method: one of those below, `mergekit:<name>`, or a plugin's."
    fields: dict[str, Any] = {"method": (MethodName, Field(default="linear", description=about))}
    fields |= {name: _key(name, found) for name in names}
    made = create_model("MergeChange", __base__=MergeChange, **fields)
    made.__doc__ = MergeChange.__doc__
    return made


def _key(name: str, found: list[type[Merge]]) -> tuple[Any, Any]:
    """A key as any of the methods that use it takes it, for a rule that need not say which of them."""
    infos = [form.model_fields[name] for form in found if name in form.model_fields]
    kinds: dict[str, Any] = {}
    for info in infos:  # of the same type the first, which is the most general
        kinds.setdefault(repr(info.annotation), getitem(Annotated, (info.annotation, *info.metadata, Field())))
    if name in NULLABLE:
        kinds["None"] = None
    key = infos[0].alias or name
    meanings = " ".join(dict.fromkeys(form.meanings()[key] for form in found if name in form.model_fields))
    defaults = [None if info.is_required() else info.default for info in infos]  # told in the reference alone
    default = defaults[0] if all(one == defaults[0] for one in defaults) else None
    return getitem(Union, tuple(kinds.values())), Field(default=default, alias=infos[0].alias, description=meanings)


def change_merge(merge: Merge, change: MergeChange | None) -> Merge:
    """The merge with a rule's changes; another method forgets what it does not use."""
    if change is None:
        return merge
    values = merge.given()
    given = change.given()
    method = given.get("method", merge.method)
    if method != merge.method:
        # `normalize` and `options` mean something else to each method.
        used = [key for key in method_parameters(method) if key not in ("normalize", "options")]
        values = {key: value for key, value in values.items() if key in used}
        if values.get("space") == "factors" and not form_of(method).factors:
            del values["space"]
    for key in displaced(given):
        values.pop(key, None)
    return Merge.model_validate({**values, **given})
