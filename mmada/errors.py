"""What mmada says when the mistake is the user's.

Importing this module is free: a front end may import it before anything heavy.
"""


class DataError(ValueError):
    """Text or tokenizer that cannot be used: missing, empty, unreadable, of the wrong shape.

    The message is one line that names the field, its value and the remedy.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))
