"""What a selector's reasons mean, in words: why an interval is where it is."""

REASONS = {
    "ok": "Both ends found: structure had settled at the start, and the preference was nearly gained at the end.",
    "fixed": "The interval that the configuration names.",
    "schedule": "By the log-SNR of the steps alone; nothing is sensed.",
    "previous": "Decided before the rollout, from what earlier rollouts had shown.",
    "clamped:no_end": "The preference never settled for long enough: the latest end that is allowed.",
    "clamped:max_end": "The end found lay too near the picture: the latest end that is allowed.",
    "clamped:max_len": "The interval found was longer than selector.max_fraction of the steps: cut there.",
    "fallback:short": "A rollout of fewer than 4 steps is trained whole.",
    "fallback:no_snr": "No step lies in the range of log-SNR that the rule looks for.",
    "fallback:nonfinite": "No sample had curves that are finite throughout.",
    "fallback:constant_f": "The structure did not change along the rollout.",
    "fallback:no_start": "The structure had not settled in the steps that may be a start.",
    "fallback:first": "Nothing was known yet: no earlier rollout has been sensed.",
    "fallback:no_gain": "The preference gained nothing after the start, so only the end fell back.",
}
INSTEAD = "The interval of selector.fallback, or by log-SNR, was taken instead."
MEMORY = "The average of the prompt's earlier intervals was taken instead."
_WHOLE = ("fallback:short", "fallback:no_gain")
"""Fallbacks that say themselves what was taken."""


def in_words(reason: str) -> str:
    """The meaning of a reason of AdaScope's, empty for one of another selector's."""
    if (known := REASONS.get(reason.removesuffix(":memory"))) is None:
        return ""
    if reason.endswith(":memory"):
        return f"{known} {MEMORY}"
    return f"{known} {INSTEAD}" if reason.startswith("fallback") and reason not in _WHOLE else known
