"""The library's messages in a page's words."""

import re

# What the library says to somebody at a terminal, for somebody at a page. In this order.
_WORDS = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r" Nor is there a folder \S+ here\.", ""),
        (r" \(HF_TOKEN, or 'hf auth login'\)", ""),
        (r"[Ll]og in\s+again with 'hf auth login', or set HF_TOKEN\.", "Sign in again."),
        (r"[Ll]og in with 'hf auth login', or set HF_TOKEN to\s+a token that may write", "sign in"),
        (r"Log in again\b", "Sign in again"),
        (r"A new login and the same command continue it", "Signing in again continues it"),
        (r"Run\s+that command again to finish it", "Continue that job to finish it"),
        (r"(?:The same command continues|[Rr]un this again)\b", "Continue the job"),
        (r"run the same command again", "continue the job"),
        (r"\bthe same command\b", "the same job"),
        (r"Leave --out away to publish it", "Publish it under another name"),
        (r"give --out DIR or --push-to NAMESPACE/NAME", "name the repository"),
        (r"name the output with --out or --push-to", "name the repository below the recipe"),
        (
            r"give a recipe file, or --base ID and at least one --expert ID",
            "name a base and an expert",
        ),
        (r"Give a YAML file, or --base and --expert", "Paste a YAML recipe, or fill the form"),
        (r"(another|with another) (?:--push-to|--out)\b", "another name"),
        (r"--push-to(?: '[^']*')? is not", "the target is not"),
        (r"--(?:push-to|out)\b", "the target"),
        (
            r"(?:or )?give --update to replace\s+the model there",
            "or tick “Replace the model that stands there”",
        ),
        (r"run again with --update", "tick “Replace the model that stands there” and merge again"),
        (r"--update (replaces|removes)", r"“Replace the model that stands there” \1"),
        (r"--update\b", "“Replace the model that stands there”"),
        (r"give --public to name them", "publish it as public to name them"),
        (
            r"(?:remove (?:it|them)|start afresh) with --discard-staging",
            "use “Remove what it left” on its job",
        ),
        (r"--discard-staging\b", "“Remove what it left”"),
        (r"a smaller --max-shard-size, another --work-dir, or --max-disk 0", "a smaller file size"),
        (
            r"a smaller --max-shard-size, or --max-disk 0 to send shards without any file",
            "a smaller file size",
        ),
        (r"--max-shard-size\b", "the file size"),
        (r"--max-disk(?: \w+)?\b|--work-dir\b", "this machine's disk"),
        (r"--tokenizer-from\b", "“Tokenizer from”"),
        (r"Give --memory-budget.*?(?=\.|$)", "Use larger hardware"),
        (r"--memory-budget allows", "the memory budget is"),
        (r"--device \S+: ", ""),
        (r"Use --device cpu, or auto", "Use hardware that has one"),
        (r"--device\b", "the device"),
        (r"--dtype\b", "the output type"),
        (r"--rounding\b", "the rounding"),
    )
)


def in_page_words(text: str) -> str:
    """Return what the library says, without the command line's options."""
    for pattern, words in _WORDS:
        text = pattern.sub(words, text)
    return text
