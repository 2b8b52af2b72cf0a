"""Measurements: `python -m bench --help`. Every way to do a thing must first give the same answer; then it is timed."""
