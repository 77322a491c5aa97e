"""The errors a user can meet: each message is one sentence that says what was wrong and what to do."""


class FluxChatError(Exception):
    """Base of every error that a wrong input, file or setting can cause."""


class VideoError(FluxChatError):
    """A video or image cannot be read, or breaks a limit."""


class CheckpointError(FluxChatError):
    """A weight file does not fit the model it is loaded into."""


class BudgetError(FluxChatError):
    """A token budget that cannot be met."""


class ContextError(BudgetError):
    """A conversation, its videos and the answer are longer than the language model's context."""


class ModelError(FluxChatError):
    """A language model, tokenizer, adapter or saved model cannot be loaded or used."""


class OutOfMemory(ModelError, MemoryError):
    """The memory of the machine or the card does not suffice for a question."""


class ConfigError(FluxChatError):
    """A recipe or configuration names an unknown key, a wrong type or an impossible combination."""


class DataError(FluxChatError):
    """Training or evaluation data is missing or malformed."""
