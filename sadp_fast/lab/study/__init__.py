"""The paper's results, each by one command: `sadp-fast study NAME`; see docs/studies.md.

command (options, the order of things) -> plan (what is to be run, and what a folder remembers) -> runs (run it, or take
it from the store of finished ones) -> study (what every study is) -> a module for each study, all of which registry
lists and shows in one report. progress watches the runs: a display and a deadline. measure: scores, exact norms and
sparsity. Tables and plots are made of lab/figures.py.

A new study is a module with QUESTION, asks, parts, draw and tables, and a record in registry.
"""
