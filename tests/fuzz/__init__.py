"""Fuzzing of everything that reads a dataset: an attacker who writes all of its files, with valid seals and digests.

::

    honest material (seeds.py) -> mutators (mutate.py) -> forged file with right digests (parquet_forge.py, zarr_forge.py),
        or forged streams (stream_forge.py)
        -> reader -> refused with IntegrityError or InputError, or accepted and every invariant holds (targets.py)

Each case is a function of (seed, number) alone and runs in a worker process (worker.py) under limits of memory and CPU time;
whatever opens a file, imports, executes or connects within a case is a failure, and so is the death of the worker. There alone
compiled loops check every index: one that is out of bounds is an IndexError, and a failure too.

    python -m tests.fuzz --cases 1000000 --seed 1
    python -m tests.fuzz --seed 1 --case 4711        # one case again, with its traceback
"""
