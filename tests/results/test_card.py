"""The model card of a merge, as hubs read it and as its owner edits it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import mergecli
from mergecli.results.card import write_card
from mergecli.results.result import Evaluation, TaskScore
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.sources import parse_source
from tests.conftest import Run, World
from tests.support.tiny_dual_encoders import make_tiny_dual_encoder

RECIPE = (
    'base = "toy:base"\n[tuned]\ndigits = "toy:digits"\nletters = "toy:letters"\n[method]\nname = "average"\n'
)


def loaded(path: Path) -> ModelCard:
    """The card as the Hub's own client reads it."""
    return ModelCard.load(path)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    (tmp_path / "toy.toml").write_text(RECIPE)
    done = mergecli.merge("toy.toml", output="average")
    assert done.card == Path("average/README.md")
    return tmp_path / "average"


def result(model: Path, accuracy: float = 0.75, **about: object) -> Evaluation:
    """A result of the model on two tasks of a hub, as `evaluate` gives one."""
    with_digest = {
        "name": model.stem,
        "digest": mergecli.info(model).digest,
        "method": "average",
        "kind": "checkpoint",
    }
    score = TaskScore(
        accuracy, 1.0, 1.0, int(100 * accuracy), 100, "test", {"source": "hf:tanganke/eurosat@0123456"}, "c", "t"
    )  # fmt: skip
    tasks = {"eurosat": score, "dtd": replace(score, data={"source": "toy:dtd"}, limit=100)}
    return replace(Evaluation(with_digest, {}, 1, tasks, 128, "float32"), **about)  # pyright: ignore[reportArgumentType]


def test_the_hubs_own_client_reads_the_card_of_a_folder(merged: Path) -> None:
    card = loaded(merged / "README.md")
    assert card.data.to_dict() == {
        "base_model": [], "base_model_relation": "merge", "library_name": "transformers",
        "tags": ["merge", "mergecli", "clip", "average"], "license": "apache-2.0",
    }  # fmt: skip
    inputs, recipe = mergecli.info(merged).inputs, mergecli.info(merged).metadata["recipe"]
    assert "# Merge of digits and letters by average\n" in card.text
    assert f"digest of the weights `{mergecli.info(merged).digest}`" in card.text
    assert f"| digits | toy:digits | {inputs['digits']} |" in card.text
    assert f"```toml\n{recipe}```" in card.text


