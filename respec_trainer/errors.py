"""The errors that users see. Each message states what is wrong, where, and what to do."""


class RespecError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(RespecError):
    """The configuration, or a file that it names, cannot work. Raised before any process group exists."""


class DataError(ConfigError):
    """A data set is missing, empty or malformed. The message names the file and the line."""


class EngineError(RespecError):
    """The rollout engine refused a request, died, or did not answer in time."""


class EngineLostError(EngineError):
    """Engines died. Raised on every rank, so that all can restart the engines together or end the run in order."""


class ResyncError(RespecError):
    """Weights did not reach the engine as they were sent."""


class ProofError(ResyncError):
    """An engine holds other weights than were sent, or computes other log-probs. Its samples are not the actor's."""


class TransferError(ResyncError):
    """The connection to an engine broke, or was too slow, while weights were on their way."""


class RewardError(RespecError):
    """A reward failed or returned an invalid value. The message names the reward, the sample and the value."""


class TrainingError(RespecError):
    """Training cannot continue: for example too many steps in a row with non-finite losses or gradients."""


class CheckpointError(RespecError):
    """A checkpoint could not be written. Earlier checkpoints are unchanged."""


class AuditError(RespecError):
    """Samples do not follow the policy's distribution."""


class UnsupportedVersionError(RespecError):
    """A library has another version than the shim for it was written for."""
