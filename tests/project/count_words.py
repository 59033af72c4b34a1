"""Counts the words of Markdown files outside of tables and code blocks, and the words of their sentences.

`python tests/project/count_words.py FILE...` prints of each file its words, the median sentence and the longest one.
"""

from __future__ import annotations

import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

_MARKDOWN = MarkdownIt().enable("table")
_WORD = re.compile(r"\S*\w\S*")
# A sentence ends at a mark before a space and what begins another one.
_END = re.compile(r"(?<=[.!?])[\"')`*]*\s+(?=[\"'(\[]*[A-Z0-9`])")


@dataclass
class Document:
    """What a Markdown file holds.

    Attributes:
        sentences: of its paragraphs and lists; a heading is none, and a paragraph without an end is one.
        words: of these and of its headings; what is in tables and code blocks does not count.
        links: where its links and images lead.
        code: its code blocks, each behind the name of its language.
    """

    sentences: list[str] = field(default_factory=list)
    words: int = 0
    links: list[str] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Words of each sentence."""
        return [count(sentence) for sentence in self.sentences]


def count(text: str) -> int:
    """Words: what stands between spaces and holds a letter or a digit."""
    return len(_WORD.findall(text))


def read(text: str) -> Document:
    """What a Markdown text holds."""
    document, inside = Document(), []
    for token in _MARKDOWN.parse(text):
        if token.nesting == 1:
            inside.append(token.type.removesuffix("_open"))
        elif token.nesting == -1:
            inside.pop()
        elif token.type in ("fence", "code_block"):
            document.code.append((token.info.strip(), token.content))
        elif token.type == "inline":
            document.links += [str(value) for child in _all(token) for value in _target(child)]
            if "table" not in inside:
                prose = "".join(_prose(child) for child in token.children or [])
                document.words += count(prose)
                if "heading" not in inside:
                    document.sentences += [part for part in _END.split(prose) if count(part)]
    return document


def _all(token: Token) -> list[Token]:
    children = token.children or []
    return children + [grandchild for child in children for grandchild in _all(child)]


def _target(token: Token) -> list[str | int | float]:
    name = {"link_open": "href", "image": "src"}.get(token.type)
    return [] if name is None else [token.attrs[name]]


def _prose(token: Token) -> str:
    if token.type in ("softbreak", "hardbreak"):
        return " "
    if token.type == "code_inline":
        return f"`{token.content}`"
    return "" if token.type == "image" else token.content


def main(paths: list[Path]) -> None:
    for path in paths:
        document = read(path.read_text())
        longest = max(document.sentences, key=count, default="")
        median = statistics.median(document.lengths or [0])
        print(f"{path}: {document.words} words, {len(document.sentences)} sentences of {median:g} words (median)")
        print(f"  the longest has {count(longest)}: {longest}")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