def test_the_card_says_nothing_of_where_files_lie(world: World, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    files = {}
    for name, file in world.files.items():
        files[name] = private / file.name
        file.rename(files[name])
    mergecli.merge(files, base=world.base_file, method="ties", output="out/ties")
    text = Path("out/ties/README.md").read_text()
    assert str(tmp_path) not in text
    assert "private" not in text
    assert str(Path.home()) not in text
    assert "| t1 | t1.safetensors | xxh3:" in text
    assert "license" not in loaded(Path("out/ties/README.md")).data.to_dict()
    assert "No license is given here, since that of `base.safetensors`, `t1.safetensors`, " in text


def test_models_of_hubs_are_base_models(world: World) -> None:
    mergecli.merge(world.files, base=world.base_file, method="ties", output="ties.safetensors")
    text = world.files["t1"].parent / "ties.safetensors"
    recipe = mergecli.info(text).metadata["recipe"]
    for name, hub in {
        '"base.safetensors"': '"hf:openai/clip-vit-base-patch32@0123456"', '"t1.safetensors"': '"ms:org/one#vision"',
        '"t2.safetensors"': '{ source = "hf:openai/clip-vit-base-patch32", adapter = "hf:org/lora" }',
    }.items():  # fmt: skip
        recipe = recipe.replace(name, hub)
    save_file(world.base, text, {**mergecli.info(text).metadata, "recipe": recipe})
    data = loaded(write_card(text)).data
    assert data.base_model == ["openai/clip-vit-base-patch32", "org/one", "org/lora"]
    assert data.library_name == "mergecli"


def test_a_file_gets_a_card_where_it_is_asked_for(tmp_path: Path, run: Run) -> None:
    (tmp_path / "toy.toml").write_text(RECIPE)
    assert run("merge", "toy.toml", "-o", "average.safetensors").status == 0
    assert not Path("README.md").exists()
    assert run("merge", "toy.toml", "-o", "average.safetensors", "--card").status == 0
    assert loaded(Path("README.md")).text.strip().startswith("<!-- mergecli:begin of=average.safetensors ")
    ended = run("merge", "toy.toml", "-o", "other.safetensors", "--card")
    assert ended.status == 2
    assert ended.err == (
        "error: README.md: is the card of `average.safetensors`, and a folder has one card\n"
        "hint: name another folder, or leave the card as it is with `--no-card`\n"
    )
    assert not Path("other.safetensors").exists()
    ended = run(
        "merge", "toy.toml", "-o", "swept/", "--card", "--method", "ties", "--sweep", "method.density=0.1,0.2"
    )
    assert ended.err.startswith("error: --card: a sweep writes several models, and a folder has one card")


def test_the_card_of_another_dual_encoder_names_its_kind_and_how_it_is_loaded(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = make_tiny_dual_encoder(tmp_path / "base", "siglip")
    weights = {
        name: each
        for name, each in load_file(folder / "model.safetensors").items()
        if name.startswith("vision")
    }
    save_file(weights, tmp_path / "tuned.safetensors", {"format": "pt"})
    (tmp_path / "siglip.toml").write_text(
        'base = "base"\ntuned = { digits = "tuned.safetensors" }\n[method]\nname = "average"\n'
    )
    for output in ("merged", "merged.safetensors"):
        mergecli.merge("siglip.toml", output=output, card=True)
        card = loaded(Path("merged/README.md" if output == "merged" else "README.md"))
        assert card.data.to_dict()["tags"] == ["merge", "mergecli", "siglip", "average"]
        assert "\nA `siglip` vision tower, merged from 1 fine-tuned model by `average`" in card.text
        assert "CLIPVisionModel" not in card.text
    assert 'AutoModel.from_pretrained("FOLDER")' in loaded(Path("merged/README.md")).text
    assert type(AutoModel.from_pretrained("merged")).__name__ == "SiglipVisionModel"


def test_no_card_is_written_where_none_is_wanted(tmp_path: Path, run: Run) -> None:
    (tmp_path / "toy.toml").write_text(RECIPE)
    assert run("merge", "toy.toml", "-o", "average", "--no-card").status == 0
    assert not Path("average/README.md").exists()


def test_what_the_owner_wrote_outlives_another_merge(merged: Path, run: Run) -> None:
    path = merged / "README.md"
    text = path.read_text().replace(
        "license: apache-2.0\n", "license: mit  # mine\npipeline_tag: x\n# a comment\n"
    )
    path.write_text(
        text.replace("<!-- mergecli:begin", "My words.\n\n<!-- mergecli:begin") + "\nMy last words.\n"
    )
    ended = run("merge", "toy.toml", "--method", "ties", "-o", "average")
    assert ended.status == 0, ended.err
    assert "note: average/README.md: `license` stays as you wrote it\n" in ended.err
    text, data = path.read_text(), loaded(path).data
    assert (data.license, data.pipeline_tag, data.tags[-1]) == ("mit", "x", "ties")
    assert "license: mit  # mine\npipeline_tag: x\n# a comment\n" in text
    assert (
        text.index("My words.")
        < text.index("merged from 2 fine-tuned models by `ties`")
        < text.index("My last")
    )
    assert "warning" not in ended.err
    run("merge", "toy.toml", "--method", "ties", "-o", "average")
    assert path.read_text() == text


def test_a_card_of_somebody_else_gets_a_section_and_loses_nothing(tmp_path: Path, run: Run) -> None:
    (tmp_path / "toy.toml").write_text(RECIPE)
    Path("average").mkdir()
    Path("average/README.md").write_text("---\ntags: [theirs]\n---\n# Their words\n")
    assert run("merge", "toy.toml", "-o", "average").status == 0
    card = loaded(Path("average/README.md"))
    assert (card.data.tags, card.data.base_model_relation) == (["theirs"], "merge")
    assert card.text.startswith("# Their words\n\n<!-- mergecli:begin")


def test_an_edited_section_is_refused_before_the_work(merged: Path) -> None:
    path, before = merged / "README.md", mergecli.info(merged).digest
    path.write_text(path.read_text().replace("## Recipe", "## My recipe"))
    with pytest.raises(UsageError) as caught:
        mergecli.merge("toy.toml", method="ties", output="average")
    assert caught.value.message == (
        "average/README.md: the part between the marks `mergecli:begin` and `mergecli:end` was edited, and would be lost"
    )
    assert mergecli.info(merged).digest == before
    path.write_bytes(path.read_bytes().replace(b"## My recipe", b"## Recipe").replace(b"\n", b"\r\n"))
    mergecli.merge("toy.toml", method="ties", output="average")  # another end of line is no edit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"---\na: [1\n---\n", "README.md, line 2: the front matter is not YAML"),
        (b"---\n- a\n---\n", "README.md: the front matter is not a table"),
        (b"\xff\xfe", "README.md: is not a model's card: "),
    ],
)
def test_a_card_that_cannot_be_read_is_refused_before_the_work(
    merged: Path, content: bytes, message: str
) -> None:
    (merged / "README.md").write_bytes(content)
    with pytest.raises(InputError) as caught:
        mergecli.merge("toy.toml", output="average")
    assert caught.value.message.startswith(f"average/{message}")


