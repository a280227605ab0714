"""Which checkpoints go after a save: `checkpoint.keep_latest_k`. Torch-free."""

from collections.abc import Mapping

from components.checkpoint.manifest import Manifest


def doomed_steps(manifests: Mapping[int, Manifest], keep: int, saved: int) -> list[int]:
    """Steps to delete, the oldest first, given the manifests of all valid checkpoints.

    The newest `keep` stay. So do the one just saved, which need not be among them after a resume from an earlier step,
    and the newest that training can resume from, when newer ones hold only weights.
    """
    newest = sorted(manifests, reverse=True)
    resumable = [step for step in newest if manifests[step].kind == "training"]
    stay = {*newest[:keep], *resumable[:1], saved}
    return sorted({*manifests} - stay) if keep else []
