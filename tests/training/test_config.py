from pathlib import Path

import pytest
import yaml

from training.config import TrainingConfig, parse_config
from training.config import recipe as python_recipe

RECIPES = Path(__file__).parents[2] / "training" / "configs"


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_command_line_overrides_yaml_overrides_the_defaults(recipe):
    path = recipe("epochs: 7\nbatch_size: 3\nmodel: {num_attention_heads: 2, classifier: shared}\n")
    config = parse_config([path, "--batch_size", "5", "--model.num_attention_heads", "4", "--seed=9"])
    assert (config.epochs, config.batch_size, config.seed) == (7, 5, 9)
    assert config.model == {"num_attention_heads": 4, "classifier": "shared"}
    assert config.image_size == TrainingConfig().image_size


def test_values_are_read_as_their_type():
    config = parse_config(
        [
            *("--learning_rate", "1e-5"),  # YAML 1.1 reads this as text
            *("--weight_decay", "0"),
            *("--max_grad_norm", "null"),
            *("--mixed_precision", "no"),  # and this as false
            *("--label_names", "[cat, dog]"),
            *("--image_mean", "[0, 0.5, 1]"),
            *("--image-std", "[1, 1, 1]"),
            *("--output_dir", "7"),
            "--compile",
            *("--augmentation.mixup", "0.2"),
            *("--model.backbone_config.depths", "[1, 1, 2, 1]"),
            *("--model.backbone_config.patch_size", "2"),
        ]
    )
    assert config.learning_rate == 1e-5
    assert config.weight_decay == 0.0 and isinstance(config.weight_decay, float)
    assert config.max_grad_norm is None and config.mixed_precision == "no" and config.compile is True
    assert config.label_names == ["cat", "dog"] and config.image_mean == [0.0, 0.5, 1.0]
    assert config.output_dir == "7" and config.augmentation == {"mixup": 0.2}
    assert config.model == {"backbone_config": {"depths": [1, 1, 2, 1], "patch_size": 2}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "Unknown option 'learning_rat' in the command line: did you mean 'learning_rate'"),
        (["--backbone_lr", "1"], "did you mean 'backbone"),
        (["--zzzz", "1"], "see training/config.py"),
        (["--epochs", "many"], "epochs is 'many', but must be a value of type int"),
        (["--epochs", "0"], "epochs is 0, but must be at least 1"),
        (["--compile", "2"], "compile is 2, but must be a value of type bool"),
        (["--seed", "true"], "seed is True, but must be a value of type int"),
        (["--scheduler", "step"], "scheduler is 'step': choose 'cosine' or 'wsd' or 'plateau'"),
        (["--dataset", "null"], "dataset is None"),
        (["--seed", "1", "2"], "'2' follows no option"),
        (["--resume", "--overwrite"], "contradict"),
        (["--image_mean", "null"], "belong together"),
        (["--init_from", "a", "--backbone", "b"], "already brings a backbone"),
        (["--threshold_objective", "recall"], "they need it"),
        (["--threshold_target", "0.9"], "threshold_target belongs"),
        (["--augmentation.mix_up", "1"], "did you mean 'mixup'"),
    ],
)
def test_what_is_wrong_is_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError) as error:
        parse_config(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_key_in_yaml_is_refused_with_the_nearest(recipe):
    path = recipe("epoch: 3\n")
    with pytest.raises(ValueError, match=r"Unknown option 'epoch' in .*recipe.yaml: did you mean 'epochs'"):
        parse_config([path])
    with pytest.raises(ValueError, match="must hold"):
        parse_config([recipe("- a\n")])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        parse_config(["nowhere.yaml"])


def test_what_is_written_reads_back_equal(recipe):
    config = parse_config(["--learning_rate", "3e-4", "--scenes.num_scenes.train", "5", "--push_to_hub", "me/model"])
    assert parse_config([recipe(config.to_yaml())]) == config
    assert yaml.safe_load(config.to_yaml())["scenes"] == {"num_scenes": {"train": 5}}


@pytest.mark.parametrize(
    ("words", "recipe", "dataset"),
    [
        (["my photos"], "photos", "my photos"),  # a folder alone: with the recipe for photographs
        (["photos", "my photos"], "photos", "my photos"),
        (["quickstart"], "quickstart", "scenes"),
        (["split"], "photos", "split"),
        (["partial_labels", "split"], "partial_labels", "split"),
        (["quickstart.yaml", "my photos"], None, "my photos"),
        (["org/name"], "photos", "org/name"),
        (["photos", "org/name"], "photos", "org/name"),
        (["run"], None, "of the run"),
        (["photos.csv"], "photos", "photos.csv"),
        (["quickstart", "photos"], "quickstart", "photos"),  # both are names of recipes
    ],
)
def test_a_recipe_and_a_dataset_by_the_words_before_the_options(words, recipe, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my photos", "split", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos.csv").write_text("file_name,labels\n")
    (tmp_path / "quickstart.yaml").write_text("epochs: 77\n")
    (tmp_path / "run" / "config.yaml").write_text("epochs: 77\ndataset: of the run\n")
    config = parse_config([*words, "--seed", "3"])
    assert (config.dataset, config.seed) == (dataset, 3)
    if recipe is None:
        assert config.epochs == 77
    else:
        from_file = parse_config([str(RECIPES / f"{recipe}.yaml"), "--dataset", dataset, "--seed", "3"])
        assert config == from_file


def test_a_folder_that_has_the_name_of_a_recipe_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert parse_config(["photos"]).dataset == "photos"
    assert parse_config(["photos", "photos"]) == parse_config(["photos"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photo"], "photo is no recipe and no folder: did you mean photos?"),
        (["phto", "org/name"], "phto is no recipe: did you mean photos?"),
        (["photos", "a", "b"], "'b' follows no option"),
        (["absent.yaml"], "absent.yaml does not exist"),
    ],
)
def test_words_that_mean_nothing(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        parse_config(words)
    assert message in str(error.value)


def test_a_recipe_from_python_is_the_one_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert python_recipe("photos", "photos", epochs=3) == parse_config(["photos", "photos", "--epochs", "3"])
    assert python_recipe("photos") == parse_config(["photos"])
    assert python_recipe("quickstart", model={"classifier": "shared"}).model == {"classifier": "shared"}
    with pytest.raises(ValueError, match="Unknown option 'epoch' in the arguments: did you mean 'epochs'"):
        python_recipe("photos", epoch=3)
