"""A base's licence is what its files or its card say, and "other" where they do not."""

from pathlib import Path

import pytest

from adascope_fast.training.hub import licence
from adascope_fast.training.hub.licence import Licence, licence_of


def on_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, head: str | None) -> None:
    """A Hub whose repositories have this head on their card; None: it does not answer."""

    def download(repo_id: str, name: str, *, revision: str | None) -> str:
        if head is None:
            raise ConnectionError
        assert (repo_id, name, revision) == ("some/model", "README.md", "v1")
        (tmp_path / "card.md").write_text(f"---\n{head}\n---\nwords")
        return str(tmp_path / "card.md")

    monkeypatch.setattr(licence, "hf_hub_download", download)


@pytest.mark.parametrize(
    ("head", "want"),
    [
        ("license: creativeml-openrail-m", Licence("creativeml-openrail-m", is_known=True)),
        (
            "license: other\nlicense_name: flux-1-dev\nlicense_link: LICENSE.md",
            Licence("other", "flux-1-dev", "https://huggingface.co/some/model/blob/main/LICENSE.md", is_known=True),
        ),
        (
            "license: other\nlicense_link: https://example.com/licence",
            Licence("other", None, "https://example.com/licence", is_known=True),
        ),
        ("tags: [a]", Licence()),
        ("license: [a, b]", Licence()),
        ("license: {", Licence()),
        (None, Licence()),
    ],
)
def test_the_card_of_the_base_says_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, head: str | None, want: Licence):
    on_hub(monkeypatch, tmp_path, head)
    assert licence_of("some/model", revision="v1") == want


def test_the_files_of_a_local_base_go_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    on_hub(monkeypatch, tmp_path, "license: mit")
    model = tmp_path / "model"
    model.mkdir()
    assert licence_of("some/model", model, revision="v1").identifier == "mit"
    (model / "README.md").write_text("---\nlicense: openrail++\n---\n")
    assert licence_of("some/model", model, revision="v1") == Licence("openrail++", is_known=True)
    (model / "LICENSE").write_text("You may.")
    assert licence_of("some/model", model, revision="v1") == Licence(
        "openrail++", file=model / "LICENSE", is_known=True
    )


def test_the_embedded_models_have_that_of_this_package():
    assert licence_of("scenes-flow") == Licence("apache-2.0", is_known=True)
