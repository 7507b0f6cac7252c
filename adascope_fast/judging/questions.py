"""What is asked of images: five questions, each with a line that says what it means."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question: its key in files, its title, and what it means."""

    key: str
    title: str
    text: str


QUESTIONS = (
    Question("structural_faithfulness", "Structural faithfulness", "Are things whole, well formed and well placed?"),
    Question("aesthetic_appeal", "Aesthetic appeal", "Do you like to look at it: composition, colour, light?"),
    Question("fine_detail", "Fine detail", "Are edges, textures and small parts crisp and right?"),
    Question("semantic_alignment", "Semantic alignment", "Does it show what the prompt says, and nothing against it?"),
    Question("prompt_responsiveness", "Prompt responsiveness", "Does each word of the prompt leave its mark on it?"),
)


def chosen(keys: str | None) -> tuple[Question, ...]:
    """The questions of these keys, separated by commas, in their usual order; None: all of them.

    Raises:
        ValueError: there is no such question, or none is named.
    """
    if keys is None:
        return QUESTIONS
    wanted = [key.strip() for key in keys.split(",") if key.strip()]
    known = {question.key for question in QUESTIONS}
    wrong = [key for key in wanted if key not in known]
    if wrong or not wanted:
        raise ValueError(
            f"--questions names some of {', '.join(question.key for question in QUESTIONS)}, got "
            f"{wrong[0] if wrong else 'none'!r:.80}; separate them by commas"
        )
    return tuple(question for question in QUESTIONS if question.key in wanted)
