"""Chat templates by the names that mergekit has for them, written anew in Jinja.

Each writes what mergekit 0.1.5's template of that name writes, blanks and line ends included, so
that a recipe means the same here; a test compares. The formats: ChatML, https://github.com/openai/
openai-python/blob/v0.28.1/chatml.md; Llama 3, its model card; Alpaca, https://github.com/
tatsu-lab/stanford_alpaca; Mistral and EXAONE, the cards of their instruction models.
"""

from collections.abc import Mapping

TEMPLATES: Mapping[str, str] = {
    "chatml": (
        r"{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        r"{% for m in messages %}{{ bos_token if loop.first }}{{ '<|start_header_id|>' ~ m.role ~ "
        r"'<|end_header_id|>\n\n' ~ (m.content | trim) ~ '<|eot_id|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}"
        r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "alpaca": (
        r"{% set system = messages | selectattr('role', 'equalto', 'system') | list %}"
        r"{% set heads = {'user': 'Instruction', 'assistant': 'Response', "
        r"'user_context': 'Input'} %}"
        r"{{ (system | last).content | trim if system else '' }}{{ '\n\n' }}"
        r"{% for m in messages if m.role in heads %}"
        r"{{ '### ' ~ heads[m.role] ~ ':\n' ~ (m.content | trim) }}"
        r"{{ '' if m is sameas(messages[-1]) else '\n\n' }}{% endfor %}"
        r"{% if add_generation_prompt and messages[-1].role != 'assistant' %}"
        r"{{ '### Response:\n' }}{% endif %}"
    ),
    "mistral": (
        r"{% set system = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}"
        r"{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
        r"{{ bos_token }}{% for m in turns %}"
        r"{% if m.role not in ('user', 'assistant') %}"
        r"{{ raise_exception('There are users and assistants, and one system message first.') }}"
        r"{% elif (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        r"{{ raise_exception('Users and assistants must take turns.') }}"
        r"{% elif m.role == 'user' %}"
        r"{{ ' [INST] ' ~ (system if loop.first else '') ~ m.content ~ ' [/INST]' }}"
        r"{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"
    ),
    "exaone": (
        r"{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        r"{{ '        [|system|][|endofturn|]\n\n' }}{% endif %}"
        r"{{ '    [|' ~ m.role ~ '|]' ~ m.content ~ '\n        ' }}"
        r"{{ '\n\n' if m.role == 'user' else '[|endofturn|]\n\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '    [|assistant|]\n' }}{% endif %}"
    ),
}
