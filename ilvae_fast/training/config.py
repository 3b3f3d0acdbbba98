"""What a run is: one flat set of fields that YAML holds, saved with the run."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import data
from .._support.checks import check_number, check_positive
from .._support.errors import unknown_name
from .._support.extras import require
from .._support.options import build, check_names
from ..annealing import SCHEDULES, as_schedule
from ..data import Dataset
from ..distributions import LIKELIHOODS, Likelihood
from ..layers import NonNegative
from ..metrics.advice import Advice, advise
from ..operators.activations import Activation
from ..vae import CONFIGURATIONS, VAE, VAEConfig
from ..vae.config import FIRST_OPTIONS

PRECISIONS = ("no", "bf16", "fp16")
_ADDED = {"initialize", "lagging", "checkpoint_minutes"}  # fields that the first version did not have
AUTO = "auto"  # the L that suits the data
_KINDS: tuple[tuple[str, Any, str], ...] = (
    *((name, str, "a name") for name in ("data", "model", "precision")),
    *((name, str | None, "a path") for name in ("data_root", "output")),
    *((name, Mapping, "a mapping of names to values") for name in ("data_options", "model_options", "annealing")),
    *((name, bool, "true or false") for name in ("initialize", "cpu")),
)


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run.

    Args:
        data: name of the data set (:func:`ilvae_fast.data.load`).
        data_root: folder of data sets in files.
        data_options: options of the data set, such as ``{sigma: 7.5}``.
        model: a key of ``ilvae_fast.vae.CONFIGURATIONS``.
        latent_dim: m.
        model_options: fields of :class:`ilvae_fast.vae.VAEConfig` to set besides or instead, such as
            ``{likelihood: gaussian}``.
        L: certified inverse-Lipschitz constant ``L1 L2 sigma_min(B)`` of a Brenier decoder, split evenly over its two
            maps; ``"auto"``: what :func:`ilvae_fast.advise` recommends for the training data; None: the model's.
        initialize: start a Brenier decoder from the training data (:meth:`ilvae_fast.BrenierDecoder.initialize`).
        annealing: schedules by name, ``L1``, ``L2`` and ``kl_weight`` (:class:`ilvae_fast.annealing.Annealer`).
        epochs: passes over the training data.
        batch_size: data in a step, of each process. What does not fill a batch waits for another epoch.
        accumulation: micro-batches that a batch is cut into, to save memory. A moving variance (``optimal``) moves once
            for each of them. Not with free bits, which are of a batch's mean.
        learning_rate: of Adam.
        warmup_steps: the rate grows to its value on a line of so many steps.
        max_grad_norm: gradients longer than this are scaled down to it; None: never.
        lagging: updates of the encoder alone, at most, before each one of the decoder, for as long as the mutual
            information of the validation data (``data_options.validation``) grows from epoch to epoch: aggressive
            training of a lagging encoder (He et al., ICLR 2019). 0: none.
        precision: ``no`` (float32), ``bf16`` or ``fp16``, of matrix products.
        seed: of weights, batches and noise.
        checkpoint_every: steps from one checkpoint to the next.
        checkpoint_minutes: the longest time without a checkpoint. One is written at the end of an epoch, too, unless
            epochs are so short that it would slow training down.
        log_every: steps from one line of the log to the next.
        loss_limit: nats per datum; training stops if the loss is larger, or NaN.
        num_importance_samples: for the likelihood of each datum in the final measures.
        fisher_samples: for the divergence of each datum there.
        eval_limit: how many of the test data to measure on; None: all. The divergence takes a tenth of them.
        cpu: stay on the CPU, whatever else there is.
        output: folder of the run; None: ``runs/<data>-<model>-L<L>-seed<seed>``.

    Raises:
        ValueError, TypeError: naming the field; also for a value that YAML cannot hold.
    """

    data: str = "digits"
    data_root: str | None = None
    data_options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "il-lidvae"
    latent_dim: int = 10
    model_options: Mapping[str, Any] = field(default_factory=dict)
    L: float | str | None = None
    initialize: bool = True
    annealing: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 10
    batch_size: int = 128
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    lagging: int = 0
    precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 500
    checkpoint_minutes: float = 5.0
    log_every: int = 50
    loss_limit: float = 1e9
    num_importance_samples: int = 100
    fisher_samples: int = 16
    eval_limit: int | None = 1000
    cpu: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        for name, kind, wanted in _KINDS:
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted {wanted}")
        for name in ("data_root", "output"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: got '', wanted the path of a folder")
        if self.model not in CONFIGURATIONS:
            raise unknown_name("model", self.model, CONFIGURATIONS)
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        counts = ("latent_dim", "epochs", "batch_size", "accumulation", "checkpoint_every", "log_every")
        for name in (*counts, "num_importance_samples", "fisher_samples"):
            object.__setattr__(self, name, check_positive(name, getattr(self, name)))
        if self.eval_limit is not None:
            object.__setattr__(self, "eval_limit", check_positive("eval_limit", self.eval_limit))
        for name in ("learning_rate", "loss_limit", "checkpoint_minutes"):
            check_number(name, getattr(self, name), above=True)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, above=True)
        if isinstance(self.L, str) and self.L != AUTO:
            raise ValueError(f"L: got {self.L!r}, wanted a finite number >= 0 or {AUTO!r}")
        if self.L is not None and self.L != AUTO:
            check_number("L", self.L)
        for name in ("warmup_steps", "lagging", "seed"):
            check_number(name, getattr(self, name), whole=True)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation: got {self.accumulation}, wanted a divisor of batch_size, {self.batch_size}"
            )
        check_names("model_options", self.model_options, [f.name for f in dataclasses.fields(VAEConfig)])
        if "latent_dim" in self.model_options:
            raise ValueError("model_options: got latent_dim, wanted it as the field latent_dim of the run")
        if self.L is not None and "inverse_lipschitz" in self.model_options:
            raise ValueError(f"L: got {self.L} besides model_options.inverse_lipschitz, wanted one of them")
        if self.accumulation > 1 and self.model_options.get("free_bits"):
            raise ValueError(
                f"accumulation: got {self.accumulation} with model_options.free_bits, wanted 1: free bits "
                "apply to the mean of a batch, and with micro-batches would be another objective"
            )
        for schedule in self.annealing.values():
            as_schedule(schedule)
        self.to_dict()  # says what YAML cannot hold

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        if self.output is not None:
            return Path(os.path.expanduser(self.output))
        name = self.data.replace(":", "-").replace(os.sep, "-")
        if len(os.fsencode(name)) > 200:  # file systems take 255 bytes
            name = f"{name[:5]}{zlib.crc32(os.fsencode(name)):08x}-{name[-40:]}"
        constant = "" if self.L is None else f"-{constant_name(self.L)}"
        return Path("runs") / f"{name}-{self.model}{constant}-seed{self.seed}"

    def located(self) -> TrainConfig:
        """The same run for whoever is in another folder: with absolute paths, as it is saved.

        Raises:
            ValueError: unknown name of a data set.
        """
        name, root = data.located("data", self.data, self.data_root)
        output = os.path.abspath(self.folder)
        return replace(self, data=name, data_root=None if root is None else os.fspath(root), output=output)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainConfig:
        """From plain values. What the first version wrote, all its fields, keeps the defaults of then.

        Raises:
            ValueError: unknown name of a field, with the nearest one.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        check_names("field", fields, names)
        if "initialize" not in fields and set(names) - set(fields) <= _ADDED:
            options = dict(fields["model_options"])
            if options.get("decoder", CONFIGURATIONS[fields["model"]]["decoder"]) == "brenier":
                options = {"embedding": "identity", **options}
                options["decoder_options"] = {**FIRST_OPTIONS, **options.get("decoder_options", {})}
            fields = {**fields, "initialize": False, "model_options": options}
        return cls(**fields)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """What :meth:`to_yaml` wrote, or a part of it; absent fields take their defaults.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no mapping of names to values, or an unknown one.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"config: no file {os.fspath(path)!r}, wanted YAML with fields of a run")
        fields = read_yaml(path)
        try:
            return cls.from_dict(fields)
        except (ValueError, TypeError, KeyError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{os.fspath(path)}: {error}") from error

    def to_yaml(self) -> str:
        """All fields."""
        return require("yaml", "train").dump(self.to_dict(), Dumper=_dialect()[1], sort_keys=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, which YAML holds; schedules and activations as their fields."""
        try:
            return {f.name: _plain(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)}
        except RecursionError:
            raise ValueError("got a value that contains itself, as YAML's &a [*a] does, wanted none") from None

    def updated(self, assignments: Sequence[str]) -> TrainConfig:
        """With fields set as by ``["epochs=3", "model_options.likelihood=gaussian"]``; values are YAML.

        Raises:
            ValueError: no assignment, or an unknown field, with the nearest one.
        """
        fields = self.to_dict()
        for assignment in [assignments] if isinstance(assignments, str) else assignments:
            if not isinstance(assignment, str):
                raise TypeError(f"set: got {assignment!r}, wanted FIELD=VALUE")
            name, separator, value = assignment.partition("=")
            if not separator:
                raise ValueError(f"set: got {assignment!r}, wanted FIELD=VALUE")
            *path, last = name.split(".")
            inside = fields
            for depth, part in enumerate(path):
                if depth == 0 and part not in fields:
                    raise unknown_name("field", part, fields)
                inside = inside.setdefault(part, {})
                if not isinstance(inside, dict):
                    raise ValueError(f"set: got {assignment!r}, but {part} has no fields of its own")
            inside[last] = parse_yaml(f"set: {assignment}", value)
        return TrainConfig.from_dict(fields)


@functools.cache
def _dialect() -> tuple[Any, Any]:
    """How YAML is read and written: 1.2, to which ``no`` is a word and ``1e-3`` a number, where PyYAML has 1.1."""
    yaml = require("yaml", "train")
    number = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    patterns = {"bool": ("true|True|TRUE|false|False|FALSE", "tTfF"), "float": (number, "-+.0123456789")}

    def in_version_2(base: Any) -> Any:
        kept = {
            first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in patterns]
            for first, known in base.yaml_implicit_resolvers.items()
        }
        kind: Any = type(base.__name__, (base,), {"yaml_implicit_resolvers": kept})
        for tag, (pattern, first) in patterns.items():
            kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))
        return kind

    return in_version_2(yaml.SafeLoader), in_version_2(yaml.SafeDumper)


def read_yaml(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The fields in a YAML file.

    Raises:
        ValueError: no YAML, or no mapping of names to values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)}: is not text in UTF-8 ({error})") from error
    fields = parse_yaml(os.fspath(path), text)
    if not isinstance(fields, Mapping):
        found = "is empty" if fields is None else f"got {type(fields).__name__}"
        raise ValueError(f"{os.fspath(path)}: {found}, wanted fields with their values")
    return fields


def parse_yaml(source: str, text: str) -> Any:
    """The value of a text in YAML."""
    yaml = require("yaml", "train")
    try:
        return yaml.load(text, Loader=_dialect()[0])
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date may be none
        raise ValueError(f"{source}: is not valid YAML: {' '.join(str(error).split())}") from error


_KIND_OF = {schedule: kind for kind, schedule in SCHEDULES.items()}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Activation | NonNegative):  # as VAEConfig takes them too
        value = dataclasses.asdict(value)
    if type(value) in _KIND_OF:
        value = {"kind": _KIND_OF[type(value)], **dataclasses.asdict(value)}
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(f"{name}.{key}", v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, v) for v in value]
    if value is not None and type(value) not in (bool, int, float, str):  # of NumPy's numbers YAML knows nothing
        raise TypeError(f"{name}: got {value!r}, wanted what YAML holds: numbers, texts, lists, mappings of names")
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignored: Sequence[str] = ()) -> list[str]:
    """The fields in which two configurations differ, in words."""
    names = [name for name in new if name not in ignored and old.get(name) != new[name]]
    return [f"{name} was {old.get(name)!r}, is {new[name]!r}" for name in names]


def load_dataset(config: TrainConfig) -> Dataset:
    """The data of a run."""
    config = config.located()
    return data.load(config.data, config.data_root, **config.data_options)


def constant_name(L: float | str) -> str:
    """L in the names of folders."""
    return f"L{L}" if isinstance(L, str) else f"L{L:g}"


def takes_constant(config: TrainConfig) -> bool:
    """Whether the decoder is one whose certified constant ``L`` sets."""
    return {**CONFIGURATIONS[config.model], **config.model_options}["decoder"] == "brenier"


def model_config(config: TrainConfig, dataset: Dataset) -> VAEConfig:
    """The configuration of the model of a run, sized for its data; an L of ``"auto"`` has to be resolved before.

    Unless ``model_options`` say otherwise tokens are categorical, images in [0, 1] Bernoulli, other numbers Gaussian.

    Raises:
        ValueError, TypeError: naming the field; no likelihood for what may be pixels, 0 .. 255 or -1 .. 1, or counts.
    """
    fields: dict[str, Any] = {"data_dim": dataset.train.shape[1], "latent_dim": config.latent_dim}
    autoregressive = "autoregressive_hidden" in CONFIGURATIONS[config.model]
    if autoregressive != (dataset.num_categories is not None):
        kind = "sequences of tokens" if autoregressive else "numbers"
        family = [
            name for name in CONFIGURATIONS if ("autoregressive_hidden" in CONFIGURATIONS[name]) != autoregressive
        ]
        nearest = difflib.get_close_matches(config.model, family, n=1, cutoff=0.0)[0]
        raise ValueError(f"model: got {config.model!r}, which models {kind}; for {config.data} try {nearest!r}")
    if dataset.num_categories is not None:
        fields["likelihood_options"] = {"num_categories": dataset.num_categories}
        if takes_constant(config):  # the head maps [hidden state, z] injectively to the logits of the tokens
            widest = dataset.num_categories - config.latent_dim
            if widest < 1:
                raise ValueError(
                    f"latent_dim: got {config.latent_dim} for {config.model!r}, wanted less than "
                    f"{dataset.num_categories}, the number of different tokens in {config.data}"
                )
            fields["autoregressive_hidden"] = min(CONFIGURATIONS[config.model]["autoregressive_hidden"], widest)
    else:
        if "likelihood" not in config.model_options:
            _check_scale(dataset)
        fields["likelihood"] = "bernoulli" if len(dataset.shape) > 1 and dataset.unit_range else "gaussian"
        if len(dataset.shape) in (2, 3):
            fields["data_shape"] = dataset.shape
    if config.L is not None:
        if not takes_constant(config):
            raise ValueError(f"L: got {config.L} for {config.model!r}, whose decoder has no such constant")
        if isinstance(config.L, str):
            raise ValueError(f"L: got {config.L!r}, wanted a number here: resolved(config, dataset) finds it")
        fields["inverse_lipschitz"] = math.sqrt(config.L)
    return VAEConfig.named(config.model, **{**fields, **config.model_options})


def _check_scale(dataset: Dataset) -> None:
    """Refuse to guess the likelihood of what looks like pixels on another scale: a Gaussian of scale 1 is none."""
    values = torch.cat([dataset.train, dataset.test])
    low, high = (float(v) for v in values.aminmax())
    image = len(dataset.shape) > 1
    grey = low >= 0 and 1 < high <= 255 and (image or high == 255) and bool((values == values.round()).all())
    if grey or (image and -1 <= low < 0 and high <= 1):
        scale = "[0, 255]" if grey else "[-1, 1]"
        raise ValueError(
            f"likelihood: none is named for values from {low:g} to {high:g}, which may be pixels on another scale; "
            f"wanted one of two: data_options.range={scale} makes them 0 to 1; model_options.likelihood=gaussian, or "
            "poisson for counts, takes them as they are"
        )


def advice_for(config: TrainConfig, dataset: Dataset) -> Advice:
    """What :func:`ilvae_fast.advise` says about the training data of a run, with its likelihood and latents.

    Raises:
        ValueError, TypeError: naming the field; data that are no values of the likelihood asked for.
    """
    fields = model_config(replace(config, L=None), dataset)
    likelihood = build("likelihood_options", LIKELIHOODS[fields.likelihood], fields.likelihood_options)
    _check_data(config, dataset, likelihood)
    return advise(dataset.training_sample(), config.latent_dim, likelihood)


def resolved(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """``config`` with a number in the place of an L of ``"auto"``: the advice's, to three digits.

    Raises:
        ValueError, TypeError: as :func:`advice_for`; for a model without such a constant.
    """
    if config.L != AUTO or not takes_constant(config):  # model_config says what is wrong with the latter
        return config
    return replace(config, L=float(f"{advice_for(config, dataset).L:.3g}"))


def build_model(config: TrainConfig, dataset: Dataset) -> VAE:
    """The model of a run: that of :func:`model_config`, an L of ``"auto"`` :func:`resolved`.

    Raises:
        ValueError, TypeError: naming the field; data that are no values of the likelihood asked for.
    """
    model = VAE(model_config(resolved(config, dataset), dataset))
    _check_data(config, dataset, model.likelihood)
    return model


def _check_data(config: TrainConfig, dataset: Dataset, likelihood: Likelihood) -> None:
    for part in (dataset.train, dataset.test):
        try:
            likelihood.check(part)
        except ValueError as error:
            raise ValueError(f"data: {config.data}: {error}") from None
