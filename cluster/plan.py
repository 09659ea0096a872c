"""Who sits on which GPU: arithmetic on byte counts, without models, torch or Ray.

The caller lists for each role the ways to run it, best first, each with the bytes that one of its processes
holds on its GPU at a few phases. `place` puts the roles on a number of like GPUs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

GIB = 2**30
ENGINE_SHARE = 0.9
"""Most of a GPU that a rollout engine takes where it is alone on it."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one process holds on one GPU at one phase."""

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


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to run a role."""

    settings: Mapping[str, object]
    """What tells this way from the others, for whoever writes the config: passed through unread."""
    num_ranks: int = 1
    """Processes; engines of a rollout role."""
    gpus_per_rank: int = 1
    """Whole GPUs under each of them, when it does not share."""
    phases: Mapping[str, Memory]
    """Phase, such as "backward", -> what a process holds on each of its GPUs then."""

    @property
    def peak(self) -> tuple[str, Memory]:
        """The phase that needs most, and what it needs."""
        return max(self.phases.items(), key=lambda item: item[1].total)

    @property
    def gpus(self) -> int:
        """Whole GPUs in all."""
        return self.num_ranks * self.gpus_per_rank


@dataclass(frozen=True, kw_only=True)
class Role:
    """A role and the ways to run it."""

    name: str
    options: Sequence[Option]
    """Best first."""
    is_engine: bool = False
    """Takes the GPUs that the others leave; its KV cache grows to fill its share."""
    kv_cache_wanted: int = 0
    """Bytes of KV cache over all GPUs of an engine that would be of use; options hold the least it can run with."""


@dataclass(frozen=True, kw_only=True)
class PlacedRole:
    """A role in its place."""

    role: str
    option: Option
    gpu_share: float
    """GPUs of one process; below 1 where it shares one."""
    phase: str
    """When it needs most memory."""
    memory: Memory
    """What a process holds on each of its GPUs at that phase."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A place for all roles, and whether the GPUs hold them."""

    roles: Sequence[PlacedRole]
    gpus: Sequence[tuple[str, ...]]
    """For each GPU in use the roles that have a process on it."""
    num_gpus: int
    """GPUs there are."""
    gpu_bytes: int
    """Memory of each."""

    @property
    def fullest(self) -> tuple[tuple[str, ...], int]:
        """The roles on the fullest GPU and the bytes they hold there."""
        held = {each.role: each.memory.total for each in self.roles}
        return max(((names, sum(held[name] for name in names)) for names in set(self.gpus)), key=lambda item: item[1])

    @property
    def fits(self) -> bool:
        """There are enough GPUs and none is over full."""
        return len(self.gpus) <= self.num_gpus and self.fullest[1] <= self.gpu_bytes


