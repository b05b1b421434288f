"""The one exception that is a message to the user."""


class UserError(Exception):
    """Something that the user can mend: the text is one line that says what is wrong, where, and what to do."""


def one_line(text: object, limit: int = 300) -> str:
    """Return ``text`` printable on one line: control characters (a line break in a file name, say) are escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"
