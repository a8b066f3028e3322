"""What merging does to small RL experts: `python -m benchmarks.quality` writes a page of docs.

`groups` finds or trains the experts, `merges` merges them, `asking` asks every model the same
held-out prompts, `studies` says which merges are asked, `results` reads the answers as accuracies,
`tables` and `figures` show them, and `page` puts them into `page.md`, where the words are.
"""
