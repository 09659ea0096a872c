"""Which ways of running the roles fit on GPUs together: arithmetic on byte counts, without models, torch or Ray.

The caller lists for each role the ways to run it, best first, each with the bytes that one of its processes holds on
a GPU, phase by phase: in a phase a role is awake, or asleep and holds next to nothing. Layouts are those of
`cluster.layout`.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from cluster.layout import Demand, Host, Layout, PlacementError, lay_out

GIB = 2**30
FULL = 0.95
"""Share of a GPU up to which an engine's cache may fill it, whoever else is there."""
ENGINE_SHARE = 0.9
"""Most of a GPU that an engine takes."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one process holds on one GPU at one moment."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    """Logits of a chunk and what the head's backward pass needs beside them."""
    buffers: int = 0
    """Communication buckets, gathered weights, copies of gradients around the optimizer step."""
    kv_cache: int = 0
    overhead: int = 0
    """An allowance for the CUDA context, libraries and workspaces."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, field.name) for field in fields(self))


Moments = Mapping[str, Memory]
"""Moment of a phase, such as "backward", -> what a process holds on each of its GPUs then."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to run a role."""

    settings: Mapping[str, object]
    """What tells this way from the others, for whoever writes the config: passed through unread."""
    num_ranks: int = 1
    """Processes; engines of a rollout role."""
    gpus_per_rank: int = 1
    """GPUs under each of them."""
    phases: Mapping[str, Moments]
    """The phases in which it is awake."""
    asleep: Memory = Memory()
    """What stays on the GPU in the others."""

    def at(self, phase: str) -> tuple[str, Memory]:
        """The moment of a phase that needs most, and what it needs."""
        return max(self.phases.get(phase, {"asleep": self.asleep}).items(), key=lambda item: item[1].total)

    @property
    def peak(self) -> tuple[str, Memory]:
        """The moment of all phases that needs most, and what it needs."""
        return max((self.at(phase) for phase in self.phases), key=lambda item: item[1].total)

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.num_ranks * self.gpus_per_rank


@dataclass(frozen=True, kw_only=True)
class Role:
    """A role and the ways to run it."""

    name: str
    options: Sequence[Option]
    """Best first."""
    kv_cache_wanted: int = 0
    """Of an engine, bytes of KV cache over all of its GPUs that would be of use; options hold the least it can run
    with, and it grows to that as far as there is room. 0 of others."""


