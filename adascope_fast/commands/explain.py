"""`adascope-fast explain`: kernel or reference, and why."""


def explain() -> None:
    """Say which implementation serves each operation here, and why."""
    from adascope_fast import ops

    for name, reason in ops.explain().items():
        print(f"{name:30} {reason}")
