"""The page of all operations: complete, and of itself alone."""

from __future__ import annotations

from html.parser import HTMLParser

from front_end_rig import Rig, settled, with_app

from overcommit.server.app import make_app
from overcommit.server.docs_page import page


class Reader(HTMLParser):
    """Keeps the text of a page, what it is made of, and where it points."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open, self.links = "", set[str](), set[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.add(tag)
        self.links |= {value or "" for name, value in attrs if name in ("src", "href")}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_operation_and_loads_nothing() -> None:
    async def test(rig: Rig) -> None:
        client = rig.connect()
        client.send(b"GET /docs HTTP/1.1\r\nHost: h\r\n\r\n")
        await settled()
        head, _, body = client.written.partition(b"\r\n\r\n")
        assert b"200 OK" in head
        assert b"content-type: text/html" in head
        read = Reader(body.decode())
        assert read.links == {"openapi.json"}
        assert not read.open & {"script", "link", "img", "iframe"}
        assert "url(" not in read.text
        document = make_app(rig).openapi()  # type: ignore[arg-type]
        for path, methods in document["paths"].items():
            for method in methods:
                assert f"{method.upper()}{path}" in read.text
        assert "byte_size" in read.text, "of a body"

    with_app(test)


def test_what_a_document_says_is_text_on_the_page() -> None:
    said = "<script>alert(1)</script>"
    operation = {
        "tags": [said],
        "description": said,
        "parameters": [{"name": said, "in": "query", "schema": {"title": said}}],
        "responses": {"200": {"description": said}},
        "requestBody": {"content": {said: {"schema": {"title": said}}}},
    }
    read = Reader(
        page({"info": {"title": said, "version": "1"}, "paths": {said: {"get": operation}}})
    )
    assert "script" not in read.open
    assert read.text.count(said) == 10
