"""Where every rank runs: its node and its GPUs. Pure arithmetic: no Ray, no torch.

`lay_out` gives each rank of each role a seat, `placement.reserve` takes what the seats need in one placement group, and
`worker_group` starts each rank on its seat. Nothing else decides where a rank runs.

Roles are apart as long as there are GPUs enough, and share them where there are not; where every role has as many ranks
as there are GPUs, all are on all of them. A role whose GPUs are given is there.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby


class PlacementError(RuntimeError):
    """The ranks have no place, or got none in time; one line says what is asked for and what there is."""


@dataclass(frozen=True)
class Host:
    """A machine, as far as it matters who sits on it."""

    gpus: int = 0
    ranks: int = 2**20
    """Processes that it takes, by its CPUs."""
    node_id: str = ""
    """Ray's; "" where the nodes are only planned."""


@dataclass(frozen=True)
class Demand:
    """What a role asks for."""

    role: str
    num_ranks: int = 1
    gpus_per_rank: int = 0
    """Whole GPUs under each rank; all on one node. Roles that hold no model ask for none."""
    gpus: tuple[int, ...] = ()
    """Where they are given: those of rank 0, then of rank 1, ..., numbered through all nodes."""


@dataclass(frozen=True)
class Seat:
    """The place of one rank."""

    role: str
    rank: int
    node: int
    """In `Layout.nodes`."""
    gpus: tuple[int, ...]
    """Numbered within the node."""


@dataclass(frozen=True)
class Layout:
    """A seat for every rank."""

    nodes: tuple[Host, ...]
    seats: tuple[Seat, ...]

    @property
    def roles(self) -> list[str]:
        """Roles with a seat."""
        return list(dict.fromkeys(seat.role for seat in self.seats))

    def of(self, role: str) -> list[Seat]:
        """The role's seats, rank by rank."""
        return [seat for seat in self.seats if seat.role == role]

    def gpus(self, role: str, *, rank: int | None = None) -> set[tuple[int, int]]:
        """(node, GPU) of each that the role sits on, or one of its ranks."""
        return {(seat.node, gpu) for seat in self.of(role) for gpu in seat.gpus if rank in (None, seat.rank)}

    def neighbours(self, role: str) -> set[str]:
        """Other roles that sit on a GPU of this one's."""
        return {other for other in self.roles if other != role and not self.gpus(role).isdisjoint(self.gpus(other))}

    def are_apart(self, role: str, others: Collection[str]) -> bool:
        """Whether a role has no GPU in common with any of the others: they can work at the same time."""
        return self.neighbours(role).isdisjoint(others)

    def num_gpus(self, node: int) -> int:
        """GPUs of a node that are to be reserved: the first so many."""
        return max((gpu + 1 for seat in self.seats if seat.node == node for gpu in seat.gpus), default=0)

    def on(self, node: int, gpu: int) -> list[str]:
        """Roles with a rank on a GPU."""
        return [seat.role for seat in self.seats if seat.node == node and gpu in seat.gpus]

    def lines(self) -> Iterator[str]:
        """For people: a line for each role."""
        width = max(map(len, self.roles), default=0)
        for role in self.roles:
            seats = sorted(self.of(role), key=lambda seat: seat.node)
            ranks = f"{len(seats)} rank" + "s" * (len(seats) != 1)
            on: dict[str, list[int]] = {}
            for node, sitting in groupby(seats, key=lambda seat: seat.node):
                on.setdefault(_runs("GPU", [gpu for seat in sitting for gpu in seat.gpus]), []).append(node)
            where = [f"{_runs('node', nodes)} {gpus}".strip() for gpus, nodes in on.items()]
            yield f"{role:<{width}}  {ranks}: {', '.join(where)}"


