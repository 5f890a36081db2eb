"""Version checks for shims: they change internals of libraries, so each accepts only the version it was written for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from respec_trainer.errors import UnsupportedVersionError


def require_version(distribution: str, wanted: str, why: str) -> None:
    """Raise UnsupportedVersionError unless `distribution` is installed at `wanted`; "+cpu" and the like do not count.

    Args:
        distribution: its name for pip, such as "megatron-core".
        wanted: the exact public version, such as "0.16.1".
        why: the part that depends on it, to complete "... is needed by".
    """
    try:
        found = version(distribution)
    except PackageNotFoundError:
        raise UnsupportedVersionError(
            f"{distribution} is not installed; {distribution}=={wanted} is needed by {why}"
        ) from None
    if found.partition("+")[0] != wanted:
        raise UnsupportedVersionError(
            f"{distribution} {found} is installed, but {distribution}=={wanted} is needed by {why}; "
            f"install it, or carry the shim over to {found} and change the version it names"
        )
