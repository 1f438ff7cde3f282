"""The few kinds of failure a user can meet; every message says what, where, and what to do."""

from __future__ import annotations

from typing import ClassVar


class PmdError(Exception):
    """Any failure that is reported to the user as one message, without a traceback."""

    refuses: ClassVar[bool] = False
    """Whether a person has to mend something first: started again, the run would end the same way."""


class ConfigError(PmdError):
    """The configuration is wrong: unknown key, value out of range, numbers that do not divide."""

    refuses = True


class LayoutError(ConfigError):
    """The parallel layout does not fit the number of ranks or the model."""


class DataError(PmdError):
    """A prompt file is empty, malformed or missing; names the file and the line."""

    refuses = True


class ModelError(PmdError):
    """A model folder is incomplete, or a tensor in it is missing or has the wrong shape."""

    refuses = True


class UncountedModel(ModelError):
    """The planner cannot count a model of this family; it may be trained all the same."""


class EngineError(PmdError):
    """A rollout engine did not start, died, or missed a deadline; carries its log's last lines."""


class EngineRefused(EngineError):
    """A rollout engine ends itself at its start because of the settings that it was given."""

    refuses = True


class EnginesLost(EngineError):
    """No engine answers any more; what was sampled before is kept and the rest can be asked for again."""


class RequestRefused(EngineError):
    """An engine will not answer this request, however often it is asked; others it answers."""


class SamplerLost(PmdError):
    """The process that samples ahead has ended; another one can go on from what is known of it."""


class RolloutError(PmdError):
    """A rollout function failed, or responses were lost or counted twice between two iterations."""


class StaleWeights(PmdError):
    """An engine serves other weights than the actor holds."""


class CheckpointError(PmdError):
    """A checkpoint could not be written or read."""


class DamagedCheckpoint(CheckpointError):
    """The files of a checkpoint are not what was written; the next start goes on from the one before."""


class CheckpointLost(CheckpointError):
    """Every checkpoint of the run is damaged: a person has to say whether the run begins anew."""

    refuses = True


class NonFiniteLoss(PmdError):
    """A loss or gradient norm is NaN or infinite; names iteration and step."""


class DeviceFull(PmdError):
    """A phase needs more memory than is free on a device; says who has it, and what takes less."""


class MissingPackage(PmdError):
    """A package that is needed is not installed here; names the extra, or what installs it."""

    refuses = True


class LaunchError(PmdError):
    """A job cannot be submitted, or a node of it cannot take part; names the node."""


class Interrupted(PmdError):
    """The user or the system asked the run to end; it can be resumed."""
