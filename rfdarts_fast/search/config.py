"""The options of a search, and the published ones by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rfdarts_fast.nn import ConvInit, GammaInit
from rfdarts_fast.ops import Memory, backend_names
from rfdarts_fast.runs.config import (
    MOST_SIDE,
    RunConfig,
    one_of,
    require,
    require_not_negative,
    require_positive,
)
from rfdarts_fast.runs.schedule import BatchScaling
from rfdarts_fast.spaces import NASBENCH201, SPACES, GenotypeRule

Method = Literal["darts", "pc-darts", "rf-darts", "rf-pcdarts"]
Preset = Literal[
    "quick",
    "darts",
    "rf-darts",
    "pc-darts",
    "rf-pcdarts",
    "pc-darts-imagenet",
    "rf-pcdarts-imagenet",
    "rf-pcdarts-imagenet-k4",
    "nasbench201-darts",
    "nasbench201-rf-darts",
    "nasbench201-rf-darts-short",
    "robustdarts",
    "robustdarts-rf-darts",
]


@dataclass(frozen=True)
class SearchConfig(RunConfig):
    """Search a cell with a supernet; ends with genotype.json in the run's folder.

    Without --preset the one of the method and space is taken: --method rf-darts means --preset rf-darts.
    Options that the RF-DARTS paper leaves open are marked "our choice".
    """

    preset: Preset | None = None
    """Published values for the options below. Ours are `quick`, minutes on a CPU without a data set, and
    `nasbench201-rf-darts-short`, the best of the short searches tried."""
    method: Method = "rf-pcdarts"
    """rf-: random features, every convolution frozen. pc: partial channels and edge weights."""
    space: Annotated[str, one_of(SPACES)] = "darts"
    """The candidate operations: DARTS, RobustDARTS S1 to S4, NAS-Bench-201, or a registered one."""

    channels: int = 16
    """Channels of the first cells."""
    layers: int = 8
    """Cells of the supernet (DARTS family)."""
    cells_per_stage: int = 5
    """Cells in each of the three stages (NAS-Bench-201)."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers: cifar keeps the resolution, imagenet divides it by 8."""
    partial_channels: int = 1
    """K: 1/K of the channels are mixed, the others bypass (pc methods)."""
    edge_norm: bool = False
    """Learn PC-DARTS's edge weights (pc methods)."""
    affine: bool = True
    """Gamma and beta in the cells' BatchNorms. Published: off; rf methods train nothing else."""
    track_running_stats: bool = True
    """Keep running statistics in the cells' BatchNorms; off, validation too uses batch statistics."""

    conv_init: ConvInit = "kaiming_normal"
    """Distribution of frozen convolutions (rf methods). Our choice: kaiming_normal."""
    gamma_init: GammaInit = "ones"
    """Initial gamma of BatchNorm (rf methods). Our choice: ones."""
    train_classifier: bool = False
    """Train the linear classifier too (rf methods). Our choice: frozen, "only BatchNorm" read literally."""

    epochs: int = 50
    """Passes over the training half."""
    batch_size: int = 64
    """Images in a step, both for weights and for the architecture."""
    learning_rate: float = 0.025
    """Of SGD, at the start."""
    learning_rate_min: float = 0.001
    """Of SGD, at the end of the cosine."""
    learning_rate_warmup_epochs: int = 0
    """Epochs of linear warm-up: the first has 1/N of the rate, the second 2/N, and so on."""
    learning_rate_scaling: BatchScaling = "none"
    """Multiply SGD's rates, --learning-rate and --learning-rate-min, by --batch-size over --base-batch-size
    (linear), or by its square root (sqrt)."""
    arch_learning_rate_scaling: BatchScaling = "none"
    """The same for Adam's rate on the architecture weights."""
    base_batch_size: int = 64
    """The batch to which the learning rates belong: that of the preset."""
    schedule_per_step: bool = False
    """Move the learning rate with every step instead of every epoch (NAS-Bench-201)."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Nesterov momentum (NAS-Bench-201)."""
    weight_decay: float = 3e-4
    """Of SGD."""
    bn_weight_decay: bool = True
    """Decay gamma and beta too. Our choice for rf methods: yes, as DARTS and PC-DARTS do."""
    grad_clip: float = 5.0
    """Largest norm of the weights' gradient; 0 for none."""

    arch_learning_rate: float = 3e-4
    """Of Adam on the architecture weights, betas (0.5, 0.999)."""
    arch_weight_decay: float = 1e-3
    """Of Adam on the architecture weights."""
    arch_grad_clip: float = 0.0
    """Largest norm of the architecture's gradient; 0 for none."""
    arch_warmup_epochs: int = 0
    """Epochs before the architecture starts to move. Our choice for rf-pcdarts: PC-DARTS's."""
    order: Literal["first", "second"] = "first"
    """Order of the architecture's gradient. Our choice for rf methods: first."""
    levels: int = 2
    """2: weights and architecture learn on different images, the two parts of the split. 1: both move along
    one backward pass on a batch of the part that trains the weights, at half the cost; the other part is only
    evaluated, and --step-order has no meaning. Our choice: 2, as published."""
    step_order: Literal["arch-first", "weights-first"] = "arch-first"
    """The half of a bilevel step that comes first. DARTS: architecture; NAS-Bench-201: weights."""

    split: Literal["half", "stratified", "per-class", "nasbench201"] = "half"
    """Training and validation halves: first and second part of the training set (published), the same per
    class, a fraction of each class (ImageNet), or the official NAS-Bench-201 file."""
    train_portion: float = 0.5
    """half, stratified: share of the images that trains the weights."""
    train_fraction: float = 0.1
    """per-class: share of each class that trains the weights."""
    val_fraction: float = 0.025
    """per-class: share of each class that trains the architecture."""
    split_file: Path | None = None
    """nasbench201: the file cifar-split.txt, plain or gzipped."""
    cutout: int = 0
    """Side of the square cut out of training images, in pixels; 0 for none."""
    validate_every: int = 1
    """Epochs between evaluations on the validation half; 0 for never."""

    genotype_rule: GenotypeRule = "published"
    """published: NAS-Bench-201 takes the argmax with `none`, other spaces never choose it. without-none: that
    argmax without `none`. Noted in genotype.json and metrics.jsonl."""
    table: Path | None = None
    """NAS-Bench-201: a table as of `rfdarts query`; each epoch notes the accuracies and ranks of its
    genotype. A NATS-Bench folder is read as a whole, which takes minutes."""
    diagnose_every: int = 0
    """Epochs between costly diagnostics on the validation half: largest Hessian eigenvalue of the loss in the
    alphas (on one batch), accuracy of supernet and pruned supernet, and with --table Kendall's tau of their
    rankings; 0 for never. They do not change the search."""
    diagnose_images: int = 1024
    """Validation images of the accuracies in these diagnostics."""
    diagnose_cells: int = 50
    """Cells whose ranking by the supernet is compared with the table's."""

    backend: Annotated[str, one_of(backend_names)] = "auto"
    """Computes the mixed ops: auto takes the fastest that can run, reference is plain PyTorch; the command
    `rfdarts env` describes the others."""
    memory: Memory = "fast"
    """Kept for the backward pass: all branch outputs, those in bfloat16 (on a GPU, use --amp bf16), or node
    states only. The reference keeps all."""
    memory_budget: float | None = None
    """Megabytes of these that cells may keep together: as many cells as it takes compute theirs again, with
    the same results (default: no limit)."""

    amp: Literal["off", "bf16"] = "off"
    """bf16: activations in bfloat16; statistics, BatchNorm parameters and architecture weights in float32."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Record a step in a CUDA graph and replay it: auto where that can be done, on or stop. A recording that
    fails midway saves the run and ends it."""

    @property
    def random_features(self) -> bool:
        return self.method.startswith("rf-")

    def check(self) -> None:
        super().check()
        require_positive(self, "layers", "cells_per_stage", most=1000)
        require_positive(self, "channels", "partial_channels", most=65_536)
        require_positive(self, "epochs", "batch_size", "base_batch_size", most=10**6)
        require_positive(self, "learning_rate", "arch_learning_rate")
        require_not_negative(
            self, "learning_rate_min", "learning_rate_warmup_epochs", "momentum", "weight_decay", "grad_clip",
            "arch_weight_decay", "arch_grad_clip", "arch_warmup_epochs", "validate_every", "diagnose_every",
        )  # fmt: skip
        if self.memory_budget is not None:
            require_not_negative(self, "memory_budget")
        require_positive(self, "diagnose_images", "diagnose_cells")
        require_not_negative(self, "cutout", most=MOST_SIDE)
        require(self.momentum < 1, self, "momentum", "less than 1")
        partial = self.method in ("pc-darts", "rf-pcdarts")
        require(partial or self.partial_channels == 1, self, "partial_channels", f"1 with {self.method}")
        require(partial or not self.edge_norm, self, "edge_norm", f"no edge weights with {self.method}")
        require(
            self.channels % self.partial_channels == 0, self, "partial_channels",
            f"a divisor of the {self.channels} channels",
        )  # fmt: skip
        require(
            self.cuda_graph != "on" or self.order == "first", self, "cuda_graph",
            "off or auto with the second order",
        )  # fmt: skip
        require(self.levels in (1, 2), self, "levels", "1 or 2")
        require(self.levels == 2 or self.order == "first", self, "order", "first with --levels 1")
        family = SPACES[self.space].family
        rules = " or ".join(family.rules)
        require(
            self.genotype_rule in family.rules, self, "genotype_rule", f"{rules} in the space {self.space}"
        )
        require(
            self.table is None or family is NASBENCH201, self, "table",
            f"none in the space {self.space}, whose cells no table has",
        )  # fmt: skip
        if family is NASBENCH201:
            require(not partial, self, "method", f"darts or rf-darts in the space {self.space}")
            require(self.stem == "cifar", self, "stem", f"cifar in the space {self.space}")
        require(
            not self.random_features or self.affine, self, "affine", f"affine BatchNorm with {self.method}"
        )
        require(not self.nesterov or self.momentum > 0, self, "nesterov", "a momentum above 0 beside it")
        require(0 < self.train_portion < 1, self, "train_portion", "a share between 0 and 1")
        require(0 < self.train_fraction < 1, self, "train_fraction", "a share between 0 and 1")
        require(
            0 < self.val_fraction <= 1 - self.train_fraction, self, "val_fraction",
            f"a share of what train_fraction={self.train_fraction} leaves",
        )  # fmt: skip
        require(
            (self.split_file is not None) == (self.split == "nasbench201"), self, "split_file",
            "a file with --split nasbench201, and only there",
        )  # fmt: skip
        require(
            self.arch_warmup_epochs < self.epochs, self, "arch_warmup_epochs",
            f"fewer than the {self.epochs} epochs",
        )  # fmt: skip


