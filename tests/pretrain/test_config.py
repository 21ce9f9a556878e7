"""The schema: every YAML loads, typos are named, impossible values refused, every key covered."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from common.config import dotted, to_plain
from common.errors import UserError
from pretrain.config import PretrainConfig, load_config
from pretrain.features.augmentations.base import FeatureAugmentation
from pretrain.objectives.base import Objective

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "configs" / "pretrain").rglob("*.yaml"))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optim: {epochs: 20}\nfa: {method: mask}\n")
    return path


def test_there_are_configs():
    assert YAMLS


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_every_yaml_loads_and_says_what_it_is(path):
    loaded = dotted(to_plain(load_config(path)))
    for key, value in dotted(yaml.safe_load(path.read_text())).items():
        assert loaded.get(key, loaded.get(f"{key}.preset")) == value, key
    assert path.read_text().startswith("#"), "a config opens with what it is for"


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_the_resolved_config_loads_to_the_same(path, tmp_path):
    config = load_config(path, ["seed=3", "out=somewhere"])
    again = tmp_path / "config.yaml"
    again.write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
    assert load_config(again) == config


def test_overrides_win_over_the_file(config_file):
    config = load_config(
        config_file,
        ["optim.epochs=12", "fa.mask.ratio=0.5", "out=a=b", "data.pixel_std=[0.5,0.5,0.5]"],
    )
    assert config.optim.epochs == 12
    assert config.fa.method == "mask"
    assert to_plain(config)["fa"]["mask"] == {"ratio": 0.5}
    assert config.out == "a=b"
    assert config.data.pixel_std == (0.5, 0.5, 0.5)


def test_the_last_of_two_overrides_wins(config_file):
    assert load_config(config_file, ["seed=1", "seed=2"]).seed == 2


def test_null_unsets(config_file):
    assert load_config(config_file, ["out=x", "out=null"]).out is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optim: {epoch: 3}\n", r"optim\.epoch\b|epoch"),
        ("sead: 3\n", "sead"),
        ("fa: {methods: nn}\n", "methods"),
        ("data:\n  nested: {deep: 1}\n", "nested"),
    ],
)
def test_unknown_key_in_the_file_is_named(tmp_path, text, named):
    path = tmp_path / "typo.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"typo\.yaml: .*({named})"):
        load_config(path)


@pytest.mark.parametrize("override", ["optim.epoch=3", "sead=1", "fa.nn.k=2"])
def test_unknown_key_on_the_command_line_is_named(config_file, override):
    with pytest.raises(UserError, match=re.escape(override.partition("=")[0])):
        load_config(config_file, [override])


@pytest.mark.parametrize("override", ["optim.epochs", "--seed=3", "=3", "-x", ""])
def test_overrides_that_are_none(config_file, override):
    with pytest.raises(UserError, match=r"override .* is not of the form key=value"):
        load_config(config_file, [override])


def test_missing_file():
    with pytest.raises(UserError, match=r"config file no/such\.yaml does not exist; see configs/"):
        load_config("no/such.yaml")


@pytest.mark.parametrize("text", ["a: [1, 2\n", "- just\n- a list\n", "optim: 3\n"])
def test_broken_yaml_is_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_config(path)


WRONG_VALUES = {
    "arch.depth=102": "depth",
    "arch.name=vit": "arch: unknown name 'vit'; known are ",
    "arch.width_per_group=0": r"arch\.width_per_group must be > 0, got 0",
    "arch.stem_channels=-1": r"arch\.stem_channels must be > 0, got -1",
    "arch.res2_channels=250": r"multiple of 4 at depth 50, got 250",
    "arch.res2_channels=240": r"256 \* width_per_group \(64\) must be a multiple of res2_channels",
    "arch.depth=18": r"depth 18 has basic blocks, so res2_channels must equal width_per_group",
    "init.residual_gamma=-1": r"init\.residual_gamma must be >= 0, got -1",
    "data.batch_size=1": r"data\.batch_size must be >= 2, got 1",
    "data.batch_size=many": "batch_size",
    "data.image_size=8": r"data\.image_size must be >= 16, got 8",
    "data.shuffle_window=0": r"data\.shuffle_window must be >= 1, got 0",
    "data.num_workers=-1": r"data\.num_workers must be >= 0, got -1",
    "data.max_bad_samples=-1": r"data\.max_bad_samples must be >= 0, got -1",
    "data.pixel_std=[0,1,1]": r"data\.pixel_std must be positive",
    "data.pixel_mean=[0.5,0.5]": "pixel_mean",
    "data.augmentation=heavy": "augmentation",
    "heads.projector_layers=0": r"heads\.projector_layers must be >= 1, got 0",
    "heads.output_dim=0": r"heads\.output_dim must be >= 1, got 0",
    "objective.name=dino": "objective: unknown name 'dino'; known are byol, ",
    "objective.temperature=1": r"unknown key objective\.temperature",
    "objective=moco objective.temperature=0": r"objective\.temperature must be > 0, got 0",
    "objective=moco objective.temperature=.nan": r"objective\.temperature must be > 0, got nan",
    "objective.ema_tau=1.5": r"objective\.ema_tau must be in \[0, 1\], got 1\.5",
    "fa.method=rotate": "method",
    "fa.mask_ratio=0.1": r"unknown key fa\.mask_ratio; did you mean fa\.mask\.ratio\?",
    "fa.top_k=3": r"unknown key fa\.top_k; did you mean fa\.nn\.top_k\?",
    "fa.num_features=0": r"fa\.num_features must be >= 1, got 0",
    "fa.mask.ratio=1": r"fa\.mask\.ratio must be in \[0, 1\), got 1",
    "fa.noise.sigma=-1": r"fa\.noise\.sigma must be >= 0, got -1",
    "fa.mixup.alpha=0": r"fa\.mixup\.alpha must be > 0, got 0",
    "fa.nn.top_k=5000": r"1 <= top_k \(5000\) <= min_fill \(1024\) must hold",
    "fa.min_fill=0": r"1 <= top_k \(1\) <= min_fill \(0\) must hold",
    "fa.strength=1.5": r"fa\.strength must be in \[0, 1\], got 1\.5",
    "fa.strength_start=-1": r"fa\.strength_start must be in \[0, 1\], got -1",
    "fa.strength_curve=steps": "strength_curve",
    "fa.architecture=twin": "architecture",
    "fa.side=both": "side",
    "fa.views=third": "views",
    "fa.partner=self": "partner",
    "fa.queue_dtype=int8": "queue_dtype",
    "fa.nn.choice=last": "fa.nn.choice",
    "fa.nn.distance=l1": "fa.nn.distance",
    "fa.cutmix.ratio=1": r"fa\.cutmix\.ratio must be in \[0, 1\), got 1",
    "fa.extrapolate.scale=-1": r"fa\.extrapolate\.scale must be >= 0, got -1",
    "fa.extrapolate.per_dimension=perhaps": "per_dimension",
    "fa.method=nn+": r"fa\.method='nn\+': '' is none of none, cutmix, extrapolate",
    "fa.method=mask|none": r"fa\.method='mask\|none': 'none' stands alone",
    "fa.method=identity+nn": r"'identity' stands alone",
    "heads.dropout=1": r"heads\.dropout must be in \[0, 1\), got 1",
    "objective.ema_tau_end=-0.1": r"objective\.ema_tau_end must be in \[0, 1\], got -0\.1",
    "objective.stop_gradient=false": r"stop_gradient=false: the target of byol has no gradient",
    "objective=moco objective.num_negatives=0": r"objective\.num_negatives must be >= 1, got 0",
    "objective=swav objective.num_prototypes=0": r"objective\.num_prototypes must be >= 1, got 0",
    "objective=swav objective.sinkhorn_epsilon=0": r"sinkhorn_epsilon must be > 0, got 0",
    "objective=swav objective.sinkhorn_iterations=0": r"sinkhorn_iterations must be >= 1, got 0",
    "objective=swav objective.frozen_prototype_steps=-1": r"frozen_prototype_steps must be >= 0",
    "optim.head_weight_decay=-1": r"optim\.head_weight_decay must be >= 0, got -1",
    "optim.micro_batch_size=1": r"optim\.micro_batch_size must be 0 \(off\) or >= 2, got 1",
    "optim.micro_batch_size=100": r"micro_batch_size \(100\) must divide data\.batch_size \(256\)",
    "optim.accumulation=none": "accumulation",
    "fa.queue_size=100": r"min_fill \(1024\) <= queue_size \(100\)",
    "fa.num_features=2": r"num_features=2 takes the N nearest and needs top_k >= N",
    "optim.name=adam": "name",
    "optim.epochs=0": r"optim\.epochs must be >= 1, got 0",
    "optim.base_lr=0": r"optim\.base_lr must be > 0, got 0",
    "optim.momentum=1": r"optim\.momentum must be in \[0, 1\), got 1",
    "optim.lars_eta=0": r"optim\.lars_eta must be > 0, got 0",
    "optim.weight_decay=-1": r"optim\.weight_decay must be >= 0, got -1",
    "optim.warmup_epochs=100": r"warmup_epochs \(100.*\) must be >= 0 and below optim\.epochs",
    "engine.device=tpu": "device",
    "engine.batch_norm=global": "batch_norm",
    "engine.precision=fp8": "precision",
    "engine.min_loss_scale=0": r"engine\.min_loss_scale must be > 0, got 0",
    "engine.log_every_steps=0": r"engine\.log_every_steps must be >= 1, got 0",
    "engine.checkpoint_every_steps=0": r"engine\.checkpoint_every_steps must be >= 1, got 0",
    "engine.num_threads=-1": r"engine\.num_threads must be >= 0, got -1",
    "engine.keep_checkpoints=-1": r"engine\.keep_checkpoints must be >= 0, got -1",
    "engine.on_nonfinite=ignore": "on_nonfinite",
    "engine.max_nonfinite_steps=0": r"engine\.max_nonfinite_steps must be >= 1, got 0",
    "engine.watchdog_seconds=-1": r"engine\.watchdog_seconds must be >= 0, got -1",
    "engine.on_hang=ask": "on_hang",
    "data.last_batch=fill": "last_batch",
    "data.photometric=gpu": "photometric",
    "data.cache_gb=0": r"data\.cache_gb: 0.* must be above 0",
    "data.read_retries=-1": r"data\.read_retries: -1: must be 0 or more",
    "data.read_timeout_seconds=0": r"data\.read_timeout_seconds: 0.*: must be above 0",
    "data.streaming=true": r"data\.samples_per_epoch \(0\) goes with data\.streaming=true",
    "data.samples_per_epoch=10": r"an index knows its length: leave it at 0",
    "eval.knn_k=0": r"eval\.knn_k must be >= 1, got 0",
    "eval.knn_every_epochs=0": r"eval\.knn_every_epochs must be >= 1, got 0",
    "eval.knn_temperature=0": r"eval\.knn_temperature must be > 0, got 0",
    "eval.knn_dtype=float64": "knn_dtype",
    "eval.online_probe=perhaps": "online_probe",
    "eval.online_probe_lr=0": r"eval\.online_probe_lr must be > 0, got 0",
    "tracking.wandb=perhaps": "wandb",
    "eval.num_pictures=-1": r"eval\.num_pictures must be >= 0, got -1",
    "eval.num_map_points=5": r"eval\.num_map_points must be 0 \(no map\) or from 8 to 3000, got 5",
    "eval.num_map_points=3001": r"eval\.num_map_points must be 0 .* got 3001",
    "eval.image_size=-5": r"eval\.image_size must be 0 \(data\.image_size\) or >= 16, got -5",
    "objective=byol fa.architecture=pre": "no gradient reaches the backbone and the projector",
    "eval.probe_train=x": r"eval\.probe_train and eval\.probe_val go together",
}


@pytest.mark.parametrize("override", WRONG_VALUES)
def test_wrong_values_are_refused_by_name(tmp_path, override):
    path = tmp_path / "empty.yaml"
    path.write_text("seed: 0\n")
    with pytest.raises(UserError, match=WRONG_VALUES[override]):
        load_config(path, override.split())


def load_with(config_file, *overrides):
    return load_config(config_file, ["optim.micro_batch_size=64", *overrides])


@pytest.mark.parametrize("objective", ["infonce", "simclr", "swav"])
def test_plain_accumulation_needs_a_loss_of_single_samples(config_file, objective):
    with pytest.raises(UserError, match=rf"the loss of {objective} compares all .*=cached"):
        load_with(config_file, f"objective.name={objective}")
    cached = load_with(config_file, f"objective.name={objective}", "optim.accumulation=cached")
    assert cached.optim.micro_batch_size == 64
    whole = load_with(config_file, f"objective.name={objective}", "optim.micro_batch_size=0")
    assert whole.optim.accumulation == "plain"


@pytest.mark.parametrize("method", ["mixup", "mask+cutmix", "noise|extrapolate"])
def test_plain_accumulation_has_no_partners_in_the_batch(config_file, method):
    options = [f"fa.method={method}", "objective.name=byol"]
    with pytest.raises(UserError, match=r"fa\.partner=batch takes partners from the whole batch"):
        load_with(config_file, *options)
    for fine in ("fa.partner=view", "fa.partner=queue", "optim.accumulation=cached"):
        assert load_with(config_file, *options, fine).fa.method == method


@pytest.mark.parametrize("objective", ["byol", "simsiam", "moco"])
def test_plain_accumulation_of_losses_of_single_samples(config_file, objective):
    assert load_with(config_file, f"objective.name={objective}").objective.name == objective


@pytest.mark.parametrize("objective", ["simclr", "infonce", "simsiam"])
def test_stop_gradient_may_be_lifted_where_the_target_has_a_gradient(config_file, objective):
    options = [f"objective.name={objective}", "objective.stop_gradient=false"]
    assert load_config(config_file, options).objective.stop_gradient is False


@pytest.mark.parametrize("objective", ["byol", "moco", "swav"])
def test_stop_gradient_may_not_be_lifted_elsewhere(config_file, objective):
    with pytest.raises(UserError, match=f"the target of {objective} has no gradient"):
        load_config(config_file, [f"objective.name={objective}", "objective.stop_gradient=false"])


def test_consensus_makes_one_feature(config_file):
    options = ["fa.method=nn", "fa.nn.top_k=4", "fa.num_features=2", "fa.nn.choice=consensus"]
    with pytest.raises(UserError, match=r"consensus makes one feature of the top_k, .* got 2"):
        load_config(config_file, options)


def test_methods_are_read_as_alternatives_of_chains(config_file):
    fa = load_config(config_file, ["fa.method=nn + noise|mask"]).fa
    nn, noise, mask = (getattr(fa, name) for name in ("nn", "noise", "mask"))
    assert fa.chains() == ((nn, noise), (mask,))
    assert fa.uses_queue()
    assert not load_config(config_file, ["fa.method=mask|mixup"]).fa.uses_queue()
    assert load_config(config_file, ["fa.method=mask|mixup", "fa.partner=queue"]).fa.uses_queue()


@pytest.mark.parametrize("method", ["none", "identity"])
def test_methods_that_do_not_draw_give_one_feature(config_file, method):
    with pytest.raises(UserError, match=rf"num_features=3 needs a method that draws; '{method}'"):
        load_config(config_file, [f"fa.method={method}", "fa.num_features=3"])


def test_errors_are_one_line(config_file):
    with pytest.raises(UserError) as caught:
        load_config(config_file, ["fa.method=rotate"])
    assert "\n" not in str(caught.value)


# --- every key is covered: which test shows what it does


def dotted_keys(cls=PretrainConfig, prefix=""):
    """Keys of the schema, but for those of registered classes."""
    for field in dataclasses.fields(cls):
        default = getattr(cls(), field.name)
        if hasattr(default, "registry"):  # see test_every_registered_class_has_a_test_file
            continue
        if dataclasses.is_dataclass(default):
            yield from dotted_keys(type(default), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


CONTRASTIVE = "model/test_joint_embedding.py::"
TRAIN = "engine/test_trainer.py::"
BAD_INPUT = "engine/test_bad_input.py::"
DECODE = "data/test_decode.py::"
FEED = "engine/test_input_pipeline.py::"
OPTIM = "engine/test_optim.py::"
METHODS = "engine/test_run_methods.py::"
AUGMENTER = "features/test_feature_augmentation.py::"
CELLS = "objectives/test_methods.py::"
STEP = "engine/test_accumulation.py::"
SPEED = "engine/test_speed.py::"
SCALE = "engine/test_loss_scale.py::"
COLLAPSE = "engine/test_collapse.py::"
GUARDS = "engine/test_guards.py::"
HANG_TIMER = "engine/test_hang_timer.py::"
PROBE = "evaluation/test_probe.py::"
ONLINE = "evaluation/test_online_probe.py::"
WANDB = "engine/test_wandb.py::"
ADVERSARIAL = "engine/test_adversarial.py::"
COVERED_BY = {
    "out": TRAIN + "test_files_of_a_run",
    "seed": TRAIN + "test_seed_decides_the_curve",
    "init.residual_gamma": TRAIN + "test_arch_of_the_config_is_built",
    "data.shards": FEED + "test_shards_of_the_config_may_be_a_mixture",
    "data.image_size": TRAIN + "test_views_have_the_size_and_normalisation_of_the_config",
    "data.batch_size": TRAIN + "test_golden_curve_equals_a_loop_written_again",
    "data.augmentation.preset": TRAIN + "test_augmentation_preset_reaches_crops_and_colours",
    **{
        f"data.augmentation.{view}.crop.scale": FEED + "test_each_view_has_its_own_crop_scale"
        for view in ("view1", "view2")
    },
    **{
        f"data.augmentation.{view}.crop.ratio": DECODE + "test_policy_decides_ratios_and_flips"
        for view in ("view1", "view2")
    },
    **{
        f"data.augmentation.{view}.flip.probability": DECODE
        + "test_policy_decides_ratios_and_flips"
        for view in ("view1", "view2")
    },
    "data.last_batch": FEED + "test_last_batch_of_the_config_decides_the_steps",
    "data.cache_dir": FEED + "test_remote_shards_are_cached_where_the_config_says",
    "data.cache_gb": FEED + "test_remote_shards_are_cached_where_the_config_says",
    "data.read_retries": FEED + "test_reads_are_tried_again_as_often_as_the_config_says",
    "data.read_timeout_seconds": FEED + "test_a_server_that_says_nothing_is_given_up_in_time",
    "data.streaming": FEED + "test_streaming_reads_the_same_pictures_without_an_index",
    "data.samples_per_epoch": FEED + "test_streaming_reads_the_same_pictures_without_an_index",
    "data.photometric": FEED + "test_photometric_decides_who_makes_the_changes",
    "data.shuffle_window": TRAIN + "test_shuffle_window_decides_the_order",
    "data.num_workers": TRAIN + "test_killed_and_resumed_equals_uninterrupted",
    "data.max_bad_samples": BAD_INPUT + "test_bad_pictures_stop_the_run_or_are_counted",
    "data.pixel_mean": TRAIN + "test_views_have_the_size_and_normalisation_of_the_config",
    "data.pixel_std": TRAIN + "test_views_have_the_size_and_normalisation_of_the_config",
    "heads.projector_layers": TRAIN + "test_heads_of_the_config_are_built",
    "heads.projector_hidden_dim": TRAIN + "test_heads_of_the_config_are_built",
    "heads.projector_hidden_bn": METHODS + "test_options_of_the_heads_reach_the_network",
    "heads.projector_last_bn": TRAIN + "test_heads_of_the_config_are_built",
    "heads.projector_last_bn_affine": METHODS + "test_options_of_the_heads_reach_the_network",
    "heads.predictor_hidden_dim": TRAIN + "test_heads_of_the_config_are_built",
    "heads.output_dim": TRAIN + "test_heads_of_the_config_are_built",
    "heads.dropout": METHODS + "test_options_of_the_heads_reach_the_network",
    "fa.method": AUGMENTER + "test_options_reach_their_method",
    "fa.architecture": CELLS + "test_every_cell_equals_its_formula",
    "fa.side": CELLS + "test_every_cell_equals_its_formula",
    "fa.views": CELLS + "test_views_leaves_the_other_view_as_it_is",
    "fa.stop_gradient": AUGMENTER + "test_gradient_stops_at_what_a_takes_or_passes",
    "fa.num_features": CELLS + "test_free_loss_is_the_sum_of_n_terms",
    "fa.feature_loss": CELLS + "test_free_loss_is_the_sum_of_n_terms",
    "fa.partner": AUGMENTER + "test_partner_decides_whom_a_row_is_mixed_with",
    "fa.strength": AUGMENTER + "test_strength_reaches_every_link",
    "fa.strength_start": METHODS + "test_strength_rises_within_a_run",
    "fa.strength_curve": AUGMENTER + "test_strength_moves_from_its_start_to_its_end",
    "fa.queue_size": CONTRASTIVE + "test_queue_is_fed_once_per_step",
    "fa.queue_dtype": AUGMENTER + "test_queue_dtype_is_what_entries_are_stored_in",
    "fa.min_fill": CONTRASTIVE + "test_identity_until_min_fill_entries_are_there",
    "optim.name": OPTIM + "test_adamw_equals_the_textbook",
    "optim.epochs": OPTIM + "test_rate_equals_the_closed_form",
    "optim.base_lr": OPTIM + "test_peak_rate_scales_with_the_global_batch",
    "optim.momentum": OPTIM + "test_lars_equals_numpy_over_several_steps",
    "optim.weight_decay": OPTIM + "test_lars_equals_numpy_over_several_steps",
    "optim.head_weight_decay": OPTIM + "test_head_weight_decay_reaches_the_heads_only",
    "optim.exclude_bias_and_norm": OPTIM
    + "test_biases_and_normalisation_layers_may_be_treated_like_weights",
    "optim.warmup_epochs": OPTIM + "test_rate_equals_the_closed_form",
    "optim.predictor_constant_lr": OPTIM + "test_predictor_constant_lr_over_a_schedule",
    "optim.lars_eta": OPTIM + "test_lars_equals_numpy_over_several_steps",
    "optim.lars_clip": OPTIM + "test_lars_clip_equals_numpy",
    "optim.micro_batch_size": STEP + "test_plain_accumulation_equals_the_large_batch",
    "optim.accumulation": STEP + "test_cached_accumulation_equals_the_large_batch",
    "engine.device": BAD_INPUT + "test_gpu_asked_for_without_one",
    "engine.precision": TRAIN + "test_precision_decides_autocast",
    "engine.channels_last": TRAIN + "test_channels_last_changes_memory_not_meaning",
    "engine.activation_checkpointing": SPEED + "test_checkpointed_run_equals_the_plain_one",
    "engine.batch_norm": SPEED + "test_batch_norm_of_the_config_is_built",
    "engine.tf32": SPEED + "test_tf32_of_the_config_is_a_setting_of_gpus",
    "engine.compile": SPEED + "test_compiled_backbone_is_called_in_training_only",
    "engine.min_loss_scale": SCALE + "test_a_scale_that_collapses_ends_the_run",
    "engine.num_threads": TRAIN + "test_num_threads",
    "engine.log_every_steps": TRAIN + "test_log_and_checkpoint_intervals",
    "engine.checkpoint_every_steps": TRAIN + "test_log_and_checkpoint_intervals",
    "engine.keep_checkpoints": TRAIN + "test_engine_decides_how_checkpoints_are_kept",
    "engine.on_collapse": COLLAPSE + "test_stop_ends_the_run_with_a_checkpoint_and_warn_goes_on",
    "engine.collapse_std": COLLAPSE + "test_thresholds_of_the_config_decide",
    "engine.collapse_rank": COLLAPSE + "test_thresholds_of_the_config_decide",
    "engine.collapse_patience": COLLAPSE + "test_thresholds_of_the_config_decide",
    "engine.on_nonfinite": GUARDS + "test_skip_leaves_everything_as_it_was",
    "engine.max_nonfinite_steps": GUARDS + "test_more_steps_than_allowed_stop_the_run",
    "engine.watchdog_seconds": HANG_TIMER + "test_a_hang_is_reported_and_the_run_goes_on",
    "engine.on_hang": HANG_TIMER + "test_on_hang_stop_ends_the_process",
    "eval.probe_train": TRAIN + "test_probe_runs_at_its_interval",
    "eval.probe_val": TRAIN + "test_probe_runs_at_its_interval",
    "eval.knn_every_epochs": TRAIN + "test_probe_runs_at_its_interval",
    "eval.knn_k": PROBE + "test_k_and_temperature_reach_the_classifier",
    "eval.knn_temperature": PROBE + "test_k_and_temperature_reach_the_classifier",
    "eval.knn_dtype": PROBE + "test_dtype_of_the_config_is_what_the_bank_is_stored_in",
    "eval.online_probe": ONLINE + "test_weights_of_the_run_are_bit_equal_with_and_without_it",
    "eval.online_probe_lr": ONLINE + "test_steps_equal_the_textbook",
    "tracking.wandb": WANDB + "test_a_run_starts_and_finishes_wandb",
    "tracking.project": WANDB + "test_a_run_starts_and_finishes_wandb",
    "eval.image_size": PROBE + "test_image_size_is_the_probe_s_own_or_the_training_s",
    "eval.num_pictures": TRAIN + "test_num_pictures_decides_the_rows",
    "eval.num_map_points": "engine/test_run_pictures.py::test_num_map_points_decides_the_points",
    "adversarial.epsilon": ADVERSARIAL + "test_option_of_a_run_changes_what_is_learnt",
    "adversarial.num_steps": ADVERSARIAL + "test_more_steps_raise_it_further",
    "adversarial.step_size": ADVERSARIAL + "test_step_size_reaches_the_search",
}


def test_every_key_has_a_test_that_exists():
    keys = set(dotted_keys())
    assert keys - set(COVERED_BY) == set(), "keys without a test that shows what they do"
    assert set(COVERED_BY) - keys == set(), "tests of keys that are gone"
    for key, place in COVERED_BY.items():
        file, _, name = place.partition("::")
        source = (Path(__file__).parent / file).read_text()
        assert f"def {name}(" in source, f"{key}: {place} does not exist"


@pytest.mark.parametrize(
    ("registry", "folder"),
    [
        pytest.param(Objective.registry, "objectives", id="objectives"),
        pytest.param(FeatureAugmentation.registry, "features", id="features"),
    ],
)
def test_every_registered_class_has_tests_that_name_its_parameters(registry, folder):
    files = (Path(__file__).parent / folder).glob("test_*.py")
    source = "\n".join(path.read_text() for path in files)
    for name in registry.names():
        parameters = {field.name for field in dataclasses.fields(registry[name])}
        for word in (name, *parameters - set(registry.base.__dataclass_fields__)):
            assert re.search(rf"\b{word}\b", source), f"{name}: no test names {word}"


def test_every_key_is_read_by_code():
    """A key that no code reads is a promise without effect."""
    files = list((ROOT / "pretrain").rglob("*.py"))
    source = "\n".join(p.read_text() for p in files if p.name != "config.py")
    source += (ROOT / "pretrain" / "config.py").read_text().replace("fa.method", "")
    for key in dotted_keys():
        name = key.rpartition(".")[2]
        assert re.search(rf"\.{name}\b|\"{name}\"", source), f"{key} is never read"
