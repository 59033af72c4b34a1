"""The paper's results, each by one command: `sadp-fast study NAME`; see docs/studies.md.

command (options) -> plan (what to run) -> store (finished runs) -> one file for each study -> summary (the report).
"""