def lay_out(demands: Sequence[Demand], nodes: Sequence[Host]) -> Layout:
    """A seat for every rank, on GPUs with as few other ranks as possible and none of its own role.

    Two ranks of a role never meet on a GPU: NCCL takes one of a communicator only, and two engines gain nothing. Roles
    whose GPUs are given come first, then those with many GPUs under a rank, which need them side by side, then those
    with many ranks; of GPUs that are as good the first is taken, so that a role fills a node before it goes on to the
    next. Ranks without GPUs go to the first node with room.

    Raises:
        PlacementError: a rank has no place.
    """
    load = [[0] * node.gpus for node in nodes]
    room = [node.ranks for node in nodes]
    seats: dict[tuple[str, int], Seat] = {}
    order = sorted(demands, key=lambda d: (not d.gpus, -d.gpus_per_rank, -d.num_ranks))
    for demand in order:
        taken: set[tuple[int, int]] = set()
        for rank in range(demand.num_ranks):
            seat = _given(demand, rank, nodes) if demand.gpus else _free(demand, rank, load, room, taken)
            if seat is None or room[seat.node] == 0:
                raise PlacementError(_no_place(demand, rank, nodes))
            own = {(seat.node, gpu) for gpu in seat.gpus}
            if not taken.isdisjoint(own):
                raise PlacementError(f"{demand.role}: two of its ranks would meet on a GPU of gpus={list(demand.gpus)}")
            taken |= own
            room[seat.node] -= 1
            for gpu in seat.gpus:
                load[seat.node][gpu] += 1
            seats[demand.role, rank] = seat
    return Layout(tuple(nodes), tuple(seats[d.role, rank] for d in demands for rank in range(d.num_ranks)))


def _free(
    demand: Demand, rank: int, load: Sequence[Sequence[int]], room: Sequence[int], taken: Collection[tuple[int, int]]
) -> Seat | None:
    """The seat with the fewest others on it; None where there is none."""
    size = demand.gpus_per_rank
    if not size:
        node = next((node for node, left in enumerate(room) if left), None)
        return None if node is None else Seat(demand.role, rank, node, ())
    blocks = [
        (max(load[node][start : start + size]), node, start)
        for node, left in enumerate(room)
        if left
        for start in range(0, len(load[node]) - size + 1, size)
        if not any((node, gpu) in taken for gpu in range(start, start + size))
    ]
    if not blocks:
        return None
    _, node, start = min(blocks)
    return Seat(demand.role, rank, node, tuple(range(start, start + size)))


def _given(demand: Demand, rank: int, nodes: Sequence[Host]) -> Seat:
    """The seat on the GPUs that the demand names."""
    size = demand.gpus_per_rank
    if len(demand.gpus) != demand.num_ranks * size:
        raise PlacementError(
            f"{demand.role}: gpus={list(demand.gpus)} must be {demand.num_ranks * size} numbers: "
            f"{demand.num_ranks} ranks of {size}"
        )
    ends = list(accumulate(node.gpus for node in nodes))
    places = []
    for gpu in demand.gpus[rank * size : (rank + 1) * size]:
        node = next((node for node, end in enumerate(ends) if gpu < end), None)
        if node is None:
            raise PlacementError(f"{demand.role}: there is no GPU {gpu}: they number from 0 to {ends[-1] - 1}")
        places.append((node, gpu - ends[node] + nodes[node].gpus))
    if len({node for node, _ in places}) > 1:
        raise PlacementError(f"{demand.role}: GPUs of its rank {rank} are on several nodes of {_sizes(nodes)}")
    return Seat(demand.role, rank, places[0][0], tuple(gpu for _, gpu in places))


def _no_place(demand: Demand, rank: int, nodes: Sequence[Host]) -> str:
    asked = f"{demand.role}: rank {rank} of {demand.num_ranks} has no place"
    if not demand.gpus_per_rank:
        return f"{asked}: the CPUs of {len(nodes)} nodes take {sum(node.ranks for node in nodes)} ranks"
    size = "a GPU" if demand.gpus_per_rank == 1 else f"{demand.gpus_per_rank} GPUs of one node"
    return f"{asked}: each rank of a role needs {size} without another of its ranks, on {_sizes(nodes)}"


def _sizes(nodes: Sequence[Host]) -> str:
    """ "2 nodes of 8 GPUs, 1 of 4"."""
    counts: dict[int, int] = {}
    for node in nodes:
        counts[node.gpus] = counts.get(node.gpus, 0) + 1
    parts = [f"{count} of {gpus}" for gpus, count in counts.items()]
    (gpus, count), more = next(iter(counts.items())), parts[1:]
    first = f"{count} node{'s' * (count != 1)} of {gpus} GPU{'s' * (gpus != 1)}"
    return ", ".join([first, *more])


def _runs(what: str, numbers: Sequence[int]) -> str:
    """ "GPUs 0-3+6"; nothing where there are none."""
    if not numbers:
        return ""
    found = sorted(set(numbers))
    runs = [[number for _, number in run] for _, run in groupby(enumerate(found), key=lambda pair: pair[1] - pair[0])]
    listed = "+".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{what}{'s' * (len(found) > 1)} {listed}"
