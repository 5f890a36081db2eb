"""The errors users meet. Each message says what was wrong, where, and what to do."""


class RespecError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(RespecError):
    """The configuration, or something it points to, cannot work. Raised before any process group exists."""


class DataError(ConfigError):
    """A data set is missing, empty or malformed; names the file and the line."""


class EngineError(RespecError):
    """The rollout engine refused a request, died, or did not answer in time."""


class EngineLostError(EngineError):
    """Engines died, and every rank knows: they can be started anew, or the run can end in order."""


class ResyncError(RespecError):
    """Weights did not reach the engine as sent."""


class ProofError(ResyncError):
    """An engine does not hold, or does not speak, what was sent. Its samples are not the actor's."""


class TransferError(ResyncError):
    """The connection to an engine broke, or was too slow, while weights were on their way."""


class RewardError(RespecError):
    """A reward failed, or returned what is no reward; names the reward, the sample and the value."""


class TrainingError(RespecError):
    """Training cannot go on: for example too many steps in a row with non-finite losses or gradients."""


class CheckpointError(RespecError):
    """A checkpoint could not be written. Those before it are as they were."""


class AuditError(RespecError):
    """Samples do not follow the policy's law."""


class UnsupportedVersionError(RespecError):
    """A shim met a version of a library that it was not written for."""
