"""Targets and searches over a store's rows: exact scans, fisher, fusion of benchmarks."""
