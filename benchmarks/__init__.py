"""What mmpeft costs, beside its peers: `python -m benchmarks CASE...`; every case is a file of `benchmarks/cases/`."""
