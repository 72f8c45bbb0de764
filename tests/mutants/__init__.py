"""Mutation testing: does a test notice when one expression of the program is wrong?

`make mutants` runs `python -m mutants`. A mutant is one function with one change (`mutations`). What each test reaches
is measured once, and again when its file changes (`reach`). Then every mutant is tried in a forked process, whose
function has the changed code, with the tests that reach the changed line, the narrowest first (`trial`). The drawn
sample depends on the seed and the program only, and results are kept, so that a run that was ended goes on where it
was; `--again` tries the survivors again, after tests were added.

Only code in functions is changed, and only tests that run in the same process notice: what runs at import (tables of
operations and conditions), and servers and agents as processes of their own, are not seen.
"""
