"""The error that a wrong configuration raises, in the pipeline and in the trainer."""


class ConfigError(ValueError):
    """The configuration is wrong; the message says what, where, and what to do."""
