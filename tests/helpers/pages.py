"""HTML pages, parsed and checked."""

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br"}
PICTURE = re.compile(r'src="data:image/(\w+);base64,([^"]+)"')


class Balanced(HTMLParser):
    """Fails on a tag that is not closed, or closed where it was not opened; collects headings and attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.headings, self.attributes = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def checked(page: str) -> Balanced:
    """The parsed page, which must be one file: nothing is loaded, linked or executed."""
    parsed = Balanced(page)
    assert all(value.startswith("data:image/") for name, value in parsed.attributes if name == "src")
    assert not {"href", "srcset", "action", "onload", "onerror"} & {name for name, _ in parsed.attributes}
    assert "<script" not in page and not re.search(r"url\(|@import|https?:", PICTURE.sub("", page))
    assert ("name", "viewport") in parsed.attributes and "prefers-color-scheme: dark" in page and "@media print" in page
    return parsed
