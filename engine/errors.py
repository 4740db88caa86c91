"""The engine's exceptions. Expected outcomes are values instead.

Not here: a setting, or a model's configuration, that is not allowed is kvc2.errors.InvalidConfig,
as in the daemon.
"""


class EngineError(Exception):
    """What every error that the engine raises on purpose derives from."""


class CheckpointError(EngineError):
    """A model directory whose files don't hold what its configuration promises."""


class InvalidRequestError(EngineError):
    """A request that the served model can't compute. Names the field, its value and what is
    allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} = {value}: {allowed}")
        self.field = field


class ContextLengthError(InvalidRequestError):
    """Its prompt and answer together are longer than the engine can hold."""

    def __init__(self, prompt_tokens: int, max_tokens: int, context_tokens: int) -> None:
        asked = f"{prompt_tokens} of prompt and {max_tokens} to generate"
        super().__init__("tokens", asked, f"at most {context_tokens} together fit this engine")


class EngineFailedError(EngineError):
    """The engine can compute nothing any more; only a new process can."""