def place_given(
    roles: Sequence[tuple[Role, Option, float]], *, gpus: int, gpu_bytes: int, engine_share: float
) -> Placement:
    """The placement that a config asks for, whether it fits or not.

    Args:
        roles: each role with its option and the GPUs that one of its processes asks for. Processes that ask for
            less than one meet on a GPU as long as their shares leave room, in the order given.
        gpus: GPUs there are.
        gpu_bytes: memory of each.
        engine_share: the share of a GPU's memory that an engine is allowed.
    """
    whole: list[tuple[str, ...]] = []
    shared: list[tuple[tuple[str, ...], float]] = []
    placed = []
    for role, option, share in roles:
        if share >= 1:
            whole += [(role.name,)] * int(option.num_ranks * -(-share // 1))
        else:
            for _ in range(option.num_ranks):
                place_of = next((i for i, (_, taken) in enumerate(shared) if taken + share <= 1 + 1e-6), None)
                if place_of is None:
                    shared.append(((), 0.0))
                    place_of = len(shared) - 1
                names, taken = shared[place_of]
                shared[place_of] = ((*names, role.name), taken + share)
        phase, memory = option.peak
        if role.is_engine:
            memory = _grow(memory, role, option, int(engine_share * gpu_bytes))
        placed.append(PlacedRole(role=role.name, option=option, gpu_share=share, phase=phase, memory=memory))
    devices = whole + [names for names, _ in shared]
    return Placement(roles=placed, gpus=devices, num_gpus=gpus, gpu_bytes=gpu_bytes)


def place(roles: Sequence[Role], sharing: Sequence[Sequence[str]], *, gpus: int, gpu_bytes: int) -> Placement | None:
    """The first placement that fits, or None.

    Tries each set of roles that may share one GPU in the order given. The others have GPUs of their own, each role
    by its first option that fits and leaves enough for those after it; the engine, placed last, takes the rest.

    Args:
        sharing: sets of role names that sit on one GPU together, preferred first; empty for none.
        gpus: GPUs there are.
        gpu_bytes: memory of each.
    """
    for together in sharing:
        placement = _place(roles, set(together), gpus, gpu_bytes)
        if placement is not None:
            return placement
    return None


def _place(roles: Sequence[Role], together: set[str], num_gpus: int, gpu_bytes: int) -> Placement | None:
    members = [role for role in roles if role.name in together]
    alone = [role for role in roles if role.name not in together]
    chosen: dict[str, Option] = {}
    if members:
        shared = _share(members, gpu_bytes)
        if shared is None:
            return None
        chosen |= shared
    room = num_gpus - bool(members)
    for index, role in enumerate(alone):
        least_of_others = sum(_fewest(other, gpu_bytes) for other in alone[index + 1 :])
        option = next(_that_fit(role, gpu_bytes, room - least_of_others), None)
        if option is None:
            return None
        chosen[role.name] = option
        room -= option.gpus
    if room < 0:
        return None
    left = gpu_bytes - sum(chosen[role.name].peak[1].total for role in members)
    placed = []
    for role in roles:
        option = chosen[role.name]
        phase, memory = option.peak
        # Rounded down to what Ray counts in, so that the shares add up to one GPU at most.
        share = int(100 / len(members)) / 100 if role in members else float(option.gpus_per_rank)
        if role.is_engine:
            limit = memory.total + left if role in members else int(ENGINE_SHARE * gpu_bytes)
            memory = _grow(memory, role, option, limit)
        placed.append(PlacedRole(role=role.name, option=option, gpu_share=share, phase=phase, memory=memory))
    gpus: list[tuple[str, ...]] = [(role.name,) for role in alone for _ in range(chosen[role.name].gpus)]
    if members:
        gpus.append(tuple(role.name for role in members))
    return Placement(roles=placed, gpus=gpus, num_gpus=num_gpus, gpu_bytes=gpu_bytes)


def _share(members: Sequence[Role], gpu_bytes: int) -> dict[str, Option] | None:
    """One process of each role on one GPU: the first option that leaves room for the least of those to come."""
    singles = {role.name: [o for o in role.options if o.num_ranks == o.gpus_per_rank == 1] for role in members}
    if not all(singles.values()):
        return None
    least = {name: min(option.peak[1].total for option in options) for name, options in singles.items()}
    chosen: dict[str, Option] = {}
    left = gpu_bytes
    for name, options in singles.items():
        del least[name]
        option = next((o for o in options if o.peak[1].total <= left - sum(least.values())), None)
        if option is None:
            return None
        chosen[name] = option
        left -= option.peak[1].total
    return chosen


def _that_fit(role: Role, gpu_bytes: int, gpus: int) -> Iterator[Option]:
    limit = int(ENGINE_SHARE * gpu_bytes) if role.is_engine else gpu_bytes
    return (option for option in role.options if option.gpus <= gpus and option.peak[1].total <= limit)


def _fewest(role: Role, gpu_bytes: int) -> int:
    """GPUs that the role needs at the least; more than there can be where no option fits."""
    limit = int(ENGINE_SHARE * gpu_bytes) if role.is_engine else gpu_bytes
    return min((option.gpus for option in role.options if option.peak[1].total <= limit), default=10**9)


def _grow(memory: Memory, role: Role, option: Option, limit: int) -> Memory:
    """With the KV cache that fits below a limit, no more than is of use."""
    parts = {field.name: getattr(memory, field.name) for field in fields(memory)}
    wanted = -(-role.kv_cache_wanted // option.gpus_per_rank)
    parts["kv_cache"] += max(0, min(wanted - memory.kv_cache, limit - memory.total))
    return Memory(**parts)
