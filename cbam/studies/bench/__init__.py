"""What attention costs: first a correctness check, then alternating timings against other implementations."""
