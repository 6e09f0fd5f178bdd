"""Figures, side by side with others in one run: `make bench`. See `docs/benchmarks.md`."""
