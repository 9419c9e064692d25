"""HTML as a browser would take it: tags, attributes, and the text of each cell. What is not closed is an error."""

from html.parser import HTMLParser

TAGS = {"table", "thead", "tbody", "tr", "th", "td", "b", "bdi", "br", "mark", "p"}


class Parsed(HTMLParser):
    """All tags and attributes of a page, its text without tags, and that inside each kind of tag."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.inside: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "br":
            self.handle_data("\n")
            return
        self._open.append(tag)
        self.inside.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"{tag} was not open"
        assert self._open.pop() == tag, f"{tag} was not the last that was opened"

    def handle_data(self, data: str) -> None:
        self.text += data
        for tag in set(self._open):
            self.inside[tag][-1] += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    handle_decl = handle_pi = unknown_decl = handle_comment


def parsed(page: str) -> Parsed:
    """The page, if a notebook may show it: known tags, only styles that fetch nothing and choose no colour."""
    found = Parsed(page)
    assert set(found.tags) <= TAGS, set(found.tags) - TAGS
    assert {name for name, _ in found.attributes} <= {"style"}
    for _, style in found.attributes:
        assert style is not None
        assert not any(word in style for word in ("url", "import", "expression", "color", "background", "\\")), style
    return found
