"""Damages inputs at random and checks that every run ends with rows or a sentence: no traceback, no hang, no lost row.

    python -m tests.fuzz --cases 10000 --save    # what `make test-long` runs
    python -m tests.fuzz --only tar:17           # one case again

`mutations` damages bytes, `targets` are the kinds of inputs and what must hold for each, `__main__` runs them in
processes that it can kill. tests/test_fuzz.py runs a few cases of each kind.
"""
