"""Every mistake in a recipe is one error that names the key, the value and the nearest valid key."""

import pytest

from maskmatch_scale.recipe import RecipeError, load_recipe

GRAPHS = ("engine.cuda_graphs=true", "engine.library=accelerate", "engine.zero_stage=0")


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("data: {root: d, crop_px: 160}\nmodel: {backbone: timm/x}\nrun: {dir: r, steps: 10}\n")
    return file


def test_overrides_and_types(path):
    recipe = load_recipe(
        path, ["optim.lr=1e-3", "method.mask.keep=null", "method.scales=[0.5,1]", "data.crop_px=[96,64]"]
    )
    assert recipe.optim.lr == 1e-3
    assert recipe.method.mask.keep is None
    assert recipe.method.scales == (0.5, 1.0)
    assert recipe.data.crop_px == (96, 64)
    assert load_recipe(path).data.crop_px == (160, 160)


def test_an_empty_mapping_takes_the_place_of_a_mapping(path):
    path.write_text(path.read_text().replace("crop_px: 160", "crop_px: 160, remap: {a: b}"))
    assert load_recipe(path, ["data.remap={c: d}"]).data.remap == {"a": "b", "c": "d"}
    assert load_recipe(path, ["data.remap={}"]).data.remap == {}
    assert load_recipe(path, ["data.remap={}", "data.remap.c=d"]).data.remap == {"c": "d"}
    assert load_recipe(path, ["data.value_ranges={}"]).data.remap == {"a": "b"}
    assert load_recipe(path, ["method.mask={}"]) == load_recipe(path)


def test_what_is_written_is_read_again(path, tmp_path):
    recipe = load_recipe(path, ["method.base=supervised", "model.backbone_options.patch_size=8"])
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.leanring_rate=3", ["optim.leanring_rate=3", "did you mean optim.lr?"]),
        ("method.treshold=0.9", ["method.treshold=0.9", "did you mean method.threshold?"]),
        ("method.mask.kep=1", ["did you mean method.mask.keep?"]),
        ("mask.keep=0.5", ["unknown key mask", "did you mean method.mask?"]),
        ("data.rot=x", ["data.rot", "did you mean data.root?"]),
        ("optim.lr=abc", ['optim.lr="abc"']),
        ("run.steps=2.5", ["run.steps=2.5"]),
        ("run.steps=true", ["run.steps=true"]),
        ("method.scales=[a]", ["method.scales"]),
        ("evaluation.scales=[.inf]", ["evaluation.scales", "finite"]),
        ("method.mask.mode=paint", ["method.mask.mode", "drop", "zero"]),
        ("method.base=fixmach", ['method.base="fixmach"', "Input should be 'supervised', 'mean_teacher', 'fixmatch'"]),
        ("method.base=3", ["method.base=3", "'fixmatch'"]),
        ("method.mask.keep=0", ["method.mask.keep=0"]),
        ("data.labelled_count=0", ["data.labelled_count=0"]),
        ("data.crop_px=[1,2,3]", ["data.crop_px"]),
        ("engine.zero_stage=4", ["engine.zero_stage=4"]),
        ("optim=3", ["optim=3"]),
        ("run.dir=null", ["run.dir=null"]),
        ("nonsense", ["nonsense", "section.key=value"]),
    ],
)
def test_one_line_that_names_the_key(path, override, parts):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


ACCELERATE = "engine.library=accelerate"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["engine.zero_stage=0", "engine.precision=bf16"], ["hidden optimizer step", "engine.zero_stage=1"]),
        (["engine.zero_stage=0", "engine.precision=fp16"], ["engine.precision=fp16", "use engine.zero_stage=1"]),
        ([ACCELERATE], ["engine.zero_stage=1", "set engine.zero_stage=0"]),
        ([ACCELERATE, "engine.zero_stage=0", "engine.precision=bf16"], ["engine.precision=bf16", "autocast-bf16"]),
        ([ACCELERATE, "engine.zero_stage=0", "engine.offload_optimizer=true"], ["engine.offload_optimizer"]),
        ([ACCELERATE, "engine.zero_stage=0", "engine.deepspeed_json=x.json"], ["engine.deepspeed_json"]),
        (["engine.zero_stage=0", "engine.offload_optimizer=true"], ["engine.offload_optimizer", "zero_stage=1"]),
        (["engine.zero_stage=2", "engine.offload_parameters=true"], ["engine.offload_parameters", "zero_stage=3"]),
        (["engine.zero_stage=3", "engine.compile=true"], ["engine.compile", "engine.zero_stage=2"]),
        (["engine.compile=true", "engine.activation_checkpointing=true"], ["engine.activation_checkpointing"]),
        (["engine.cuda_graphs=true"], ["engine.library=accelerate"]),
        ([*GRAPHS, "engine.compile=true"], ["engine.compile"]),
        ([*GRAPHS, "engine.activation_checkpointing=true"], ["engine.activation_checkpointing"]),
    ],
)
def test_combinations_that_train_wrongly_are_refused(path, overrides, parts):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    # Each is refused for the combination: without its last part the recipe is sound.
    load_recipe(path, overrides[:-1] if overrides[-1] != ACCELERATE else [ACCELERATE, "engine.zero_stage=0"])


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "data: {root: [\n", "run: {dir: r, steps: 1}\n"])
def test_files_that_are_no_recipes(tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_recipe(file)


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
