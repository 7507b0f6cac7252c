"""The field's 45 common animals, a prompt each, and at three activities, as ddpo-pytorch (MIT) has them.

`simple_animals` there is the name alone, `nouns_activities` is "a cat washing the dishes". Every fifth animal is held
out, counted in the order of the list: the same on every machine.
"""

_LIST = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo"
)
ANIMALS = tuple(_LIST.split())
HELD_OUT = ANIMALS[4::5]
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")


def captions(split: str) -> list[str]:
    """The prompts of a split: 36 in `"train"`, 9 in `"held_out"`."""
    return _of("animals", split)


def at_activities(split: str) -> list[str]:
    """Each animal of a split at each activity: 108 in `"train"`, 27 in `"held_out"`, whose animals are others."""
    return [
        f"{'an' if name[0] in 'aeiou' else 'a'} {name} {activity}"
        for name in _of("activities", split)
        for activity in ACTIVITIES
    ]


def _of(name: str, split: str) -> list[str]:
    if split not in ("train", "held_out"):
        raise ValueError(f"an {name} split is 'train' or 'held_out', got {split!r}; choose one of them")
    return [animal for animal in ANIMALS if (animal in HELD_OUT) == (split == "held_out")]
