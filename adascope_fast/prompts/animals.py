"""The field's 45 common animals, a prompt each: the name alone, as ddpo-pytorch's `simple_animals` has it.

Every fifth is held out, counted in the order of the list: the same on every machine.
"""

_LIST = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo"
)
ANIMALS = tuple(_LIST.split())
HELD_OUT = ANIMALS[4::5]


def captions(split: str) -> list[str]:
    """The prompts of a split: 36 in `"train"`, 9 in `"held_out"`."""
    if split not in ("train", "held_out"):
        raise ValueError(f"an animals split is 'train' or 'held_out', got {split!r}; choose one of them")
    return [name for name in ANIMALS if (name in HELD_OUT) == (split == "held_out")]
