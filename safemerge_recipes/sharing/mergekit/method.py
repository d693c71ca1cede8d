"""`merge_method: safemerge`: the gated merge as one of mergekit's methods, with the tensors that a recipe gives.

mergekit shows a method one tensor at a time, so the gates are those that need no other: a threshold of ρ, or always.
Importing this module imports mergekit; `run` hands over to it.
"""

import os
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods import (
    BasePolicy,
    InputContract,
    PerNonBase,
    TensorGroup,
    merge_method,
    register,
    registered_methods,
)

from safemerge_recipes.errors import PlanError, RecipeError
from safemerge_recipes.storage.files import MAX_BYTES, check_file
from safemerge_recipes.tensor_names import is_block_matrix

NAME = "safemerge"
ROLES = ("finetuned", "safety", "base")
"""The roles of models beside `base_model`, which is the aligned one; in this order where no `role` is given."""


@merge_method(
    name=NAME,
    pretty_name="SafeMERGE",
    reference_url="https://arxiv.org/abs/2503.17239",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1, max_non_base=3),
)
def safemerge(
    group: TensorGroup,
    role: PerNonBase[str | None] = None,
    tau: float = 0.35,
    always: bool = False,
    alpha: float = 0.8,
    gamma: float | None = None,
) -> torch.Tensor:
    """One tensor: αΔf + (1−α)Δs where ρ = cos(VVᵀΔf, Δf) < τ, or Δf + γV where `gamma` is given; else Δf.

    ρ is computed in float64, the merge in float32 and rounded once.
    """
    sides = _sides(group, role, gamma is not None, always)
    aligned, finetuned = sides["aligned"], sides["finetuned"]
    if not is_block_matrix(group.metadata.name or "", tuple(aligned.shape)) or torch.equal(aligned, finetuned):
        return finetuned
    if not always:
        seen = _rho(finetuned.double() - aligned.double(), aligned.double() - sides["base"].double())
        if seen is None or seen >= tau:
            return finetuned
    return _merged(sides, alpha, gamma)


def _rho(delta: torch.Tensor, v: torch.Tensor) -> float | None:
    """ρ in [0, 1] of a matrix or of a stack of them; None where V or Δ is zero."""
    across = v.transpose(-1, -2) @ delta
    image = torch.linalg.vector_norm(v @ across) * torch.linalg.vector_norm(delta)
    return float(across.square().sum() / image) if image else None


def _merged(sides: dict[str, torch.Tensor], alpha: float, gamma: float | None) -> torch.Tensor:
    whole = {name: tensor.float() for name, tensor in sides.items()}
    if gamma is not None:
        merged = whole["finetuned"] + gamma * (whole["aligned"] - whole["base"])
    else:
        merged = (alpha * whole["finetuned"]).add_(whole["safety"], alpha=1 - alpha)
    return merged.to(sides["aligned"].dtype)


def _sides(group: TensorGroup, role: Any, vector: bool, always: bool) -> dict[str, torch.Tensor]:
    """The tensors by role. Raises RecipeError where a role is unknown, missing, or given twice."""
    given = [role[entry.id] for entry in group.non_base]
    named = given if any(given) else list(ROLES[: len(given)])
    if not set(named) <= set(ROLES) or len(set(named)) != len(named):
        raise RecipeError(f"merge_method: safemerge: found the roles {named}; expected each of {', '.join(ROLES)} once")
    sides = {"aligned": group.base.tensor, **dict(zip(named, (e.tensor for e in group.non_base), strict=True))}
    needed = {"finetuned", "base" if vector else "safety", *(() if always else ("base",))}
    if missing := sorted(needed - set(sides)):
        raise RecipeError(
            f"merge_method: safemerge: no model has the role {' or '.join(missing)}; expected base_model to be the "
            "aligned model, and beside it the models with `parameters: {role: finetuned}`, `safety` and `base`"
        )
    return sides


def enroll() -> None:
    """Makes `merge_method: safemerge` known to mergekit in this process."""
    if NAME not in {method.spec.name for method in registered_methods()}:
        register(safemerge)


def run(arguments: list[str]) -> None:
    """mergekit-yaml with the method enrolled.

    Raises:
        RecipeError: mergekit refuses the file or an option, or code of a model repository is asked for.
        PlanError: the merge fails.
    """
    import click
    from mergekit.scripts.run_yaml import main
    from pydantic import ValidationError

    if any(one.split("=")[0] == "--trust-remote-code" for one in arguments):
        raise RecipeError("--trust-remote-code: found it; expected no code of a model repository to be run")
    for one in arguments:
        if os.path.exists(one) and not os.path.isdir(one):
            check_file(Path(one), MAX_BYTES, "any")  # mergekit would wait for a pipe, and read a device without end
    enroll()
    try:
        main(arguments, prog_name="safemerge mergekit-yaml", standalone_mode=False)
    except click.exceptions.ClickException as error:
        raise RecipeError(f"mergekit-yaml: {error.format_message()}; see safemerge mergekit-yaml -- --help") from None
    except ValidationError as error:
        raise RecipeError(f"mergekit-yaml: {arguments[0]}: {str(error.errors()[0]['msg'])[:300]}") from None
    except (RecipeError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever mergekit or what lies below it finds wrong
        raise PlanError(f"mergekit-yaml: mergekit says: {type(error).__name__}: {str(error)[:500]}") from None
