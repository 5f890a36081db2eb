"""The errors users meet. Each message says what was wrong, where, and what to do."""


class RespecError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(RespecError):
    """The configuration, or something it points to, cannot work. Raised before any process group exists."""


class DataError(ConfigError):
    """A data set is missing, empty or malformed; names the file and the line."""


class EngineError(RespecError):
    """The rollout engine refused a request, died, or did not answer in time."""


class ResyncError(RespecError):
    """Weights did not reach the engine as sent."""


class TrainingError(RespecError):
    """Training cannot go on: for example too many steps in a row with non-finite losses or gradients."""


class UnsupportedVersionError(RespecError):
    """A shim met a version of a library that it was not written for."""
