"""The one exception for what the user can put right."""

from __future__ import annotations

__all__ = ["UserError", "one_line"]


class UserError(Exception):
    """A mistake in a config, a path or a command: shown as one line, exit code 2, nothing written.

    The message says where, what is wrong, and the cure, and holds no line break.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        """Keep the message on one line, whatever a library put into it.

        Args:
            message: where, what, and the cure.
            everywhere: all processes of a job raise it alike, so the first may speak for them.
        """
        super().__init__(one_line(message))
        self.everywhere = everywhere


def one_line(text: object, limit: int = 600) -> str:
    """Return the text with every run of white space as one blank, cut at `limit` characters."""
    flat = " ".join(str(text).split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."
