"""What an adapter does to experts, fused or one by one, whichever way the model below has them."""

from __future__ import annotations

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.experts import SeparateExperts, expert_delta
from safemerge_recipes.sources.peft.application import Application
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import LowRank, Weight
from safemerge_recipes.weights.operands import Fused, LowRankStack


def adapt_expert(work: Application, module: str) -> bool:
    """One expert's matrix where the model has them fused, until `add_experts`; False where it has not."""
    shapes = {name: weight.shape for name, weight in work.above.items() if len(weight.shape) == 3}
    place = expert_delta(f"{module}.weight", shapes, work.find)
    pair = work.adapter.keys.pair(module)
    if place is None or pair is None:
        return False
    fused, number, first, rows = place
    update = LowRank(pair[1], pair[0], work.adapter.config.scale(module, pair[0].shape[0]))
    if fused in work.turned or update.shape != (rows, shapes[fused][2]):
        raise work.refuse_shape(f"{module}.weight", update.shape, (rows, shapes[fused][2]))
    work.experts.setdefault(fused, {})[number, first] = update
    work.adapted.add(fused)
    if (f"{module}.weight", fused) not in work.translated:
        work.translated.append((f"{module}.weight", fused))
    return True


def add_experts(work: Application) -> None:
    """The updates of single experts, as one update of each fused tensor."""
    for fused, updates in work.experts.items():
        shape = work.above[fused].shape
        parts: list[tuple[int, Weight]] = []
        at = 0
        for (number, first), update in sorted(updates.items()):
            begin = number * shape[1] + first
            parts += [(begin - at, Weight())] if begin > at else []
            parts.append((update.shape[0], Weight.of(update)))
            at = begin + update.shape[0]
        if at < shape[0] * shape[1]:
            parts.append((shape[0] * shape[1] - at, Weight()))
        work.above[fused] += Weight.of(Fused(shape, tuple(parts)))


def adapt_parameters(work: Application, root: str, levels: list[str]) -> None:
    """A module whose parameters are adapted one by one: fused experts, whichever way they lie on disk.

    PEFT nests one layer in the other and does not name the parameters; shapes tell which is which.

    Raises:
        SourceError: the model does not have one, or factors fit none of them, or several.
    """
    places = _places(work, root)
    for module in levels:
        pair = _factors(work, module)
        parameter = _fitting(work, module, pair, places)
        _adapt_parameter(work, root, parameter, pair, places.pop(parameter))
    if places:
        raise SourceError(
            f"{work.adapter.keys.path}: target_parameters names {root}.{next(iter(places))}, which it does not hold"
        )


def _places(work: Application, root: str) -> dict[str, tuple[int, ...]]:
    """Parameter -> its shape in memory, of those of a module that the config names."""
    wanted = dict.fromkeys(
        path.rpartition(".")[2]
        for path in work.adapter.config.names("target_parameters")
        if f"{root}.{path.rpartition('.')[2]}".endswith(path)
    )
    shapes = {name: weight.shape for name, weight in work.above.items()}
    experts = work.find.experts(root)
    places: dict[str, tuple[int, ...]] = {}
    for parameter in wanted:
        disk = work.find(f"{root}.{parameter}")
        shape = shapes[disk] if disk else experts.fused(parameter, shapes) if experts else None
        if shape is None:
            raise SourceError(
                f"{work.adapter.directory}: adapts {root}.{parameter}, which the model it is applied to has "
                "neither as one tensor nor as separate experts with gate, up and down projections"
            )
        places[parameter] = shape
    return places


def _factors(work: Application, module: str) -> tuple[TensorRef, TensorRef]:
    """(A, B) of one level, which has nothing else."""
    keys = work.adapter.keys
    pair = keys.pair(module)
    if pair is None or keys.modules[module].keys() - {"A", "B"}:
        raise SourceError(f"{keys.path}: {module}: expected nothing but lora_A and lora_B there")
    return pair


def _fitting(
    work: Application, module: str, pair: tuple[TensorRef, TensorRef], places: dict[str, tuple[int, ...]]
) -> str:
    """The one parameter that factors fit."""
    sizes = (pair[1].shape[0], pair[0].shape[1])
    fitting = [p for p, shape in places.items() if sizes in (shape[-2:], shape[:-3:-1])]
    if len(fitting) > 1:  # only square ones fit both ways round
        fitting = [p for p in fitting if sizes == places[p][-2:]]
    if len(fitting) != 1:
        raise SourceError(
            f"{work.adapter.keys.path}: {module}: factors for {sizes} fit {len(fitting)} of target_parameters "
            f"{', '.join(f'{p} {places[p]}' for p in places) or '(none named)'}; expected one"
        )
    shape = places[fitting[0]]
    count, rank = shape[0] if len(shape) == 3 else 1, pair[0].shape[0]
    if rank % count:
        raise SourceError(f"{work.adapter.keys.path}: {module}: {rank} rows of lora_A for {count} experts")
    return fitting[0]


def _adapt_parameter(
    work: Application, root: str, parameter: str, pair: tuple[TensorRef, TensorRef], shape: tuple[int, ...]
) -> None:
    """Adds factors to one parameter, of one shape in memory; on disk it may be one tensor, or one an expert."""
    a, b = pair
    name, sizes = f"{root}.{parameter}", (b.shape[0], a.shape[1])
    count = shape[0] if len(shape) == 3 else 1
    scale = work.adapter.config.scale(name, a.shape[0] // count)
    if work.find(name) is not None:
        turned = sizes != shape[-2:]
        update = LowRankStack(b, a, scale, count, turned) if len(shape) == 3 else LowRank(b, a, scale, turned)
        work.above[work.target(name)] += Weight.of(update)
        return
    experts = work.find.experts(root)
    assert experts is not None  # `_places` has found its shape there
    if sizes != shape[-2:]:
        raise work.refuse_shape(name, sizes, shape[-2:])
    _hand_out(work, experts, parameter, LowRankStack(b, a, scale, count))
    if root != experts.parent:
        work.translated.append((name, f"{experts.parent}.{parameter}"))


def _hand_out(work: Application, experts: SeparateExperts, parameter: str, stack: LowRankStack) -> None:
    """The update of a fused parameter, handed out to experts that lie on disk one by one."""
    gate, up, down = experts.projections
    for number in range(experts.count):
        update = stack.member(number)
        parts = {down: update}
        if parameter == "gate_up_proj":
            half = stack.b.shape[0] // 2
            parts = {
                gate: LowRank(update.b.part(0, half), update.a, update.scale, columns=update.columns),
                up: LowRank(update.b.part(half, half), update.a, update.scale, columns=update.columns),
            }
        for projection, part in parts.items():
            name = experts.name(number, projection)
            work.adapted.add(name)
            work.above[name] += Weight.of(part)
