"""A model card as a page that opens without a server: its images are within, raw HTML is shown as text."""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markupsafe import Markup


def templates(*folders: Path, **options) -> jinja2.Environment:
    """The templates of these folders; a name that nobody gives them is an error."""
    loader = jinja2.FileSystemLoader(folders)
    return jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )


def card_page(folder: Path, repo_id: str) -> str:
    """README.md of a folder that is to be published, as HTML."""
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    scroll = '<div class="scroll" tabindex="0">'
    markdown.add_render_rule("table_open", lambda self, *token: scroll + self.renderToken(*token))
    markdown.add_render_rule("table_close", lambda self, *token: self.renderToken(*token) + "</div>\n")
    tokens = markdown.parse(card.text)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                data = base64.b64encode((folder / str(child.attrGet("src"))).read_bytes()).decode("ascii")
                child.attrSet("src", f"data:image/png;base64,{data}")
    environment = templates(*Path(__file__).parents[:2], autoescape=True)
    return environment.get_template("card_page.html").render(
        title=repo_id,
        repo_id=repo_id,
        metadata=card.data.to_yaml(),
        card=Markup(markdown.renderer.render(tokens, markdown.options, {})),
    )
