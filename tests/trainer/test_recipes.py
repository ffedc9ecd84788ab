import pytest

from trainer import recipes
from trainer.errors import UserError
from trainer.recipes import RECIPES, build, settings_of, trajectory_digest

# Growing this set is a decision: each setting is one more thing to explain, to test and to get wrong.
SETTINGS = {
    "steps",
    "model.vocab_size",
    "model.max_positions",
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.dropout",
    "model.init_std",
    "model.norm",
    "model.embed_size",
    "model.attention_dropout",
    "data.seq_len",
    "data.global_batch",
    "data.micro_batch",
    "data.max_corrupt_lines",
    "optim.peak_lr",
    "optim.warmup_steps",
    "optim.total_steps",
    "optim.final_fraction",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
    "optim.clip_norm",
    "optim.schedule",
    "optim.cycles",
    "optim.exponent",
    "optim.decay_steps",
    "optim.decay",
    "parallel.dp",
    "parallel.tp",
    "parallel.replicas",
    "parallel.offload",
    "engine",
    "checkpoint_activations",
    "compile",
    "kernels",
    "deterministic",
    "precision",
    "loss_scale.initial",
    "loss_scale.window",
    "loss_scale.tolerance",
    "loss_scale.floor",
    "loss_scale.patience",
    "guard.deviations",
    "guard.window",
    "guard.warm",
    "seed",
    "checkpoint_every",
    "checkpoint.snapshot_every",
    "checkpoint.failure_hours",
    "checkpoint.disaster_hours",
    "checkpoint.keep_snapshots",
    "checkpoint.span_minutes",
    "checkpoint.snapshot_hours",
    "checkpoint.keep",
    "peer_copies.every",
    "peer_copies.versions",
    "evaluate_every",
    "evaluate_sequences",
    "log_every",
    "checksum_every",
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_are_these_and_no_others(name: str) -> None:
    assert {key for key, _ in settings_of(build(name))} == SETTINGS


# arXiv 2205.01068, table 1: layers, heads, width, peak learning rate, tokens per batch.
TABLE_1 = {
    "opt-125m": (12, 12, 768, 6.0e-4, 0.5e6),
    "opt-350m": (24, 16, 1024, 3.0e-4, 0.5e6),
    "opt-1.3b": (24, 32, 2048, 2.0e-4, 1e6),
    "opt-2.7b": (32, 32, 2560, 1.6e-4, 1e6),
    "opt-6.7b": (32, 32, 4096, 1.2e-4, 2e6),
    "opt-13b": (40, 40, 5120, 1.0e-4, 4e6),
    "opt-30b": (48, 56, 7168, 1.0e-4, 4e6),
    "opt-66b": (64, 72, 9216, 0.8e-4, 2e6),
    "opt-175b": (96, 96, 12288, 1.2e-4, 2e6),
}


def test_all_published_sizes_have_a_recipe() -> None:
    assert set(RECIPES) == {"opt-tiny", "opt-200k", "opt-500k", "opt-1m", "opt-2m", *TABLE_1}


@pytest.mark.parametrize("name", TABLE_1)
def test_recipes_are_the_published_ones(name: str) -> None:
    recipe = build(name)
    layers, heads, width, peak_lr, batch = TABLE_1[name]
    model = recipe.model
    assert (model.num_layers, model.num_heads, model.hidden_size) == (layers, heads, width)
    assert recipe.optim.peak_lr == peak_lr
    assert recipe.data.seq_len == model.max_positions == 2048
    tokens = recipe.data.global_batch * recipe.data.seq_len
    assert tokens == pytest.approx(batch, rel=0.05)
    assert (recipe.steps - 1) * tokens < 300e9 <= recipe.steps * tokens
    assert recipe.checkpoint_activations == (width >= 5120)
    warmup = 2000 if name == "opt-175b" else 375e6 / tokens
    assert recipe.optim.warmup_steps == pytest.approx(warmup, abs=1)
    assert (model.norm, model.embedding_width) == (("post", 512) if name == "opt-350m" else ("pre", width))
    assert (model.vocab_size, model.padded_vocab_size) == (50272, 50304)
    assert (model.dropout, model.init_std, recipe.optim.clip_norm, recipe.optim.weight_decay) == (0.1, 0.006, 1.0, 0.1)


def test_set_is_typed_by_the_setting() -> None:
    changes = ["steps=7", "optim.peak_lr=3e-4", "optim.betas=0.8,0.99", "precision=bf16", "parallel.tp=2"]
    recipe = build("opt-tiny", changes)
    assert recipe.steps == 7
    assert recipe.optim.peak_lr == 3e-4
    assert recipe.optim.betas == (0.8, 0.99)
    assert recipe.precision == "bf16"
    assert recipe.parallel.tp == 2
    assert recipe.model == build("opt-tiny").model


FLOATS = [key for key, value in settings_of(build("opt-tiny")) if isinstance(value, float)]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_none_are_refused(key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{key} must be a finite number"):
        build("opt-tiny", [f"{key}={value}"])


@pytest.mark.parametrize(
    "setting",
    [
        "optim.final_fraction=-0.1",
        "optim.final_fraction=1.1",
        "optim.weight_decay=-1",
        "optim.eps=0",
        "model.init_std=-1",
    ],
)
def test_what_would_train_the_wrong_way_in_silence_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        build("opt-tiny", [setting])


def test_the_last_of_two_settings_counts() -> None:
    assert build("opt-tiny", ["seed=3", "seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("optim.peek_lr=1", "Did you mean optim.peak_lr"),
        ("dropout=0", "Did you mean model.dropout"),
        ("zzz=1", r"no setting is called 'zzz'\. --list-recipes"),
        ("steps", "expected key=value"),
        ("steps=many", "'many' is not a whole number"),
        ("steps=1.5", "not a whole number"),
        ("optim.peak_lr=high", "not a number"),
        ("optim.betas=0.9", "not 2 numbers separated by a comma"),
        ("precision=fp8", "not one of fp32, bf16"),
        ("steps=0", "steps must be at least 1"),
        ("model.num_heads=0", "model.num_heads must be at least 1"),
        ("model.num_heads=3", "multiple of model.num_heads"),
        ("data.seq_len=65", "must not exceed model.max_positions"),
        ("model.dropout=1", "model.dropout must be"),
        ("optim.warmup_steps=600", "below optim.total_steps"),
        ("optim.betas=0.9,1", "optim.betas must be"),
        ("optim.peak_lr=nan", "optim.peak_lr"),
        ("model=1", "no setting is called 'model'"),
    ],
)
def test_a_wrong_setting_is_explained(setting: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        build("opt-tiny", [setting])


def test_an_unknown_recipe_is_explained() -> None:
    with pytest.raises(UserError, match=r"Did you mean opt-tiny\? Recipes: opt-tiny, opt-200k"):
        build("opt-tinny")


def test_the_digest_tells_trajectories_apart_but_not_layouts() -> None:
    def digest(
        *settings: str,
        factors: tuple[tuple[int, float], ...] = (),
        skips: tuple[tuple[int, int], ...] = (),
        data: str = "d",
        weights: str | None = None,
    ) -> str:
        return recipes.trajectory_digest(build("opt-tiny", settings), factors, skips, data, weights)

    same = [digest(), digest("parallel.tp=2"), digest("steps=9"), digest("checkpoint_every=7"), digest("log_every=1")]
    assert len(set(same)) == 1
    different = [
        digest("seed=2"),
        digest("optim.peak_lr=1e-4"),
        digest("data.global_batch=16"),
        digest(factors=((450, 0.5),)),
        digest(skips=((450, 460),)),
        digest(data="e"),
        digest(weights="w"),
    ]
    assert len({same[0], *different}) == 1 + len(different)


@pytest.mark.parametrize("setting", ["peer_copies.every=-2", "peer_copies.versions=0", "peer_copies.versions=3"])
def test_peer_copies_have_limits(setting: str) -> None:
    with pytest.raises(UserError):
        build("opt-tiny", [setting])


def test_peer_copies_do_not_decide_what_is_computed() -> None:
    recipes = [build("opt-tiny", settings) for settings in ([], ["peer_copies.every=0"], ["peer_copies.versions=1"])]
    assert len({trajectory_digest(recipe, (), (), "data") for recipe in recipes}) == 1
