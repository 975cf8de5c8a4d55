"""Errors that speak to the person who wrote the recipe or the data: printed without a traceback, exit status 2."""


class InputError(Exception):
    """Something that was given (a recipe, a file, a row, a model folder) cannot be used.

    The message names the file and the row or key, says what was expected, and what to do.
    """


class BadRow(InputError):
    """A row of the data that cannot be trained on.

    Args:
        row: where the row comes from, as ``file:number``.
        reason: what is wrong with it and what to do. None: ``row`` is a worker's traceback, from which the message is
            taken: a DataLoader makes the exception anew from that text alone.
    """

    def __init__(self, row: str, reason: str | None = None):
        if reason is None:
            row, _, reason = row.rpartition("BadRow: ")[2].strip().partition(": ")
        super().__init__(f"{row}: {reason}")
        self.row, self.reason = row, reason

    def __reduce__(self):  # DataLoader workers send exceptions between processes
        return BadRow, (self.row, self.reason)