@dataclass(frozen=True)
class Placed:
    """A role with the way that was chosen."""

    role: Role
    option: Option
    gpus: tuple[int, ...] = ()
    """Where they are given: all that its ranks are on."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """All roles in their places, and whether the GPUs hold them."""

    placed: Sequence[Placed]
    layout: Layout
    gpu_bytes: int
    """Memory of each GPU."""

    @property
    def options(self) -> dict[str, Option]:
        """Role -> the way that was chosen."""
        return {each.role.name: each.option for each in self.placed}

    @property
    def gpus(self) -> list[tuple[str, ...]]:
        """For each GPU in use the roles on it."""
        every = ((node, gpu) for node, held in enumerate(self.layout.nodes) for gpu in range(held.gpus))
        return [tuple(on) for node, gpu in every if (on := self.layout.on(node, gpu))]

    @property
    def fullest(self) -> tuple[tuple[str, ...], str, int]:
        """Of the fullest GPU its roles, the phase that needs most, and the bytes they hold then."""
        found = [(names, *fullest_phase([self.options[n] for n in names])) for names in dict.fromkeys(self.gpus)]
        return max(found, key=lambda each: each[2])

    @property
    def fits(self) -> bool:
        """No GPU is over full."""
        return self.fullest[2] <= self.gpu_bytes


def fullest_phase(options: Sequence[Option]) -> tuple[str, int]:
    """When processes that share a GPU need most, and how much."""
    phases = dict.fromkeys(phase for option in options for phase in option.phases)
    return max(((phase, held_in(phase, options)) for phase in phases), key=lambda found: found[1])


def held_in(phase: str, options: Iterable[Option]) -> int:
    """Bytes that processes which share a GPU hold together in a phase."""
    return sum(option.at(phase)[1].total for option in options)


def put(
    placed: Sequence[Placed], *, nodes: Sequence[Host], gpu_bytes: int, engine_share: float | None = None
) -> Placement:
    """The roles on the nodes' GPUs, whether these hold them or not.

    Args:
        engine_share: of a GPU's memory, what an engine fills with its cache; None for what the others leave.
    Raises:
        PlacementError: a rank has no place.
    """
    demands = [Demand(p.role.name, p.option.num_ranks, p.option.gpus_per_rank, p.gpus) for p in placed]
    placement = Placement(placed=placed, layout=lay_out(demands, nodes), gpu_bytes=gpu_bytes)
    grown = [
        replace(each, option=_grow(each, placement, engine_share)) if each.role.kv_cache_wanted else each
        for each in placed
    ]
    return replace(placement, placed=grown)


def _grow(engine: Placed, placement: Placement, share: float | None) -> Option:
    """The engine with the KV cache for which all of its GPUs have room, no more than is of use."""
    gpu_bytes = placement.gpu_bytes
    option, options = engine.option, placement.options
    shared = [
        [options[n] for n in names if n != engine.role.name] for names in placement.gpus if engine.role.name in names
    ]
    phases: dict[str, Moments] = {}
    for phase, moments in option.phases.items():
        moment, memory = option.at(phase)
        beside = max(held_in(phase, others) for others in shared)
        wanted = -(-engine.role.kv_cache_wanted // option.gpus_per_rank) if memory.kv_cache else 0
        left = min(int(ENGINE_SHARE * gpu_bytes), int(FULL * gpu_bytes) - beside)
        more = min(wanted - memory.kv_cache, (left if share is None else int(share * gpu_bytes)) - memory.total)
        grown = replace(memory, kv_cache=memory.kv_cache + max(0, more))
        phases[phase] = {**moments, moment: grown}
    return replace(option, phases=phases)


def first_that_fits(
    candidates: Iterator[Sequence[Placed]], *, nodes: Sequence[Host], gpu_bytes: int
) -> Placement | None:
    """The first of several choices that the GPUs hold, or None."""
    for placed in candidates:
        try:
            placement = put(placed, nodes=nodes, gpu_bytes=gpu_bytes)
        except PlacementError:
            continue
        if placement.fits:
            return placement
    return None


def all_on_all(
    roles: Sequence[Role], kinds: Sequence[Sequence[str]], *, num_gpus: int, gpu_bytes: int
) -> Iterator[list[Placed]]:
    """Every role on every GPU, or on as many as all can use, in the ways that fit.

    Args:
        kinds: names of roles that are run in like ways: the first way for all of them, or the second, and so on.
    """
    sizes = set.intersection(*({option.gpus for option in role.options} for role in roles))
    for size in sorted((size for size in sizes if size <= num_gpus), reverse=True):
        options = {role.name: [option for option in role.options if option.gpus == size] for role in roles}
        alike = [[name for name in names if name in options] for names in kinds]
        ways = [list(zip(*(options[name] for name in names), strict=False)) for names in alike if names]
        for chosen in itertools.product(*ways):
            by_name = dict(zip(itertools.chain(*alike), itertools.chain(*chosen), strict=True))
            if fullest_phase(list(by_name.values()))[1] <= gpu_bytes:
                yield [Placed(role, by_name[role.name]) for role in roles]


def apart(roles: Sequence[Role], together: Sequence[str], *, num_gpus: int, gpu_bytes: int) -> Iterator[list[Placed]]:
    """Roles with GPUs of their own, but for those that sit on the last one together.

    Each role takes the first way that fits one GPU and leaves enough for those after it; the last, the engine, takes
    the rest.
    """
    members = [role for role in roles if role.name in together]
    alone = [role for role in roles if role.name not in together]
    room = num_gpus - bool(members)
    chosen: dict[str, Option] = {}
    for index, role in enumerate(alone):
        others = sum(_fewest(other, gpu_bytes) for other in alone[index + 1 :])
        option = next((o for o in _that_fit(role, gpu_bytes) if o.gpus <= room - others), None)
        if option is None:
            return
        chosen[role.name] = option
        room -= option.gpus
    singles = [[option for option in role.options if option.gpus == 1] for role in members]
    for shared in itertools.product(*singles):
        if not members or fullest_phase(shared)[1] <= gpu_bytes:
            both = {**chosen, **{role.name: option for role, option in zip(members, shared, strict=True)}}
            yield [Placed(role, both[role.name], (num_gpus - 1,) if role in members else ()) for role in roles]
            return


def _that_fit(role: Role, gpu_bytes: int) -> Iterator[Option]:
    """The role's ways that fit a GPU of its own."""
    limit = int(ENGINE_SHARE * gpu_bytes) if role.kv_cache_wanted else gpu_bytes
    return (option for option in role.options if option.peak[1].total <= limit)


def _fewest(role: Role, gpu_bytes: int) -> int:
    """GPUs that the role needs at the least; more than there can be where no way fits."""
    return min((option.gpus for option in _that_fit(role, gpu_bytes)), default=10**9)
