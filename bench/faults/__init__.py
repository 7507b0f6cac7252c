"""Faults put into real runs of the embedded model, from the outside: `python -m bench.faults.run`."""
