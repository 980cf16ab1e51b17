"""Whether a plan, a profile and a model belong together: their fingerprints say so."""

from allocator.plans import Plan


class ArtefactMismatch(Exception):
    """Two artefacts that must belong together do not: their fingerprints differ."""


def check_same_model(plan: Plan, model_fingerprint: str, model_name: str) -> None:
    """Checks that a plan was made for a model.

    Raises:
        ArtefactMismatch: If it was made for another.
    """
    expected = plan.provenance.get("model_fingerprint")
    if expected != model_fingerprint:
        msg = (
            f"a plan must be used with the model it was made for: got a plan for '{plan.provenance.get('model')}' "
            f"({str(expected)[:12]}) and the model '{model_name}' ({model_fingerprint[:12]}). Plan for this model, "
            "or name the other one."
        )
        raise ArtefactMismatch(msg)


def check_same_profile(profile_model: str, model_fingerprint: str, model_name: str) -> None:
    """Checks that a profile was measured on a model.

    Args:
        profile_model: Fingerprint of the model that the profile was measured on.
        model_fingerprint: Fingerprint of the model at hand.
        model_name: Its name.

    Raises:
        ArtefactMismatch: If it was measured on another.
    """
    if profile_model != model_fingerprint:
        msg = (
            f"a profile must be used with the model it was measured on: got one of {profile_model[:12]} and the model "
            f"'{model_name}' ({model_fingerprint[:12]}). Measure this model, or name the other one."
        )
        raise ArtefactMismatch(msg)