def test_a_report_puts_the_models_own_results_where_hubs_read_them(merged: Path) -> None:
    other = replace(
        result(merged, 0.5), checkpoint={"name": "base", "digest": "xxh3:0", "method": "pretrained"}
    )
    table = mergecli.report([other, result(merged)], card=merged)
    card = loaded(merged / "README.md")
    assert table.text("md") in card.text
    assert card.data.model_name == "average"
    first, second = card.data.eval_results
    assert (first.dataset_name, first.dataset_type, first.dataset_revision) == (
        "eurosat",
        "tanganke/eurosat",
        "0123456",
    )
    assert (first.metric_type, first.metric_value, first.dataset_split) == ("accuracy", 0.75, "test")
    assert (second.dataset_type, second.dataset_args) == ("toy:dtd", {"limit": 100})
    mergecli.report([result(merged, 0.8)], card=merged)
    card = loaded(merged / "README.md")
    assert [each.metric_value for each in card.data.eval_results] == [0.8, 0.8]
    assert card.text.count("## Results") == 1
    mergecli.merge("toy.toml", method="ties", output="average")
    assert loaded(merged / "README.md").data.eval_results is None  # those were of another model


def test_a_report_makes_the_card_of_a_merge_that_has_none(merged: Path) -> None:
    (merged / "README.md").unlink()
    mergecli.report([result(merged)], card=merged)
    assert loaded(merged / "README.md").data.license == "apache-2.0"


def test_a_report_refuses_results_of_other_models(merged: Path, tmp_path: Path) -> None:
    before = (merged / "README.md").read_text()
    other = replace(result(merged), checkpoint={"name": "base", "digest": "xxh3:0"})
    with pytest.raises(
        InputError, match="none of the results is of this model: `base` has another digest\nhint: evaluate"
    ):
        mergecli.report([other], card=merged)
    assert (merged / "README.md").read_text() == before
    with pytest.raises(InputError, match="toy_base: does not say that it was merged"):
        write_card(_toy_base(tmp_path))


def test_a_report_refuses_the_card_of_an_adapter(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    save_file(load_file(merged / "model.safetensors"), tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(InputError) as caught:
        mergecli.report([result(merged)], card="lora")
    assert (
        caught.value.message == "lora: is an adapter: results are of its base with it, and not of the adapter"
    )
    assert caught.value.hint == "write them into its README.md yourself, before or after the marked part"


def _toy_base(folder: Path) -> Path:
    from shutil import copytree

    from mergecli.storage.store import locate

    return Path(copytree(locate(parse_source("toy:base", Path())), folder / "toy_base"))
