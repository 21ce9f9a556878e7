"""The schema: every YAML loads, typos are named, impossible values refused, every key covered."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from common.config import dotted, to_plain
from common.errors import UserError
from pretrain.config import PretrainConfig, load_config
from pretrain.data.augmentations.operation import Operation
from pretrain.features.augmentations.base import FeatureAugmentation
from pretrain.objectives.base import Objective

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "configs" / "pretrain").rglob("*.yaml"))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optim: {epochs: 20}\nfa: {method: mask}\n")
    return path


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_every_yaml_loads_says_what_it_is_and_loads_to_the_same_when_resolved(path, tmp_path):
    config = load_config(path, ["seed=3", "out=somewhere"])
    loaded = dotted(to_plain(config))
    for key, value in dotted(yaml.safe_load(path.read_text())).items():
        assert loaded.get(key, loaded.get(f"{key}.preset")) == value, key
    assert path.read_text().startswith("#"), "a config opens with what it is for"
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


WRONG_VALUES = {
    "arch.name=vit": "arch: unknown name 'vit'; known are ",
    "arch.width_per_group=0": r"arch\.width_per_group must be > 0, got 0",
    "arch.res2_channels=250": r"multiple of 4 at depth 50, got 250",
    "arch.res2_channels=240": r"256 \* width_per_group \(64\) must be a multiple of res2_channels",
    "arch.depth=18": r"depth 18 has basic blocks, so res2_channels must equal width_per_group",
    "init.residual_gamma=-1": r"init\.residual_gamma must be >= 0, got -1",
    "data.batch_size=1": r"data\.batch_size must be >= 2, got 1",
    "data.image_size=8": r"data\.image_size must be >= 16, got 8",
    "data.shuffle_window=0": r"data\.shuffle_window must be >= 1, got 0",
    "data.num_workers=-1": r"data\.num_workers must be >= 0, got -1",
    "data.max_bad_samples=-1": r"data\.max_bad_samples must be >= 0, got -1",
    "data.pixel_std=[0,1,1]": r"data\.pixel_std must be positive",
    "heads.projector_layers=0": r"heads\.projector_layers must be >= 1, got 0",
    "heads.output_dim=0": r"heads\.output_dim must be >= 1, got 0",
    "objective.name=dino": "objective: unknown name 'dino'; known are barlow, byol, ",
    "objective.temperature=1": r"unknown key objective\.temperature",
    "objective=moco objective.temperature=0": r"objective\.temperature must be > 0, got 0",
    "objective=moco objective.temperature=.nan": r"objective\.temperature must be > 0, got nan",
    "objective.ema_tau=1.5": r"objective\.ema_tau must be in \[0, 1\], got 1\.5",
    "fa.mask_ratio=0.1": r"unknown key fa\.mask_ratio; did you mean fa\.mask\.ratio\?",
    "heads.dropout=1": r"heads\.dropout must be in \[0, 1\), got 1",
    "objective.ema_tau_end=-0.1": r"objective\.ema_tau_end must be in \[0, 1\], got -0\.1",
    "objective.stop_gradient=false": r"stop_gradient=false: the target of byol has no gradient",
    "objective=swav objective.sinkhorn_epsilon=0": r"sinkhorn_epsilon must be > 0, got 0",
    "objective=barlow objective.off_diagonal_weight=-1": "off_diagonal_weight must be >= 0, got -1",
    "objective=barlow objective.loss_weight=0": r"objective\.loss_weight must be > 0, got 0",
    "objective=vicreg objective.covariance_weight=-1": "covariance_weight must be >= 0, got -1",
    "objective=deepclusterv2 objective.num_heads=0": r"objective\.num_heads must be >= 1, got 0",
    "objective=deepclusterv2 objective.kmeans_iterations=0": "kmeans_iterations must be >= 1",
    "objective=deepclusterv2 optim.epochs=1 optim.warmup_epochs=0": "epochs must be >= 2, got 1",
    "objective=deepclusterv2 data.streaming=true data.samples_per_epoch=64": "use an index",
    "optim.head_weight_decay=-1": r"optim\.head_weight_decay must be >= 0, got -1",
    "optim.micro_batch_size=1": r"optim\.micro_batch_size must be 0 \(off\) or >= 2, got 1",
    "optim.micro_batch_size=100": r"micro_batch_size \(100\) must divide data\.batch_size \(256\)",
    "optim.epochs=0": r"optim\.epochs must be >= 1, got 0",
    "optim.base_lr=0": r"optim\.base_lr must be > 0, got 0",
    "optim.momentum=1": r"optim\.momentum must be in \[0, 1\), got 1",
    "optim.lars_eta=0": r"optim\.lars_eta must be > 0, got 0",
    "optim.weight_decay=-1": r"optim\.weight_decay must be >= 0, got -1",
    "optim.warmup_epochs=100": r"warmup_epochs \(100.*\) must be >= 0 and below optim\.epochs",
    "engine.log_every_steps=0": r"engine\.log_every_steps must be >= 1, got 0",
    "engine.checkpoint_every_steps=0": r"engine\.checkpoint_every_steps must be >= 1, got 0",
    "engine.num_threads=-1": r"engine\.num_threads must be >= 0, got -1",
    "engine.keep_checkpoints=-1": r"engine\.keep_checkpoints must be >= 0, got -1",
    "engine.keep_every_steps=-1": r"engine\.keep_every_steps must be >= 0, got -1",
    "engine.min_loss_scale=0": r"engine\.min_loss_scale must be > 0, got 0",
    "engine.watchdog_seconds=-1": r"engine\.watchdog_seconds must be >= 0, got -1",
    "data.cache_gb=0": r"data\.cache_gb: 0.* must be above 0",
    "data.read_retries=-1": r"data\.read_retries: -1: must be 0 or more",
    "data.read_timeout_seconds=0": r"data\.read_timeout_seconds: 0.*: must be above 0",
    "data.shards=": "data.shards: name one shard set or more",
    "data.shards=[]": "data.shards: name one shard set or more",
    "data.shards=[a,b,a]": "data.shards: a is listed twice; give it a weight",
    'data.shards={"a":1,"b":0}': "data.shards: weight 0.* of b: must be above 0",
    'data.shards={"a":-1}': "data.shards: weight -1.* of a: must be above 0",
    'data.shards={"a":.nan}': "data.shards: weight nan of a: must be above 0",
    'data.shards={"a":.inf}': "data.shards: weight inf of a: must be above 0",
    "data.streaming=true": r"data\.samples_per_epoch \(0\) goes with data\.streaming=true",
    "data.samples_per_epoch=10": r"an index knows its length: leave it at 0",
    "engine.on_collapse=panic": "on_collapse",
    "engine.collapse_std=-1": r"engine\.collapse_std must be >= 0, got -1",
    "engine.collapse_rank=-1": r"engine\.collapse_rank must be >= 0, got -1",
    "engine.collapse_patience=0": r"engine\.collapse_patience must be >= 1, got 0",
    "adversarial.epsilon=-1": r"adversarial\.epsilon must be >= 0",
    "adversarial.num_steps=0": r"adversarial\.num_steps must be >= 1, got 0",
    "adversarial.step_size=0": r"adversarial\.step_size must be > 0, got 0",
    "adversarial.epsilon=2 engine.precision=fp16": "engine.precision=fp16: the gradient at a pict",
    "eval.knn_k=0": r"eval\.knn_k must be >= 1, got 0",
    "eval.knn_every_epochs=0": r"eval\.knn_every_epochs must be >= 1, got 0",
    "eval.knn_temperature=0": r"eval\.knn_temperature must be > 0, got 0",
    "eval.online_probe_lr=0": r"eval\.online_probe_lr must be > 0, got 0",
    "eval.num_pictures=-1": r"eval\.num_pictures must be >= 0, got -1",
    "eval.num_map_points=5": r"eval\.num_map_points must be 0 \(no map\) or from 8 to 3000, got 5",
    "objective=byol fa.architecture=pre": "no gradient reaches the backbone and the projector",
    "out=runs/\udcff": "out=runs/.* is no UTF-8, which TensorBoard needs",
    "eval.probe_train=x": r"eval\.probe_train and eval\.probe_val go together",
    "engine.precision=fp8": "precision",
    "engine.compile=true engine.activation_checkpointing=true": "do not go together",
    "objective=simclr data.augmentation.small_crops.num=6": (
        r"small_crops\.num=6: objective\.name=simclr takes no small crops \(NT-Xent takes .* num=0"
    ),
    "optim.epoch=3": r"unknown key optim\.epoch; did you mean optim\.epochs\?",
}


@pytest.mark.parametrize("override", WRONG_VALUES)
def test_wrong_values_are_refused_by_name(tmp_path, override):
    path = tmp_path / "empty.yaml"
    path.write_text("seed: 0\n")
    with pytest.raises(UserError, match=WRONG_VALUES[override]):
        load_config(path, override.split())


def load_with(config_file, *overrides):
    return load_config(config_file, ["optim.micro_batch_size=64", *overrides])


@pytest.mark.parametrize("objective", ["infonce", "simclr", "swav", "barlow"])
def test_plain_accumulation_needs_a_loss_of_single_samples(config_file, objective):
    with pytest.raises(UserError, match=rf"the loss of {objective} is one of the whole .*=cached"):
        load_with(config_file, f"objective.name={objective}")
    cached = load_with(config_file, f"objective.name={objective}", "optim.accumulation=cached")
    assert cached.optim.micro_batch_size == 64
    whole = load_with(config_file, f"objective.name={objective}", "optim.micro_batch_size=0")
    assert whole.optim.accumulation == "plain"


@pytest.mark.parametrize("option", ["fa.method=mixup", "objective.mixing.interpolate=1.6"])
def test_an_attack_on_micro_batches_needs_losses_of_their_own(config_file, option):
    options = [option, "objective.name=infonce", "optim.accumulation=cached"]
    with pytest.raises(UserError, match=r"adversarial\.epsilon: each micro-batch is attacked"):
        load_with(config_file, *options, "adversarial.epsilon=4")
    for fine in ("adversarial.epsilon=0", "optim.micro_batch_size=0"):
        load_with(config_file, *options, "adversarial.epsilon=4", fine)


@pytest.mark.parametrize("method", ["mixup", "mask+cutmix", "noise|extrapolate"])
def test_plain_accumulation_has_no_partners_in_the_batch(config_file, method):
    options = [f"fa.method={method}", "objective.name=byol"]
    with pytest.raises(UserError, match=r"fa\.partner=batch takes partners from the whole batch"):
        load_with(config_file, *options)
    for fine in ("fa.partner=view", "fa.partner=queue", "optim.accumulation=cached"):
        assert load_with(config_file, *options, fine).fa.method == method


@pytest.mark.parametrize("objective", ["byol", "moco", "swav", "deepclusterv2"])
def test_stop_gradient_may_not_be_lifted_elsewhere(config_file, objective):
    with pytest.raises(UserError, match=f"the target of {objective} has no gradient"):
        load_config(config_file, [f"objective.name={objective}", "objective.stop_gradient=false"])


# --- every key is read, and a test names it


def dotted_keys(cls=PretrainConfig, prefix=""):
    """Keys of the schema, but for those of registered classes."""
    for field in dataclasses.fields(cls):
        default = getattr(cls(), field.name)
        if hasattr(default, "registry"):  # see test_every_registered_class_is_tested
            continue
        if dataclasses.is_dataclass(default):
            yield from dotted_keys(type(default), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


@pytest.mark.parametrize(
    ("registry", "folder"),
    [
        pytest.param(Objective.registry, "objectives", id="objectives"),
        pytest.param(FeatureAugmentation.registry, "features", id="features"),
        pytest.param(Operation.registry, "data/augmentations", id="operations"),
    ],
)
def test_every_registered_class_is_tested(registry, folder):
    tests = (Path(__file__).parent / folder).rglob("test_*.py")
    source = "\n".join(path.read_text() for path in tests)
    for name in registry.names():
        assert re.search(rf"\b{name}\b", source), name
        for field in dataclasses.fields(registry[name]):
            is_own = field.name not in registry.base.__dataclass_fields__
            assert not is_own or re.search(rf"\b{field.name}\b", source), f"{name}.{field.name}"


def test_every_key_is_read_by_code_and_named_by_a_test():
    """A key that no code reads is a promise without effect."""
    tests = [p for p in (ROOT / "tests" / "pretrain").rglob("*.py") if p != Path(__file__)]
    tested = "\n".join(path.read_text() for path in tests)
    files = list((ROOT / "pretrain").rglob("*.py"))
    source = "\n".join(p.read_text() for p in files if p.name != "config.py")
    source += (ROOT / "pretrain" / "config.py").read_text().replace("fa.method", "")
    for key in dotted_keys():
        name = key.rpartition(".")[2]
        assert re.search(rf"\.{name}\b|\"{name}\"", source), f"{key} is never read"
        assert re.search(rf"\b{name}\b", tested), f"{key} is in no test"
