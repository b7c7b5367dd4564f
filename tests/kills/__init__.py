"""Runs of every verb and both training stages, killed, stopped, starved of disk and run twice, then run again.

`python -m tests.kills --kills 100` kills at random moments; each run is then repeated until it is finished, and must
end in the bytes of an undisturbed one. What it found is in `results.json`.
"""
