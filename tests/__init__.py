"""Tests mirror the packages; bench/ holds the benchmarks."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