# quark0/darts cnn/train_search.py: the defaults of SearchConfig, but for BatchNorm
_DARTS = {"method": "darts", "affine": False}
# yuhuixu1993/PC-DARTS train_search.py
_PC_DARTS = {
    "method": "pc-darts",
    "affine": False,
    "partial_channels": 4,
    "edge_norm": True,
    "batch_size": 256,
    "base_batch_size": 256,
    "learning_rate": 0.1,
    "learning_rate_min": 0.0,
    "arch_learning_rate": 6e-4,
    "arch_warmup_epochs": 15,
}
# yuhuixu1993/PC-DARTS train_search_imagenet.py
_PC_DARTS_IMAGENET = {
    **_PC_DARTS,
    "dataset": "imagefolder",
    "image_size": 224,
    "stem": "imagenet",
    "partial_channels": 2,
    "batch_size": 1024,
    "base_batch_size": 1024,
    "learning_rate": 0.5,
    "learning_rate_warmup_epochs": 5,
    "arch_learning_rate": 6e-3,
    "arch_grad_clip": 5.0,
    "arch_warmup_epochs": 35,
    "split": "per-class",
}
# D-X-Y/AutoDL-Projects configs/nas-benchmark/algos/DARTS.config; its split is --split nasbench201
_NASBENCH201 = {
    "method": "darts",
    "space": "nasbench201",
    "affine": False,
    "track_running_stats": False,
    "weight_decay": 5e-4,
    "nesterov": True,
    "schedule_per_step": True,
    "step_order": "weights-first",
}
# automl/RobustDARTS scripts/DARTS_search.sh; takes --space s1 to s4
_ROBUST_DARTS = {**_DARTS, "space": "s1", "order": "second"}
_RF = {"affine": True}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        **_PC_DARTS,
        **_RF,
        "method": "rf-pcdarts",
        "dataset": "digits",
        "image_size": 16,
        "channels": 16,
        "layers": 3,
        "epochs": 15,
        "batch_size": 32,
        "base_batch_size": 32,
        "learning_rate": 0.5,
        "arch_warmup_epochs": 5,
        "arch_learning_rate": 6e-3,
        "split": "stratified",
    },
    "darts": _DARTS,
    "rf-darts": {**_DARTS, **_RF, "method": "rf-darts"},
    "pc-darts": _PC_DARTS,
    "rf-pcdarts": {**_PC_DARTS, **_RF, "method": "rf-pcdarts"},
    "pc-darts-imagenet": _PC_DARTS_IMAGENET,
    "rf-pcdarts-imagenet": {**_PC_DARTS_IMAGENET, **_RF, "method": "rf-pcdarts"},
    # the paper's K on CIFAR; a quarter of the channels is mixed
    "rf-pcdarts-imagenet-k4": {**_PC_DARTS_IMAGENET, **_RF, "method": "rf-pcdarts", "partial_channels": 4},
    "nasbench201-darts": _NASBENCH201,
    "nasbench201-rf-darts": {**_NASBENCH201, **_RF, "method": "rf-darts"},
    # ours: the best of the short searches in docs/is_it_so.md
    "nasbench201-rf-darts-short": {
        **_NASBENCH201,
        **_RF,
        "method": "rf-darts",
        "cells_per_stage": 1,
        "epochs": 20,
        "split": "per-class",
        "train_fraction": 0.2,
        "val_fraction": 0.2,
        "learning_rate": 0.3,
        "arch_learning_rate": 3e-3,
        "train_classifier": True,
        "genotype_rule": "without-none",
    },
    "robustdarts": _ROBUST_DARTS,
    "robustdarts-rf-darts": {**_ROBUST_DARTS, **_RF, "method": "rf-darts", "order": "first"},
}
"""Values of `SearchConfig` by the name of the preset: published recipes, but for `quick` and
`nasbench201-rf-darts-short`, which are ours."""


def preset_values(given: dict[str, Any]) -> dict[str, Any]:
    """The values of the preset that the given values name, by `preset`, or else by `method` and `space`."""
    name = given.get("preset")
    if name is None:
        method = given.get("method", SearchConfig.method)
        space = SPACES.get(given.get("space", SearchConfig.space))
        name = f"nasbench201-{method}" if space and space.family is NASBENCH201 else method
    if name not in PRESETS:
        # an impossible pair of method and space; `check` explains it
        return {}
    values = PRESETS[name]
    if given.get("method") in ("darts", "rf-darts"):
        # a preset of a pc method, taken for one without partial channels
        values = {k: v for k, v in values.items() if k not in ("partial_channels", "edge_norm")}
    return values
