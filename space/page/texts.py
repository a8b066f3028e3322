"""Fixed texts of the page."""

from ..view.words import esc

TITLE = (
    "<h1>ResMerge Stream</h1>"
    "<p>Merge language models that reinforcement learning made out of one base. From the Hub to "
    "the Hub, one tensor at a time. "
    '<a href="https://arxiv.org/abs/2606.02252" target="_blank" rel="noopener">The method</a></p>'
)

FROM_CODE = """\
Everything here works from code too, with the same limits. A merge started here can be followed
there, and the other way round. The endpoints are `/methods`, `/plan`, `/merge`, `/status`,
`/cancel` and `/report`; “Use via API” at the foot of the page describes each.

**Python**

```python
import time
from gradio_client import Client

space = Client("namespace/this-space", oauth_token="hf_…")  # your own token, which may write
recipe = {
    "base_model": "org/base",
    "models": [{"model": "org/math"}, {"model": "org/code"}],
}
plan = space.predict(recipe=recipe, api_name="/plan")
print(plan["problems"], plan["read_bytes"], plan["seconds_estimate"])
job = space.predict(recipe=recipe, push_to="me/merged", private=True, api_name="/merge")["job"]
going_on = ("queued", "planning", "running")
while (now := space.predict(job=job, api_name="/status"))["state"] in going_on:
    print(f"{now['progress']:.0%}", now["message"])
    time.sleep(5)
print(now["state"], now["url"] or now["message"])
```

**curl**

```sh
URL=https://namespace-this-space.hf.space
curl -s $URL/gradio_api/call/v2/plan -H 'Content-Type: application/json' -d '{
  "recipe": {"base_model": "built-in/base",
             "models": [{"model": "built-in/rl-add"}, {"model": "built-in/rl-sort"}]}}'
# {"event_id": "…"}; the answer is in the stream of that event:
curl -sN $URL/gradio_api/call/plan/EVENT_ID
```

With an account, put `"oauth_token": "hf_…"` beside `recipe`.

**MCP**: `…/gradio_api/mcp/`, with the header `x-hf-token: hf_…` for what needs an account.

**Terminal**

```sh
resmerge-stream merge --base org/base --expert org/math --expert org/code --push-to me/merged
```
"""


def step(number: int, title: str, note: str) -> str:
    """Return the heading of one step of the work."""
    soft = f'<p class="rm-soft">{esc(note)}</p>' if note else ""
    return (
        f'<div class="rm-step"><h2><i aria-hidden="true">{number}</i>{esc(title)}</h2>{soft}</div>'
    )
