"""Engine "blocks": the main text of a page by a model over its text blocks."""

from stages.extract.blocks.model import load_extractor
from stages.extract.blocks.render import render
from stages.extract.blocks.walk import Blocks
from stages.extract.config import ExtractConfig
from stages.extract.engines import Engine, Extracted, between


def make_blocks(config: ExtractConfig) -> Engine:
    """The engine with its model; ValueError if that cannot be read."""
    model = load_extractor(config.model)
    is_markdown = config.format == "markdown"

    def extract(page: Blocks, html: str, url: str) -> Extracted:
        blocks, confidence = model.select(page, url)
        text, code = render(page, blocks, markdown=is_markdown)
        plain, plain_code = render(page, blocks, markdown=False) if is_markdown else (text, code)
        if not config.rules_see_code:
            plain = "".join(between(plain, plain_code))
        return Extracted(text, confidence, code, None if plain is text else plain)

    return extract
