"""Trains small groups of a base and its real RL and SFT experts.

`python -m benchmarks.experts --out DIR --group small` trains a base and its experts; the base and
RL experts of that group are bundled (`resmerge_stream/experts`). docs/quality.md says what came
out, README.md beside this file what was tried.
"""
