"""The error that a wrong configuration raises, in the pipeline and in the trainer."""


class ConfigError(ValueError):
    """The configuration is wrong; the message says what, where, and what to do."""


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust panicked: no Exception, and its class has no module."""
    return type(error).__name__ == "PanicException"
