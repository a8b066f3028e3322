"""Starts the server with everything closed that a Space does not need."""

import gradio as gr

from .service import Service
from .settings import Settings, read_settings
from .ui import CSS, build_page


def launch(settings: Settings | None = None, *, block: bool = True, port: int | None = None) -> str:
    """Build the app and serve it; return its address.

    Args:
        settings: from the environment when None.
        block: whether to serve until interrupted.
        port: any free one from 7860 when None.
    """
    service = Service.of(settings or read_settings())
    app = build_page(service)
    try:
        _, address, _ = app.launch(
            theme=gr.themes.Soft(primary_hue="amber", neutral_hue="gray"),
            css_paths=[CSS],
            server_port=port,
            mcp_server=True,
            run_history=False,  # it would keep what is typed here in the browser
            allowed_paths=[],
            max_file_size="1kb",  # nothing is uploaded here
            strict_cors=True,
            ssr_mode=False,
            show_error=False,
            quiet=True,
            prevent_thread_lock=not block,
        )
    finally:
        if block:
            service.jobs.close()
    return str(address)
