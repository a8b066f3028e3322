"""Train small groups of a base and its real RL and SFT experts, for benchmarks and the demo.

`python -m benchmarks.experts --out DIR --group small` trains a base and its experts;
docs/log.md says what came out of the first run.
"""
