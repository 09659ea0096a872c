"""Seconds of this project's PPO iteration against the bare loop's on the same work, in interleaved pairs.

    python benchmarks/ppo_round.py testbed
    python benchmarks/ppo_round.py 3.8m
    python scripts/fetch_smollm2.py models/smollm2
    python benchmarks/ppo_round.py smollm2 --smollm2 models/smollm2 --apart --pairs 6 --tuning 1

Options: [--pairs 12] [--precision bf16] [--work DIR] [--result FILE]; `tiny --pairs 2` tries the script out.
Needs an idle machine, and memory for both sides at once: 6 GB for testbed and 3.8m, more than 23 GiB for smollm2. With
--apart the sides run one after the other; their pairs are then no neighbours in time.

One side is `recipe.ppo.iteration` on real Ray, vLLM and DeepSpeed, the other benchmarks/bare_ppo.py in a process of its
own. They hold their models and engines all the time and compute in turns: while one works the other's processes sleep.
Which of the two begins a pair alternates. The ratio is the project's seconds over the bare loop's, per pair; its
median has an interval of order statistics. `step` is the sum of the phases, `call` adds what lies between them.
Writes benchmarks/results/ppo_round_SHAPE.json.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bare_ppo import PHASES, TUNING, WARMUP, serve
from measuring import RESULTS, per_phase, spread, work_directory, write_result
from ppo_work import Work, make_work, work_parser
from recipe_side import recipe_side

REST_S = 0.5  # between turns: threads of the side that worked stop spinning
ANSWER_TIMEOUT_S = 3600


class BareSide:
    """The bare loop in another process."""

    def __init__(self, connection: Any, process: Any):
        self._connection, self._process = connection, process
        self.threads: dict[str, int] = {}

    def wait(self) -> Any:
        """The process's next message.

        Raises:
            SystemExit: it died or has not answered for an hour.
        """
        try:
            if self._connection.poll(ANSWER_TIMEOUT_S):
                return self._connection.recv()
        except EOFError:
            self._process.join()
            raise SystemExit(f"error: the bare loop ended with exit code {self._process.exitcode}") from None
        raise SystemExit(f"error: the bare loop gave no answer within {ANSWER_TIMEOUT_S} s")

    def iteration(self) -> dict[str, float]:
        """One iteration; returns seconds per phase, and as seen from here."""
        start = time.perf_counter()
        self._connection.send("go")
        row: dict[str, float] = self.wait()
        return {**row, "call": time.perf_counter() - start}

    def warm_up(self) -> None:
        """Takes it through its first iterations and the choice of threads."""
        self._connection.send("go")
        self.threads = self.wait()


@contextmanager
def bare_side(work: Work, *, tuning: int) -> Iterator[BareSide]:
    """Starts the bare loop, and ends it with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, work, tuning))
    process.start()
    theirs.close()
    side = BareSide(ours, process)
    try:
        side.wait()
        yield side
        ours.send(None)
        process.join(30)
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


def repeated(side: Callable[[], dict[str, float]], times: int) -> list[dict[str, float]]:
    """Runs one side so many times."""
    rows = []
    for _ in range(times):
        rows.append(side())
        print(f"{rows[-1]['step']:.3f} s", flush=True)
    return rows


def interleave(
    left: Callable[[], dict[str, float]], right: Callable[[], dict[str, float]], *, pairs: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Runs both sides `pairs` times in turns, each first in every other pair."""
    rows: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            time.sleep(REST_S)
            rows[side].append((left, right)[side]())
        print(f"pair {pair}: {rows[0][-1]['step']:.3f} s, bare {rows[1][-1]['step']:.3f} s", flush=True)
    return rows


def compared(own: list[dict[str, float]], bare: list[dict[str, float]], work: Work) -> dict[str, Any]:
    """The result of some pairs."""
    names = (*PHASES, "step", "call")
    batch = work.section.batch_size
    sides = {"project": own, "bare": bare}
    return {
        "ratio": {name: spread([a[name] / b[name] for a, b in zip(own, bare, strict=True)]) for name in names},
        "samples_per_s": {
            side: round(batch / statistics.median(row["step"] for row in rows), 3) for side, rows in sides.items()
        },
        "seconds": {side: per_phase(rows) for side, rows in sides.items()},
        "all_pairs_step_s": [[round(a["step"], 5), round(b["step"], 5)] for a, b in zip(own, bare, strict=True)],
    }


def main() -> None:
    """Measures one shape and writes the result."""
    parser = work_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tuning", type=int, default=TUNING, help="iterations by which the bare loop picks threads")
    parser.add_argument(
        "--apart", action="store_true", help="all of one side before the other, which takes less memory"
    )
    options = parser.parse_args()
    load = os.getloadavg()
    with work_directory(options.work, prefix="ppo-round-") as directory:
        work = make_work(options.shape, directory, smollm2=options.smollm2, precision=options.precision)
        bare_starts = bare_side(work, tuning=options.tuning)
        own_starts = recipe_side(work, directory / options.shape)
        if options.apart:
            with bare_starts as bare:
                bare.warm_up()
                bare_rows = repeated(bare.iteration, options.pairs)
            with own_starts as own:
                repeated(own.iteration, WARMUP)
                own_rows = repeated(own.iteration, options.pairs)
        else:
            with bare_starts as bare, own_starts as own:
                bare.warm_up()
                repeated(own.iteration, WARMUP)
                own_rows, bare_rows = interleave(own.iteration, bare.iteration, pairs=options.pairs)
        measured = {
            **compared(own_rows, bare_rows, work),
            "interleaved": not options.apart,
            "bare_threads": bare.threads,
            "warmup": WARMUP,
        }
        config = {**work.described(), "roles": own.context.config.roles.model_dump(mode="json")}
    print({name: value["median"] for name, value in measured["ratio"].items()}, flush=True)
    write_result(options.result or RESULTS / f"ppo_round_{options.shape}.json", measured, config=config, load=load)


if __name__ == "__main__":
    main()
