"""Harnesses that break a small sweep on purpose and check what is left; used by test_torture.py and scripts/torture.py.

Every harness is a function run(base, seed, ...) -> scene.Report: `base` an empty folder, `seed` of all that is random.
"""
