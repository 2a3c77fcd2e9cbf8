"""A run that failed for a reason outside the user's configuration: exit code 1, with a report."""

from mcore_core.errors import Problem


class RunFailure(Exception):
    """The run stopped; the message says where, what was seen and what to do."""

    def __init__(self, code: str, message: str, *notes: str) -> None:
        super().__init__(message)
        self.problem = Problem(code, message, notes)

    def __str__(self) -> str:
        return str(self.problem)

    def __reduce__(self) -> tuple[type["RunFailure"], tuple[str, ...]]:
        problem = self.problem
        return (type(self), (problem.code, problem.message, *problem.notes))
