"""transformers' architectures, small, merged for real: what merges and what does not.

``python -m tests.zoo`` tries them all and writes ``docs/models.md``; with ``--adapters``, LoRA
adapters of them all against PEFT's own merge.
"""
