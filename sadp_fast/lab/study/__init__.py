"""The paper's results, each by one command: `sadp-fast study NAME`; see docs/studies.md.

command (options) -> plan (what is to be run) -> runs (run it, or take it from the store of finished ones) -> a module
for each study (registry lists them) -> markdown (the report of all). deadline and progress watch the runs; figures
holds what plots and tables are made of; training_runs, and trajectory with measure, what several studies read.
"""
