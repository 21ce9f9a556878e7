"""Package description; `tools/setup.sh` is the supported way to install.

Detectron2 is not listed: it has no release on PyPI under its own name. tools/install_detectron2.py
installs it, tools/doctor.py checks for it. docs/dependencies.md says why each package is here.
"""

from setuptools import find_packages, setup

DETECTRON2_NEEDS = [
    "cloudpickle",
    "fvcore>=0.1.5",
    "iopath>=0.1.10",
    "matplotlib>=3.9",
    "omegaconf>=2.4",  # the first that needs no package without a wheel
    "pycocotools>=2.0.8",
    "tabulate",
    "termcolor",
    "yacs",
]

PACKAGES = ("common", "pretrain", "detection", "pipeline", "tools")

setup(
    name="feature-augmented-pretraining",
    version="0.2.0",
    description="Feature-augmented contrastive pretraining of ResNets for Detectron2 Faster R-CNN",
    license="Apache-2.0",
    python_requires=">=3.11",
    # With an explicit root an editable install is a plain path entry: new modules are seen at once.
    package_dir={"": "."},
    packages=find_packages(include=[f"{name}{below}" for name in PACKAGES for below in ("", ".*")]),
    entry_points={
        "console_scripts": [
            "fa-pipeline = tools.run_pipeline:main",
            "fa-dataset = tools.make_dataset:main",
            "fa-shards = tools.make_shards:main",
            "fa-pretrain = pretrain.__main__:main",
            "fa-convert = tools.convert_to_d2:main",
            "fa-train-voc = tools.train_voc:main",
            "fa-predict = tools.predict:main",
            "fa-export = tools.export:main",
            "fa-embed = tools.embed:main",
            "fa-linear = tools.linear_eval:main",
            "fa-ablate = tools.ablate:main",
            "fa-trials = tools.run_trials:main",
            "fa-runs = tools.runs:main",
            "fa-submit = tools.submit_pretrain:main",
        ]
    },
    package_data={
        "tools": ["*.sh"],
        "pipeline.report": ["*.css", "*.js", "*.j2"],
        "pipeline.datasets": ["*.json"],
    },
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "numpy>=2.0",
        "scipy>=1.15",  # the first whose bootstrap takes `rng`
        "opencv-python>=4.10",
        "pillow>=11.0",
        "simplejpeg>=1.8",
        "webdataset>=1.0",
        "fsspec[http]>=2025.3",
        "submitit>=1.5",
        "jsonargparse[signatures]>=4.40",
        "pyyaml>=6.0",
        "jaxtyping>=0.3",
        "tqdm>=4.66",
        "tensorboard>=2.18",
        "jinja2>=3.1",
        "zstandard>=0.23",
        "setuptools>=77",
        *DETECTRON2_NEEDS,
    ],
    extras_require={
        "s3": ["s3fs>=2025.3"],  # shards behind s3://
        "gs": ["gcsfs>=2025.3"],  # shards behind gs://
        "wandb": ["wandb>=0.19"],  # tracking.wandb
        "maps": ["scikit-learn>=1.6"],  # t-SNE of the features at a run's end
        "export": ["onnx>=1.16", "onnxruntime>=1.18"],  # tools/export.py --to onnx
        "dev": [
            "pytest>=8.3",
            "s3fs>=2025.3",
            "moto[server]>=5.1",
            "scikit-learn>=1.6",
            "hypothesis>=6.110",
            "pytest-xdist>=3.6",  # the whole suite on all cores
            "ruff>=0.12",
            "pyright[nodejs]>=1.1.405",
            "pre-commit>=4.0",
        ],
        "bench": [],  # rivals that benchmarks/ compares with; so far it needs nothing more
    },
)
