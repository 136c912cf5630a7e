"""Scripts that measure duet; `make bench` runs them all and writes docs/benchmarks.md."""
