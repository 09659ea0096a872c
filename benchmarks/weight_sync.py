"""Seconds and GB/s of a weight sync, trainer to engine through Ray's object store.

    python benchmarks/weight_sync.py testbed
    python benchmarks/weight_sync.py 3.8m
    python scripts/fetch_smollm2.py models/smollm2 && python benchmarks/weight_sync.py smollm2 --smollm2 models/smollm2

Options: [--repeats 20] [--precision bf16] [--work DIR] [--result FILE]; `tiny --repeats 2` tries the
script out. Run it on an idle machine.

What `recipe.engines.sync_weights` takes as the driver sees it, and of that: `export` (parameters as arrays into the
object store), `transfer` (out of the object store, in the engine's process), `load` (into the engine's
own layout); the rest is calls between processes. GB/s are bytes of the policy's parameters over seconds of the whole.
Writes benchmarks/results/weight_sync_SHAPE.json.
"""

import os
import statistics

from measuring import RESULTS, per_phase, spread, work_directory, write_result
from ppo_work import make_work, num_bytes, work_parser
from recipe_side import recipe_side

PARTS = ("export", "transfer", "load")
WARMUP = 3


def main() -> None:
    """Measures one shape and writes the result."""
    parser = work_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    load = os.getloadavg()
    with work_directory(options.work, prefix="weight-sync-") as directory:
        work = make_work(options.shape, directory, smollm2=options.smollm2, precision=options.precision)
        with recipe_side(work, directory / options.shape, only_sync=True) as own:
            for _ in range(WARMUP):
                own.sync()
            rows = [own.sync() for _ in range(options.repeats)]
        rows = [{**row, "calls": row["sync"] - sum(row[part] for part in PARTS)} for row in rows]
        # Checkpoints are stored in bfloat16.
        size = num_bytes(work.chat) * (1 if work.precision == "bf16" else 2)
        config = {**work.described(), "bytes": size}
    whole = statistics.median(row["sync"] for row in rows)
    measured = {
        "seconds": per_phase(rows),
        "gb_per_s": spread([size / 1e9 / row["sync"] for row in rows]),
        "share": {part: round(statistics.median(row[part] for row in rows) / whole, 3) for part in (*PARTS, "calls")},
        "warmup": WARMUP,
    }
    print({name: value["median"] for name, value in measured["seconds"].items()}, measured["gb_per_s"], flush=True)
    write_result(options.result or RESULTS / f"weight_sync_{options.shape}.json", measured, config=config, load=load)


if __name__ == "__main__":
    main()
