"""The engine's exceptions: misuse and bad configuration. Expected outcomes are values instead."""


class EngineError(Exception):
    """What every error that the engine raises on purpose derives from."""


class ConfigError(EngineError):
    """A setting or a model that the engine can't run. Names the field, its value and the mend."""

    def __init__(self, field: str, value: object, mend: str) -> None:
        super().__init__(f"{field} = {value!r}: {mend}")
        self.field = field
        self.value = value
        self.mend = mend


class CheckpointError(EngineError):
    """A model directory whose files don't hold what its configuration promises."""
