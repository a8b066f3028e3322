"""Starts the server with everything closed that a Space does not need."""

import gradio as gr

from .gate import address_with, gate, new_key
from .identity import has_login
from .page.news import News
from .page.ui import CSS, build_page
from .service import Service
from .settings import Settings, read_settings

# The Hub's typeface where it is installed; nothing is fetched for it.
_FONTS = ("Source Sans Pro", "Source Sans 3", "ui-sans-serif", "system-ui", "sans-serif")
_MONO = ("IBM Plex Mono", "ui-monospace", "SFMono-Regular", "monospace")


def theme() -> gr.themes.Base:
    """Return the Hub's look: white, grey lines, amber for what is to be done; dark as well."""
    look = gr.themes.Default(primary_hue="amber", neutral_hue="gray", font=_FONTS, font_mono=_MONO)
    return look.set(
        body_background_fill="white",
        body_background_fill_dark="*neutral_950",
        block_label_text_weight="600",
        block_title_text_weight="600",
        block_shadow="none",
        block_border_color="*neutral_200",
        block_radius="8px",
        button_primary_background_fill="*primary_400",
        button_primary_background_fill_hover="*primary_500",
        button_primary_text_color="#241900",
        button_primary_background_fill_dark="*primary_500",
        button_primary_text_color_dark="#241900",
        button_primary_background_fill_hover_dark="*primary_400",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_background_fill_hover_dark="#991b1b",
        button_cancel_text_color="white",
        button_cancel_text_color_dark="white",
        # 4.5:1 on white, as small grey text must have.
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        link_text_color="#1d4ed8",
        link_text_color_dark="#93c5fd",
    )


def launch(settings: Settings | None = None, *, block: bool = True, port: int | None = None) -> str:
    """Build the app and serve it; return its address.

    Args:
        settings: from the environment when None.
        block: whether to serve until interrupted.
        port: any free one from 7860 when None.
    """
    key = new_key()
    service = Service.of(settings or read_settings())
    news = News(service)
    app = build_page(service, news)
    try:
        _, address, _ = app.launch(
            theme=theme(),
            css_paths=[CSS],
            server_port=port,
            app_kwargs={
                "routes": [news.route(), service.downloads.route()],
                "middleware": gate(key),
            },
            mcp_server=True,
            run_history=False,  # it would keep what is typed here in the browser
            allowed_paths=[],
            max_file_size="1kb",  # nothing is uploaded here, see gate.py
            # A call from code is a session of its own for gradio, which keeps a description of the
            # whole page for each, 0.7 MB; no session has anything that the browser has not.
            state_session_capacity=64,
            max_threads=80,  # more than may wait for a plan
            strict_cors=True,
            ssr_mode=False,
            show_error=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        address = address_with(address, key) if has_login() else str(address)
        if block:
            service.planners.warm()
            print(f"ResMerge Stream is at {address}", flush=True)
            app.block_thread()
    finally:
        if block:
            service.close()
    return address
