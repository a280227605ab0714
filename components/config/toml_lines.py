"""Where each key of a TOML text stands: key path → line number, for error messages and provenance.

tomli stays the authority for values and syntax; it gives no positions, so this scanner walks a text that tomli has
already accepted, and only has to find where keys begin. Rejected: tomlkit (slow to import, a second authority for
values) and searching the text for the key's name (wrong as soon as a string or a second table contains it).
"""

import re

import tomli

Path = tuple[str | int, ...]
"""A key path: names, and the index in an array of tables or in an array."""

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\r\n]*")
_BASIC = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_LITERAL = re.compile(r"'[^'\n]*'")
# A closing triple quote may be preceded by one or two quotes that belong to the string.
_LONG_BASIC = re.compile(r'"""(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}', re.DOTALL)
_LONG_LITERAL = re.compile(r"'''(?:[^']|'{1,2}(?!'))*'{3,5}", re.DOTALL)


def key_lines(text: str) -> dict[Path, int]:
    """Line (from 1) of every key path of `text`, of the tables on the way to it and of the elements of arrays.

    `text` must be TOML that tomli accepts. A table that is mentioned several times has the line of its first mention.
    """
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.lines: dict[Path, int] = {}
        self.counts: dict[Path, int] = {}  # array of tables → number of its elements so far
        self._line, self._counted = 1, 0

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        self._skip(_BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)
        return self.lines

    def _header(self) -> Path:
        """`[a.b]` or `[[a.b]]`; returns the path of the table that it opens."""
        line, double = self._here(), self.text.startswith("[[", self.at)
        self.at += 2 if double else 1
        *parents, last = self._key()
        self.at += 2 if double else 1
        path = self._walk((), parents, line)
        if not double:
            return self._walk(path, [last], line)
        path = (*path, last)
        self.lines.setdefault(path, line)
        self.counts[path] = self.counts.get(path, 0) + 1
        path = (*path, self.counts[path] - 1)
        self.lines[path] = line
        return path

    def _pair(self, table: Path) -> None:
        """`key = value` inside `table`."""
        line = self._here()
        path = self._walk(table, self._key(), line)
        self.at += 1  # the equals sign
        self._skip(_SPACE)
        self._value(path)

    def _walk(self, path: Path, names: list[str], line: int) -> Path:
        """Go down from `path`, into the latest element of each array of tables on the way."""
        for name in names:
            path = (*path, name)
            self.lines.setdefault(path, line)
            if path in self.counts:
                path = (*path, self.counts[path] - 1)
        return path

    def _key(self) -> list[str]:
        """A dotted key, up to the character after it and its spaces."""
        names: list[str] = []
        while True:
            self._skip(_SPACE)
            names.append(self._key_part())
            self._skip(_SPACE)
            if self.text[self.at] != ".":
                return names
            self.at += 1

    def _key_part(self) -> str:
        for pattern in (_BASIC, _LITERAL):
            if match := pattern.match(self.text, self.at):
                self.at = match.end()
                return tomli.loads(f"key = {match[0]}")["key"]
        match = _BARE_KEY.match(self.text, self.at)
        if match is None:  # not TOML after all; the caller asked tomli first
            raise ValueError(f"no key at character {self.at}")
        self.at = match.end()
        return match[0]

    def _value(self, path: Path) -> None:
        opening = self.text[self.at]
        if opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline_table(path)
        else:
            self._scalar()

    def _array(self, path: Path) -> None:
        self.at += 1
        self._skip(_BLANK)
        index = 0
        while self.text[self.at] != "]":
            self.lines[(*path, index)] = self._here()
            self._value((*path, index))
            index += 1
            self._separator()
        self.at += 1

    def _inline_table(self, path: Path) -> None:
        self.at += 1
        self._skip(_BLANK)
        while self.text[self.at] != "}":
            self._pair(path)
            self._separator()
        self.at += 1

    def _separator(self) -> None:
        self._skip(_BLANK)
        if self.text[self.at] == ",":
            self.at += 1
            self._skip(_BLANK)

    def _scalar(self) -> None:
        for pattern in (_LONG_BASIC, _LONG_LITERAL, _BASIC, _LITERAL):
            if match := pattern.match(self.text, self.at):
                self.at = match.end()
                return
        self._skip(_SCALAR)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def _here(self) -> int:
        """Line of the current character; counted on, since the scanner only moves forward."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line
